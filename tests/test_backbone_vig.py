"""ViG: counts, timm's contract, published weights of both layouts."""

import pytest
import timm
import torch
import torch.nn.functional as F
from published import Published
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import cfg
from vision_attn.backbones.vig import ViG, checkpoint_filter_fn

COUNTS = {
    "vig_tiny": 5_834_536,
    "vig_small": 22_615_144,
    "vig_base": 89_022_184,
    "vig_h_tiny": 28_600_680,
    "vig_h_small": 50_051_688,
    "vig_h_base": 88_904_360,
}
TINY = {
    "tiny_vig": {"dims": (24,) * 4, "depths": (1, 2, 1, 1), "num_heads": (3,) * 4, "conv_act": True, "out_act": True},
    "tiny_vig_h": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "isotropic": False},
}
default_cfgs = generate_default_cfgs(
    {"tiny_vig.untrained": cfg(pool_size=(14, 14)), "tiny_vig_h.untrained": cfg()},
)
register_variants(globals(), ViG, TINY, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="vig")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vig_tiny", "vig_h_tiny"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    check(name)


def scan(q, k, v, decay):
    """One direction, token by token; `[batch, tokens, heads, dim]`."""
    state, out = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=v.dtype), []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, None] @ state)[:, :, 0] / q.shape[-1] ** 0.5)
    return torch.stack(out, 1)


def mixer(p, at, x, heads, act):
    """x is `[batch, channels, height, width]`."""
    c = x.shape[1]
    local = p.conv(f"{at}in_proj.0", x, c, 3, padding=1, groups=c, bias=False)
    local = (F.silu(local) if act else local).flatten(2).mT
    q, k, v = p.linear(f"{at}qkv_proj", local, 2 * c, bias=False).split([c // 2, c // 2, c], -1)
    low = p.linear(f"{at}gk_proj.0", local, 16, bias=False)
    decay = p.linear(f"{at}gk_proj.1", low, c).sigmoid() ** (1 / 16)
    q, k, v, ahead, back = (t.unflatten(-1, (heads, -1)) for t in (q, k, v, *decay.chunk(2, -1)))
    there = scan(*(t.flip(1) for t in (q, k, v, back))).flip(1)
    out = p.rms(f"{at}g_norm", (scan(q, k, v, ahead) + there) / 2)
    gate = p.linear(f"{at}g_proj", local, c).sigmoid().unflatten(-1, (heads, -1))
    out = (out * gate + p.rms(f"{at}l_norm", local.unflatten(-1, (heads, -1))) * (1 - gate)).flatten(2)
    return p.linear(f"{at}o_proj", F.silu(out) if act else out, c, bias=False)


def mlp(p, first, second, x, multiple):
    c = x.shape[-1]
    hidden = multiple * -(-int(c * 8 / 3) // multiple)
    gate, up = p.linear(first, x, 2 * hidden, bias=False).chunk(2, -1)
    return p.linear(second, F.silu(gate) * up, c, bias=False)


def isotropic(p, image, dims, depths, num_heads, conv_act, out_act):
    x = p.conv("patch_embed.proj.0", image, dims[0] // 2, 9, stride=8, padding=1)
    x = F.silu(p.norm2d("patch_embed.proj.1", x, 1e-5))
    x = p.norm2d("patch_embed.proj.4", p.conv("patch_embed.proj.3", x, dims[0], 3, stride=2, padding=1), 1e-5)
    size, x = x.shape[2:], x.flatten(2).mT
    x = x + p("pos_embed", 1, x.shape[1], dims[0])
    for i in range(sum(depths)):
        at = f"blocks.{i}."
        y = p.rms(f"{at}attn_norm", x).mT.unflatten(2, size)
        x = x + mixer(p, f"{at}attn.", y, num_heads[0], True)
        x = x + mlp(p, f"{at}mlp.gate_proj", f"{at}mlp.down_proj", p.rms(f"{at}mlp_norm", x), 256)
    return p.linear("head", p.rms("norm", x).mean(1), 1000)


def hierarchical(p, image, dims, depths, num_heads, isotropic):
    x = F.gelu(p.norm2d("patch_embed.2", p.conv("patch_embed.0", image, dims[0] // 2, 3, 2, 1), 1e-5))
    x = p.norm2d("patch_embed.7", p.conv("patch_embed.5", x, dims[0], 3, 2, 1), 1e-5)
    for i, depth in enumerate(depths):
        for j in range(depth):
            at, size = f"layers.{i}.blocks.{j}.", x.shape[2:]
            x = x + mixer(p, f"{at}op.", p.norm2d(f"{at}norm", x, 1e-5), num_heads[i], False).mT.unflatten(2, size)
            y = p.norm2d(f"{at}norm2", x, 1e-5).movedim(1, -1)
            x = x + mlp(p, f"{at}mlp.fc1", f"{at}mlp.fc2", y, 32).movedim(-1, 1)
        if i < 3:
            down = f"layers.{i}.downsample."
            x = p.norm2d(f"{down}3", p.conv(f"{down}1", x, dims[i + 1], 3, 2, 1), 1e-5)
    return p.linear("classifier.head", p.norm2d("classifier.norm", x, 1e-5).mean((2, 3)), 1000)


@pytest.mark.parametrize("name, released", [("tiny_vig", isotropic), ("tiny_vig_h", hierarchical)])
@torch.no_grad()
def test_published_weights_give_the_published_output(name, released):
    p, image = Published(), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = released(p, image, **TINY[name])
    model = timm.create_model(name, img_size=48).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": p.weights}, model))
    torch.testing.assert_close(model(image), expected)
    again = checkpoint_filter_fn(model.state_dict(), model)  # our own names pass
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    some = dict(p.weights)
    del some[next(key for key in some if "g_norm" in key)]
    with pytest.raises(ValueError, match="1 are missing"):
        checkpoint_filter_fn(some, model)


def test_weights_of_the_other_layout_are_refused():
    p = Published()
    with torch.no_grad():
        isotropic(p, torch.randn(1, 3, 32, 32, dtype=torch.float64), **TINY["tiny_vig"])
    with pytest.raises(ValueError, match="not ViG weights"):
        checkpoint_filter_fn(p.weights, timm.create_model("tiny_vig_h"))
