"""SpectFormer: counts, timm's contract, published weights of both layouts."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from published import Published
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones import spectformer, spectformer_h
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import cfg
from vision_attn.backbones.spectformer import SpectFormer
from vision_attn.backbones.spectformer_h import HierarchicalSpectFormer

COUNTS = {
    "spectformer_tiny": 9_158_376,
    "spectformer_xsmall": 20_028_520,
    "spectformer_small": 32_449_768,
    "spectformer_base": 57_159_656,
    "spectformer_h_small": 22_226_928,
    "spectformer_h_base": 33_052_880,
    "spectformer_h_large": 54_675_792,
}
FLAT = {"dim": 24, "depth": 5, "num_heads": 3, "spectral_depth": 3, "mlp_ratio": 2.0}
STAGES = {
    "dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 3), "mlp_ratios": (2, 2, 3, 1),
    "stem_dim": 6,
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        "tiny_spectformer.untrained": cfg(first_conv="stem.0.proj", pool_size=(14, 14)),
        "tiny_spectformer_h.untrained": cfg(first_conv="stem.0.0", classifier=("head.fc", "head.aux_fc")),
    }
)
register_variants(globals(), SpectFormer, {"tiny_spectformer": FLAT}, spectformer.checkpoint_filter_fn)
register_variants(
    globals(), HierarchicalSpectFormer, {"tiny_spectformer_h": STAGES}, spectformer_h.checkpoint_filter_fn
)


def test_every_name_is_counted():
    names = timm.list_models(module="spectformer") + timm.list_models(module="spectformer_h")
    assert sorted(names) == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("name", ["tiny_spectformer", "tiny_spectformer_h"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectformer_tiny", "spectformer_h_small"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    check(name)


def attention(q, k, v, heads):
    parts = []
    for one in range(heads):
        a, b, c = (t.unflatten(-1, (heads, -1))[:, :, one] for t in (q, k, v))
        parts.append((a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ c)
    return torch.cat(parts, -1)


def gating(p, name, x):
    """x is `[batch, height, width, channels]`; the filter as the convolution that it is."""
    h, w, c = x.shape[1:]
    kernel = torch.fft.irfft2(torch.view_as_complex(p(name, h, w // 2 + 1, c, 2)), s=(h, w), dim=(0, 1))
    return sum(kernel[a, b] * x.roll((a, b), (1, 2)) for a in range(h) for b in range(w))


def mlp(p, at, x, hidden):
    return p.linear(f"{at}fc2", F.gelu(p.linear(f"{at}fc1", x, hidden)), x.shape[-1])


def flat(p, image, dim, depth, num_heads, spectral_depth, mlp_ratio):
    x = p.conv("patch_embed.proj", image, dim, 16, stride=16)
    size, x = x.shape[2:], x.flatten(2).mT
    x, hidden = x + p("pos_embed", 1, x.shape[1], dim), int(dim * mlp_ratio)
    for i in range(depth):
        at = f"blocks.{i}."
        y = p.norm(f"{at}norm1", x, 1e-6)
        if i < spectral_depth:
            y = gating(p, f"{at}filter.complex_weight", y.unflatten(1, size)).flatten(1, 2)
            x = x + mlp(p, f"{at}mlp.", p.norm(f"{at}norm2", y, 1e-6), hidden)
        else:
            q, k, v = p.linear(f"{at}attn.qkv", y, 3 * dim).chunk(3, -1)
            x = x + p.linear(f"{at}attn.proj", attention(q, k, v, num_heads), dim)
            x = x + mlp(p, f"{at}mlp.", p.norm(f"{at}norm2", x, 1e-6), hidden)
    return p.linear("head", p.norm("norm", x, 1e-6).mean(1), 1000)


def query_attention(p, at, queries, x, heads):
    q, (k, v) = p.linear(f"{at}q", queries, x.shape[-1]), p.linear(f"{at}kv", x, 2 * x.shape[-1]).chunk(2, -1)
    return p.linear(f"{at}proj", attention(q, k, v, heads), x.shape[-1])


def stages(p, image, dims, depths, num_heads, mlp_ratios, stem_dim):
    x = image
    for i in range(3):
        x = p.conv(f"patch_embed1.conv.{3 * i}", x, stem_dim, 3 if i else 7, 1 if i else 2, 1 if i else 3, bias=False)
        x = p.batch_norm(f"patch_embed1.conv.{3 * i + 1}", x).relu()
    for i, dim in enumerate(dims):
        x = p.norm2d(f"patch_embed{i + 1}.norm", p.conv(f"patch_embed{i + 1}.proj", x, dim, 3, 2, 1), 1e-5)
        size, x = x.shape[2:], x.flatten(2).mT
        for j in range(depths[i]):
            at = f"block{i + 1}.{j}."
            y = p.norm(f"{at}norm1", x, 1e-6)
            if i < 2:
                x = x + gating(p, f"{at}attn.complex_weight", y.unflatten(1, size)).flatten(1, 2)
            else:
                x = x + query_attention(p, f"{at}attn.", y, y, num_heads[i])
            hidden = int(dim * mlp_ratios[i])
            h = p.linear(f"{at}mlp.fc1", p.norm(f"{at}norm2", x, 1e-6), hidden).mT.unflatten(2, size)
            h = F.gelu(p.conv(f"{at}mlp.dwconv.dwconv", h, hidden, 3, padding=1, groups=hidden)).flatten(2).mT
            x = x + p.linear(f"{at}mlp.fc2", h, dim)
        if i < 3:
            x = p.norm(f"norm{i + 1}", x, 1e-6).mT.unflatten(2, size)
    first, at = x.mean(1, keepdim=True), "post_network.0."
    y = p.norm(f"{at}norm1", torch.cat([first, x], 1), 1e-6)
    first = first + query_attention(p, f"{at}attn.", y[:, :1], y, num_heads[-1])
    first = first + mlp(p, f"{at}mlp.", p.norm(f"{at}norm2", first, 1e-6), int(dims[-1] * mlp_ratios[-1]))
    x = p.norm("norm4", torch.cat([first, x], 1), 1e-6)
    return p.linear("head", x[:, 0], 1000) + 0.5 * p.linear("aux_head", x[:, 1:], 1000).max(1)[0]


@pytest.mark.parametrize(
    "name, family, released, sizes",
    [("tiny_spectformer", spectformer, flat, FLAT), ("tiny_spectformer_h", spectformer_h, stages, STAGES)],
)
@torch.no_grad()
def test_published_weights_give_the_published_output(name, family, released, sizes):
    checkpoint_filter_fn = family.checkpoint_filter_fn
    p, image = Published(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = released(p, image, **sizes)
    model = timm.create_model(name, img_size=64).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": p.weights}, model))
    torch.testing.assert_close(model(image), expected)
    again = checkpoint_filter_fn(model.state_dict(), model)  # our own names pass
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    bare = timm.create_model(name, img_size=64, num_classes=0)
    bare.load_state_dict(checkpoint_filter_fn(p.weights, bare))
    some = dict(p.weights)
    del some[next(key for key in some if "complex_weight" in key)]
    with pytest.raises(ValueError, match="SpectFormer weights"):
        checkpoint_filter_fn(some, model)


def test_every_token_has_logits():
    model = HierarchicalSpectFormer(**STAGES, num_classes=7).eval()
    image = torch.randn(2, 3, 96, 64)
    features = model.forward_features(image)
    tokens = model.head.token_logits(features)
    assert tokens.shape == (2, 3, 2, 7)
    first = model.head.fc(model.forward_head(features, pre_logits=True))
    torch.testing.assert_close(model(image), first + tokens.flatten(1, 2).max(1)[0] / 2)


def test_errors():
    with pytest.raises(ValueError, match="'avg'"):
        HierarchicalSpectFormer(**STAGES, global_pool="max")
