"""SLAB-Swin: sizes, timm's contract, norms that change while training, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_backbone_inline import DEPTHS, DIM, HEADS, WINDOW, swin_logits, swin_weights
from test_module_linear import reference
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import cfg
from vision_attn.backbones.slab import PRepBN, SlabSwin, checkpoint_filter_fn

COUNTS = {"slab_swin_tiny": 29_216_605, "slab_swin_small": 50_552_965}
SMALL = {"depths": (2, 1, 2, 1), "linear": (2, 1, 0, 0), "dim": 8, "num_heads": (1, 2, 4, 8)}
default_cfgs = generate_default_cfgs({"small_slab_swin.untrained": cfg(first_conv="stem.proj")})
register_variants(globals(), SlabSwin, {"small_slab_swin": SMALL}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="slab")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("small_slab_swin")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    check(name)


def test_norm_goes_from_layer_norm_to_batch_norm():
    torch.manual_seed(0)
    norm, x = PRepBN(6, steps=4).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    norm.norm2.alpha.data.fill_(0.3)
    layer = F.layer_norm(x, (6,))
    flat = x.flatten(0, 1)
    batch = ((flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()).view(x.shape) + 0.3 * x
    for share in (1, 0.75, 0.5, 0.25, 0, 0):
        torch.testing.assert_close(norm(x), share * layer + (1 - share) * batch)
    norm.eval()
    mean, var = norm.norm2.bn.running_mean, norm.norm2.bn.running_var
    torch.testing.assert_close(norm(x), (x - mean) / (var + 1e-5).sqrt() + 0.3 * x)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        PRepBN(6, steps=0)


def test_progress_is_saved():
    model = SlabSwin(**SMALL, norm_steps=10)
    model(torch.randn(1, 3, 64, 64))
    fresh = SlabSwin(**SMALL, norm_steps=10)
    fresh.load_state_dict(model.state_dict())
    assert fresh.norm.left == 9


@torch.no_grad()
def test_published_weights():
    def add_norm(own, name, dim):
        own.layer(f"{name}.norm1", dim)
        own.layer(f"{name}.norm2.bn", dim)
        own.weights[f"{name}.norm2.alpha"] = torch.rand(1, generator=own.generator).double() / 8  # scores stay small
        own.table(f"{name}.norm2.bn.running_mean", dim)
        own.weights[f"{name}.norm2.bn.running_var"] = torch.rand(dim, generator=own.generator).double() + 8
        own.weights[f"{name}.norm2.bn.num_batches_tracked"] = torch.tensor(7)
        for buffer, value in (("warm", 0), ("iter", 3), ("total_step", 9)):
            own.weights[f"{name}.{buffer}"] = torch.tensor(value)

    def add_attention(own, name, i, dim):
        own.layer(f"{name}.dwc", dim // HEADS[i], 1, 5, 5)
        own.table(f"{name}.positional_encoding", 1, (56 // 2**i) ** 2, dim)

    def norm(x, name):
        entries = [own.weights[f"{name}.norm2.bn.{e}"] for e in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x.flatten(0, 2), *entries).view(x.shape) + own.weights[f"{name}.norm2.alpha"] * x

    def attention(q, k, v, x, name):
        table = own.weights[f"{name}.positional_encoding"]
        side = int(table.shape[1] ** 0.5)
        table = table.mT.reshape(1, -1, side, side)
        table = F.interpolate(table, x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1).unflatten(-1, k.shape[-2:])
        taps = own.weights[f"{name}.dwc.weight"], own.weights[f"{name}.dwc.bias"]
        maps = [F.conv2d(t.permute(0, 3, 1, 2), *taps, padding=2, groups=t.shape[-1]) for t in v.unbind(3)]
        return reference("slab", q, k + table, v) + torch.stack([m.permute(0, 2, 3, 1) for m in maps], 3)

    own = swin_weights(add_norm, add_attention)
    options = {"linear": (2, 1), "depths": DEPTHS, "dim": DIM, "num_heads": HEADS, "window": WINDOW, "mlp_ratio": 2.0}
    model = SlabSwin(**options, num_classes=5).double().eval()
    image = torch.randn(2, 3, 48, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for wrapped in (own.weights, {"model": own.weights}):
        model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    torch.testing.assert_close(model(image), swin_logits(own, image, norm, attention))
    assert (int(model.norm.left), int(model.norm.steps)) == (3, 9)
    spoiled = {name: value for name, value in own.weights.items() if "alpha" not in name}
    with pytest.raises(ValueError, match="not SLAB-Swin weights"):
        checkpoint_filter_fn(spoiled, model)
