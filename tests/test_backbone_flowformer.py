"""Flowformer for images: counts, timm's contract, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from published import Published
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.flowformer import Flowformer, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg

TINY = {"dims": (12, 24, 24, 48), "depths": (1, 1, 2, 1), "num_heads": 3, "mlp_ratio": 2.0}
default_cfgs = generate_default_cfgs({"tiny_flowformer.untrained": cfg(first_conv="stem.0.proj")})
register_variants(globals(), Flowformer, {"tiny_flowformer": TINY}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert timm.list_models(module="flowformer") == ["flowformer"]
    assert parameters("flowformer") == 43_311_304


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("tiny_flowformer")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_published_size(check):
    check("flowformer")


def attention(q, k, v, e=1e-6):
    """[tokens, dim] of one head."""
    q, k, n = q.sigmoid(), k.sigmoid(), len(q)
    incoming = 1 / ((q + e) @ (k.sum(0) + e) + e)
    outgoing = 1 / ((k + e) @ (q.sum(0) + e) + e)
    sink = (q + e) @ ((outgoing[:, None] * k).sum(0) + e) + e
    source = ((k + e) @ ((incoming[:, None] * q).sum(0) + e) + e).clamp(-1, 1)
    return (sink.sigmoid() * incoming)[:, None] * (q @ (k.T @ (v * n * source.softmax(0)[:, None])))


def released(p, image, dims, depths, num_heads, mlp_ratio):
    side = image.shape[2] // 4
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        image = p.conv(f"patch_embed.{i}.proj", image, dim, 2 if i else 4, stride=2 if i else 4)
        x = image.flatten(2).mT
        if i == 0:
            x = x + p("pos_embed", 1, side * side, dim)
        for j in range(depth):
            at = f"blocks.{i}.{j}."
            qkv = p.linear(f"{at}attn.qkv", p.norm(f"{at}norm1", x, 1e-6), 3 * dim)
            qkv = qkv.view(*x.shape[:2], 3, num_heads, -1)
            heads = [[attention(*image[:, :, h].unbind(1)) for h in range(num_heads)] for image in qkv]
            out = torch.stack([torch.cat(parts, -1) for parts in heads])
            x = x + p.linear(f"{at}attn.proj", out, dim)
            h = F.gelu(p.linear(f"{at}mlp.fc1", p.norm(f"{at}norm2", x, 1e-6), int(dim * mlp_ratio)))
            x = x + p(f"{at}gamma", dim) * p.linear(f"{at}mlp.fc2", h, dim)
        image = x.mT.unflatten(2, image.shape[2:])
    return p.linear("head", p.norm("norm", x, 1e-6).mean(1), 1000)


@torch.no_grad()
def test_published_weights_give_the_published_output():
    p, image = Published(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = released(p, image, **TINY)
    model = Flowformer(**TINY, img_size=64).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": p.weights}, model))
    torch.testing.assert_close(model(image), expected)
    again = checkpoint_filter_fn(model.state_dict(), model)  # our own names pass
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    other = Flowformer(**TINY, img_size=96)  # the table is resampled
    assert checkpoint_filter_fn(p.weights, other)["stem.1.table"].shape == (1, 24, 24, 12)


def test_wrong_weights_are_refused():
    p, model = Published(), Flowformer(**TINY, img_size=64)
    with torch.no_grad():
        released(p, torch.randn(1, 3, 64, 64, dtype=torch.float64), **TINY)
    with pytest.raises(ValueError, match="not Flowformer weights"):
        checkpoint_filter_fn({key: v for key, v in p.weights.items() if "gamma" not in key}, model)
    with pytest.raises(ValueError, match="250 tokens"):
        checkpoint_filter_fn({**p.weights, "pos_embed": torch.zeros(1, 250, 12)}, model)
