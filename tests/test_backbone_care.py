"""CARE: counts, timm's contract, published weights, the two classifiers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from published import Published
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.care import CARE, checkpoint_filter_fn
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import cfg

COUNTS = {"care_s0": 7_340_000, "care_s1": 9_602_424, "care_s2": 19_481_288}
TINY = {
    "memories": (4, 4, 8, 8), "depths": (1, 1, 2, 2), "ratios": ((2, 1), (1, 2), (2, 2), (1, 3)),
    "head_dims": (None, None, 4, 8), "layer_scale": 0.5,
}  # fmt: skip
default_cfgs = generate_default_cfgs({"tiny_care.untrained": cfg(classifier=("head.fc", "dist_head.fc"))})
register_variants(globals(), CARE, {"tiny_care": TINY}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="care")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("tiny_care")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_a_published_size(check):
    check("care_s0")


def far(p, at, x, head_dim):
    c = x.shape[1]
    if head_dim is None:
        column = p.conv(f"{at}dwconvatt_1", x, c, (11, 1), padding=(5, 0), groups=c)
        return column + p.conv(f"{at}dwconvatt_2", x, c, (1, 11), padding=(0, 5), groups=c)
    q, k = p.conv(f"{at}qk", x, 2 * c, 1).flatten(2).chunk(2, 1)
    v, out = x.flatten(2), []
    for h in range(c // head_dim):
        one = slice(h * head_dim, (h + 1) * head_dim)
        weights = (F.elu(q[:, one]) + 1).mT @ (F.elu(k[:, one]) + 1)  # all pairs of tokens
        out.append((weights / (weights.sum(-1, keepdim=True) + 1e-6 * weights.shape[-1])) @ v[:, one].mT)
    return torch.cat(out, -1).mT.view(x.shape)


def released(p, image, memories, depths, ratios, head_dims, layer_scale):
    x = p.batch_norm("stem.1", p.conv("stem.0", image, 4 * memories[0], 4, stride=4))
    for i, m in enumerate(memories):
        if i:
            x = p.batch_norm(f"stages.{i}.downsample.0", x)
            x = p.conv(f"stages.{i}.downsample.1", x, 4 * m, 2, stride=2)
        for j in range(depths[i]):
            last, at = (i, j) == (len(memories) - 1, depths[-1] - 1), f"stages.{i}.blocks.{j}."
            memory, a, b, c = x.split([m, m, m, m], 1)
            mix = f"{at}token_mixer."
            b = p.conv(f"{mix}dwconv1", b, m, 3, padding=1, groups=m)
            c = p.conv(f"{mix}dwconv2", c, m, 7, padding=3, groups=m)
            y = torch.cat([far(p, mix, a, head_dims[i]), b, c], 1)
            for n, ratio in enumerate(ratios[i], 1):
                name, width = f"{at}inter_layer.inter{n}_", y.shape[1]
                h = F.gelu(p.conv(f"{name}fc1", p.batch_norm(f"{name}norm", y), ratio * width, 1))
                h = p.conv(f"{name}conv", h, ratio * width, 3, padding=1, groups=ratio * width)
                if n == 1:
                    y = torch.cat([memory, y + p.conv(f"{name}fc2", h, width, 1)], 1)
                else:
                    y = h if last else y + p.conv(f"{name}fc2", h, width, 1)
            x = y if last else x + y * p(f"{at}gamma", 4 * m)[:, None, None]
    x = F.gelu(x.mean((2, 3)))
    return [p.linear(f"{name}.fc", p.norm(f"{name}.norm", x, 1e-6), 1000) for name in ("head", "dist_head")]


@torch.no_grad()
def test_published_weights_give_the_published_output():
    p, image = Published(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    one, two = released(p, image, **TINY)
    model = CARE(**TINY).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": p.weights}, model))
    torch.testing.assert_close(model(image), (one + two) / 2)
    model.set_distilled_training()
    torch.testing.assert_close(model(image), (one + two) / 2)
    del p.weights["dist_head.norm.bias"]
    with pytest.raises(ValueError, match="1 are missing, such as dist_head.norm.bias"):
        checkpoint_filter_fn(p.weights, model)


def test_distilled_training_returns_both_logits():
    model = CARE(**TINY, num_classes=5)
    image = torch.randn(2, 3, 64, 64)
    assert model(image).shape == (2, 5)
    model.set_distilled_training()
    one, two = model(image)
    assert one.shape == two.shape == (2, 5) and not torch.equal(one, two)


def test_weights_without_classifier():
    p, model = Published(), CARE(**TINY, num_classes=0)
    with torch.no_grad():
        released(p, torch.randn(1, 3, 32, 32, dtype=torch.float64), **TINY)
    model.load_state_dict(checkpoint_filter_fn(p.weights, model))
    with pytest.raises(ValueError, match="head_dim 3"):
        CARE(**{**TINY, "head_dims": (None, None, 3, 8)})
