"""iLLaMA: counts, timm's contract, published weights, the mask after the softmax."""

import pytest
import timm
import torch
import torch.nn.functional as F
from published import Published
from timm.models import generate_default_cfgs
from timm.models._features_fx import FeatureGraphNet
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.illama import ILLaMA, _create, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg

COUNTS = {
    "illama_tiny": 5_701_096,
    "illama_small": 22_018_024,
    "illama_base": 86_502_376,
    "illama_large": 310_445_032,
}
TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}
default_cfgs = generate_default_cfgs(
    {"tiny_illama.untrained": cfg(first_conv="patch_embed.proj", classifier="head", pool_size=None)}
)
register_variants(globals(), ILLaMA, {"tiny_illama": TINY}, checkpoint_filter_fn, build=_create)
# nodes of a graph hold the class token too, so that features by fx have one token more; see test_fx
REST = [check for check in CHECKS if check.__name__ != "fx"]


def test_every_name_is_counted():
    assert set(timm.list_models(module="illama")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", REST, ids=lambda check: check.__name__)
def test_contract(check):
    check("tiny_illama")


@pytest.mark.slow
@pytest.mark.parametrize("check", REST, ids=lambda check: check.__name__)
def test_contract_of_a_published_size(check):
    check("illama_tiny")


def test_fx():
    image = torch.randn(2, 3, 96, 96)
    model = timm.create_model("tiny_illama").eval()
    plain = model.forward_intermediates(image, intermediates_only=True)
    graph = FeatureGraphNet(model, out_indices=(0, 1, 2))
    for tokens, y in zip(graph(image), plain, strict=True):
        torch.testing.assert_close(tokens[:, 1:].mT.unflatten(2, (6, 6)), y)
    graph = FeatureGraphNet(timm.create_model("tiny_illama"), out_indices=(0, 1, 2)).train()
    sum(y.mean() for y in graph(image)).backward()
    assert all(p.grad is not None for p in graph.parameters())


def released(p, image, embed_dim, depth, num_heads, soft_mask=0.0):
    """The class token comes last, as published."""
    x = p.conv("patch_embed.proj", image, embed_dim, 16, stride=16).flatten(2).mT
    x = torch.cat([x, p("cls_token", 1, 1, embed_dim).expand(len(x), -1, -1)], 1)
    n, d = x.shape[1], embed_dim // num_heads
    x = x + p("pos_embed", 1, n, embed_dim)
    speed = torch.tensor([10000 ** (-2 * c / d) for c in range(d // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(n, d // 2, dtype=torch.float64), torch.arange(n)[:, None] * speed)
    for i in range(depth):
        at = f"blocks.{i}."
        qkv = p.linear(f"{at}attn.qkv", p.rms(f"{at}norm1", x), 3 * embed_dim).view(*x.shape[:2], 3, num_heads, d)
        heads = []
        for h in range(num_heads):
            q, k, v = qkv[:, :, :, h].unbind(2)
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(2) for t in (q, k)
            )
            weights = (q @ k.mT / d**0.5).softmax(-1)
            heads.append((weights.tril() + soft_mask * weights.triu(1)) @ v)
        x = x + p.linear(f"{at}attn.proj", torch.cat(heads, -1), embed_dim)
        y, hidden = p.rms(f"{at}norm2", x), -(-int(8 * embed_dim / 3) // 256) * 256
        y = F.silu(p.linear(f"{at}mlp.fc1", y, hidden, bias=False)) * p.linear(f"{at}mlp.fc3", y, hidden, bias=False)
        x = x + p.linear(f"{at}mlp.fc2", y, embed_dim, bias=False)
    return p.linear("head", p.rms("norm", x)[:, -1], 1000)


@pytest.mark.parametrize("soft_mask", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_published_weights_give_the_published_output(soft_mask):
    p, image = Published(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = released(p, image, **TINY, soft_mask=soft_mask)
    model = ILLaMA(**TINY, img_size=64).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": p.weights}, model))
    model.set_soft_mask(soft_mask)
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-6)  # rotary angles are float32
    again = checkpoint_filter_fn(model.state_dict(), model)  # our own names pass
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    bare = ILLaMA(**TINY, img_size=64, num_classes=0)
    bare.load_state_dict(checkpoint_filter_fn(p.weights, bare))
    other = ILLaMA(**TINY, img_size=96)  # the table is resampled, the class token's row is not
    table = checkpoint_filter_fn(p.weights, other)["pos_embed"]
    assert table.shape == (1, 37, 24) and torch.equal(table[:, 0], p.weights["pos_embed"][:, -1])


@torch.no_grad()
def test_a_later_patch_reaches_an_earlier_one_only_through_the_divisor():
    attention = ILLaMA(**TINY).blocks[0].attn
    v = torch.zeros(1, 17, 24)
    v[:, 12] = 1.0
    attention.qkv.weight.zero_()
    attention.qkv.bias.zero_()
    attention.qkv.weight[48:].copy_(torch.eye(24))
    attention.proj.weight.copy_(torch.eye(24))
    seen = attention(v)[0, :, 0]  # uniform weights of 1 / 17
    expected = torch.tensor([1.0] + [0.0] * 11 + [1.0] * 5) / 17  # the class token is the first, and last in the order
    torch.testing.assert_close(seen, expected)


def test_errors():
    model = ILLaMA(**TINY)
    with pytest.raises(ValueError, match="0 to 1"):
        model.set_soft_mask(1.5)
    with pytest.raises(ValueError, match="not iLLaMA weights"):
        checkpoint_filter_fn(timm.create_model("vit_tiny_patch16_224").state_dict(), timm.create_model("illama_tiny"))
