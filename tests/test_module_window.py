"""Window attention with a dense mask over the whole map, in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")

from vision_attn.modules.window import WindowAttention2d


def windowed(layer, x, cut=None):
    """The layer with a mask over all pairs; `cut` is the window per axis, if not that of the layer."""
    height, width = x.shape[1:3]
    window, shift = cut or (layer.window,) * 2, [layer.shift if n > layer.window else 0 for n in (height, width)]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    tall, wide = x.shape[1:3]
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).unflatten(-1, (3, layer.num_heads, -1)).flatten(1, 2).unbind(2)
    y, z = torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
    y, z = y.flatten(), z.flatten()
    # a cut lies `shift` tokens in, and then every `window` tokens
    same = (y - shift[0]).div(window[0], rounding_mode="floor")[:, None] == (y - shift[0]).div(
        window[0], rounding_mode="floor"
    )
    same &= (z - shift[1]).div(window[1], rounding_mode="floor")[:, None] == (z - shift[1]).div(
        window[1], rounding_mode="floor"
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if layer.relative_position_bias_table is not None:
        reach = 2 * layer.window - 1
        dy, dz = y[:, None] - y + layer.window - 1, z[:, None] - z + layer.window - 1
        inside = (dy >= 0) & (dy < reach) & (dz >= 0) & (dz < reach)
        bias = layer.relative_position_bias_table[(reach * dy + dz).where(inside, 0)]
        scores = scores + bias.permute(2, 0, 1)
    weights = scores.masked_fill(~same, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ layer.proj.weight.T + layer.proj.bias
    return out.unflatten(1, (tall, wide))[:, :height, :width]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"shift": 2}, {"rel_pos_bias": False, "small_map": "pad"}])
@pytest.mark.parametrize("grid", [(12, 8), (11, 5), (13, 9), (4, 4)])
@torch.no_grad()
def test_layer(grid, options, fused):
    torch.manual_seed(0)
    layer = WindowAttention2d(12, 3, window=4, **options).double()
    for p in layer.parameters():
        p.normal_()
    layer.fused_attn = fused
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), windowed(layer, x))


@pytest.mark.parametrize("grid", [(3, 3), (3, 9), (1, 7), (9, 2)])
@torch.no_grad()
def test_small_maps(grid):
    torch.manual_seed(0)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    layer = WindowAttention2d(12, 3, window=4, shift=1).double()
    torch.testing.assert_close(layer(x), windowed(layer, x, [min(4, n) for n in grid]))
    layer = WindowAttention2d(12, 3, window=4, rel_pos_bias=False, small_map="pad").double()
    torch.testing.assert_close(layer(x), windowed(layer, x))


def test_scripts_and_trains():
    layer = WindowAttention2d(12, 3, window=4, shift=2)
    x = torch.randn(2, 7, 9, 12)
    layer(x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shift": 4}, "shift from 0 to window - 1"),
        ({"window": 0}, "at least 1"),
        ({"small_map": "crop"}, "'crop'; allowed"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        WindowAttention2d(12, 3, **{"window": 4, **options})
