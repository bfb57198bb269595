"""Attention of TransNeXt: token by token from the formula, on maps of all shapes."""

import itertools
import math

import pytest
import torch
from timm.layers import set_fused_attn, use_fused_attn

from vision_attn.modules.aggregated import AggregatedAttention, CosineAttention, distances

HEADS, DIM = 2, 12
D = DIM // HEADS
GRIDS = [(7, 5), (1, 1), (1, 9), (4, 8), (6, 3)]


def centers(size, cells):
    """Mean coordinate of the tokens of every cell of an adaptive pool."""
    return [
        sum(members) / len(members)
        for members in (range(c * size // cells, -(-(c + 1) * size // cells)) for c in range(cells))
    ]


def position_bias(layer, query, key):
    """For one pair of (row, column) coordinates: one number per head."""
    unit = [max(side - 1, 1) / 8 for side in layer.trained_grid]
    steps = [(a - b) / u for a, b, u in zip(query, key, unit, strict=True)]
    logs = [math.copysign(math.log2(abs(s) + 1) / math.log2(8), s) if s else 0.0 for s in steps]
    return layer.cpb_fc2(layer.cpb_fc1(torch.tensor(logs, dtype=torch.float64)).relu())


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def expected(layer, x):
    """The definition, for one image `[height, width, dim]`, before the projection: `[height, width, heads, D]`."""
    h, w, _ = x.shape
    pooled_tokens, coordinates = [], list(itertools.product(range(h), range(w)))
    if isinstance(layer, AggregatedAttention):
        q = layer.q(x).view(h, w, HEADS, D)
        k, v = layer.kv(x).view(h, w, 2, HEADS, D).unbind(2)
        rows, columns = max(h // layer.reduction, 1), max(w // layer.reduction, 1)
        reduced = torch.nn.functional.gelu(x @ layer.sr.weight[:, :, 0, 0].T + layer.sr.bias)
        for a, b in itertools.product(range(rows), range(columns)):
            cell = reduced[a * h // rows : -(-(a + 1) * h // rows), b * w // columns : -(-(b + 1) * w // columns)]
            pooled_tokens.append(layer.norm(cell.mean((0, 1))))
        pooled_k, pooled_v = layer.kv(torch.stack(pooled_tokens)).view(-1, 2, HEADS, D).unbind(1)
        where = list(itertools.product(centers(h, rows), centers(w, columns)))
    else:
        q, pooled_k, pooled_v = layer.qkv(x).view(h * w, 3, HEADS, D).unbind(1)
        q, where = q.view(h, w, HEADS, D), coordinates
    out = torch.zeros(h, w, HEADS, D, dtype=x.dtype)
    for y, z in coordinates:
        near = [(i, y + i // 3 - 1, z + i % 3 - 1) for i in range(9)]
        near = [n for n in near if 0 <= n[1] < h and 0 <= n[2] < w] if pooled_tokens else []
        bias = torch.stack([position_bias(layer, (y, z), place) for place in where])
        for m in range(HEADS):
            direction = unit(q[y, z, m])
            scaled = (direction + layer.query_embedding[m, 0]) * math.log(len(near) + len(where))
            scaled = scaled * math.log(1 + math.exp(layer.temperature[m]))
            scores = [scaled @ unit(k[a, b, m]) + layer.relative_pos_bias_local[m, i] for i, a, b in near]
            scores += [scaled @ unit(pooled_k[j, m]) + bias[j, m] for j in range(len(where))]
            weights = torch.stack(scores).softmax(0)
            for n, (i, a, b) in enumerate(near):
                more = direction @ layer.learnable_tokens[m, :, i] + layer.learnable_bias[m, 0, i]
                out[y, z, m] += (weights[n] + more) * v[a, b, m]
            out[y, z, m] += weights[len(near) :] @ pooled_v[:, m]
    return out


def build(reduction, fused=True, **options):
    torch.manual_seed(0)
    was = use_fused_attn()
    try:
        set_fused_attn(fused)
        if reduction == 1:
            layer = CosineAttention(DIM, HEADS, (7, 5), **options).double()
        else:
            layer = AggregatedAttention(DIM, HEADS, (7, 5), reduction=reduction, **options).double()
    finally:
        set_fused_attn(was)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "learnable" in name or "relative" in name or "embedding" in name:
                p.normal_()
    return layer


@pytest.mark.parametrize("reduction", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_output_is_that_of_the_definition(reduction, grid):
    layer = build(reduction)
    x = torch.randn(2, *grid, DIM, dtype=torch.float64)
    out = torch.stack([expected(layer, image) for image in x])
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)))
    torch.testing.assert_close(build(reduction, fused=False)(x), layer(x))


@pytest.mark.parametrize("reduction", [1, 2])
@torch.no_grad()
def test_heads_are_gated_by_the_router(reduction):
    layer = build(reduction, shared_heads=0, routed_heads=1)
    x = torch.randn(1, 5, 4, DIM, dtype=torch.float64)
    out = expected(layer, x[0])[None] * layer.router(x)[..., None]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)))


@pytest.mark.parametrize("reduction", [1, 2])
def test_gradients_and_half_precision(reduction):
    layer = build(reduction, shared_heads=1, routed_heads=1)
    x = torch.randn(1, 3, 2, DIM, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    unused = [name for name, p in layer.named_parameters() if not p.grad.abs().sum() and "wg.weight" not in name]
    assert not unused  # one routed head of one: its gate is always 1
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)
    for dtype in (torch.float16, torch.bfloat16):
        out = layer.to(dtype)(torch.randn(1, 32, 48, DIM, dtype=dtype))
        assert out.dtype == dtype and out.isfinite().all()


def test_few_distances_are_computed():
    table, index = distances(torch.zeros(1, 56, 56, 1), 7, 7, (56, 56))
    assert table.shape == (104**2, 2) and index.shape == (56 * 56, 49)


def test_errors():
    with pytest.raises(ValueError, match="reduction is 0"):
        AggregatedAttention(12, 2, (7, 7), reduction=0)
    with pytest.raises(ValueError, match="5 heads"):
        CosineAttention(12, 5, (7, 7))
