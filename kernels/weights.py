"""Neighborhood attention in two halves: the scores of every query's window, and a weighted sum over it.

For models that do more to the weights than a softmax, or make them in another way (dynamic convolutions). Slot t of a
query is key number t of its own window, row-major, so there are `prod(window)` weights per query and head.

Scores, weighted sum and its transpose are each other's gradients.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .bands import Chunk, chunks
from .patterns import Neighborhood
from .patterns.base import along
from .problem import DTYPES, check_bias, check_scale


def scores(
    q: Tensor, k: Tensor, pattern: Neighborhood, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Scores of every query with the keys of its window: `scale * <q, k> + bias`, before any softmax.

    Args:
        q: `[batch, *grid, heads, head_dim]`, grid of one to three axes.
        k: `[batch, *grid, kv_heads, head_dim]`; query head `h` reads KV head `h // (heads / kv_heads)`.
        pattern: `Neighborhood`, with any of its options.
        scale: factor on the products, above 0; `head_dim ** -0.5` when None.
        bias: relative positions, `[heads, *(2 * window - 1)]`: per axis, entry `key - query + window - 1`, distances in
            steps of the dilation.

    Returns:
        `[batch, *grid, heads, prod(window)]` in the dtype of q, sums in float32 at least. On a causal axis the first
        queries have fewer keys than slots, and with a stride some others too: those slots are minus infinity.

    Raises:
        TypeError, ValueError: arguments that do not fit together, or a pattern that does not fit the grid.

    >>> from vision_attn import Neighborhood
    >>> q, k, v = torch.randn(3, 1, 16, 16, 4, 32)
    >>> weights = scores(q, k, Neighborhood(5)).softmax(-1)
    >>> weights.shape, apply(weights, v, Neighborhood(5)).shape
    (torch.Size([1, 16, 16, 4, 25]), torch.Size([1, 16, 16, 4, 32]))

    Papers: Neighborhood Attention Transformer; OverLoCK: An Overview-first-Look-Closely-next ConvNet with
    Context-Mixing Dynamic Kernels.
    """
    grid = _check(pattern, ("q", q), ("k", k))
    check_scale(scale)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"head_dim differs: q has {q.shape[-1]}, k has {k.shape[-1]}")
    table = None
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
        check_bias(pattern, grid, q.shape[-2], tuple(bias.shape))
        if bias.dtype != q.dtype or bias.device != q.device:
            raise ValueError(
                f"bias is {bias.dtype} on {bias.device} but q is {q.dtype} on {q.device}; they must be alike"
            )
        table = _table(bias, along(pattern, "window", len(grid)))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.vision_attn.window_scores(q, k, table, pattern.spell(), scale, -math.inf)


def apply(weights: Tensor, v: Tensor, pattern: Neighborhood) -> Tensor:
    """Sum of the values of every query's window, times given weights; the other half of `scores`.

    Args:
        weights: `[batch, *grid, heads, prod(window)]`, slots as in `scores`. They need not sum to 1; slots that do not
            exist are ignored, whatever they hold.
        v: `[batch, *grid, kv_heads, value_dim]`; head `h` reads KV head `h // (heads / kv_heads)`.
        pattern: `Neighborhood`, with any of its options.

    Returns:
        `[batch, *grid, heads, value_dim]` in the dtype of v, sums in float32 at least.

    Raises:
        TypeError, ValueError: arguments that do not fit together, or a pattern that does not fit the grid.

    >>> from vision_attn import Neighborhood
    >>> v = torch.arange(5.0).view(1, 5, 1, 1)
    >>> apply(torch.tensor([0.0, 0.0, 1.0]).expand(1, 5, 1, 3), v, Neighborhood(3)).flatten().tolist()
    [2.0, 2.0, 3.0, 4.0, 4.0]
    """
    grid = _check(pattern, ("weights", weights), ("v", v))
    keys = math.prod(along(pattern, "window", len(grid)))
    if weights.shape[-1] != keys:
        raise ValueError(f"weights have {weights.shape[-1]} slots but the windows of {pattern} have {keys} keys")
    return torch.ops.vision_attn.window_sum(weights, v, pattern.spell(), 1.0)


def _check(pattern: Neighborhood, *tensors: tuple[str, Tensor]) -> tuple[int, ...]:
    """What both halves ask of a tensor per query and one per key; returns the grid."""
    if not isinstance(pattern, Neighborhood):
        raise TypeError(f"pattern must be a Neighborhood, for example Neighborhood(window=7); got {pattern!r}")
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    (name, a), (other, b) = tensors
    if a.dtype != b.dtype:
        raise TypeError(f"{name} is {a.dtype} but {other} is {b.dtype}; cast them to one dtype")
    if a.device != b.device:
        raise ValueError(f"{name} is on {a.device} but {other} is on {b.device}; move them to one device")
    if not 4 <= a.ndim <= 6:
        raise ValueError(f"{name} must be [batch, *grid, heads, size] with 1 to 3 grid axes; got {list(a.shape)}")
    if a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"batch and grid differ: {name} is {list(a.shape)}, {other} is {list(b.shape)}")
    heads, kv_heads = a.shape[-2], b.shape[-2]
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{name} has {heads} heads and {other} has {kv_heads}; the first must be a multiple of the second"
        )
    if not a.shape[-1] or not b.shape[-1]:
        raise ValueError(f"the last size must be at least 1; {name} is {list(a.shape)}, {other} is {list(b.shape)}")
    grid = tuple(a.shape[1:-2])
    pattern.check(grid)
    return grid


def _chunks(text: str, x: Tensor, heads: int, exact: bool = False) -> Iterator[tuple[slice, Chunk]]:
    """For tensors on the grid of x that have its last size."""
    return chunks(_read(text), tuple(x.shape[1:-2]), len(x), heads, x.shape[-1], x.device, exact)


def _dense(weights: Tensor, x: Tensor, text: str, kv_heads: int) -> Iterator[tuple[slice, Chunk, Tensor]]:
    """Chunks with their weights as a matrix `[batch * rows * kv_heads, heads / kv_heads * queries, union]`, to be
    multiplied with x."""
    heads, full = weights.shape[-2], torch.promote_types(x.dtype, torch.float32)
    # 0 times NaN is NaN: what is not finite must not stand in a union. A sum tells that all is finite.
    finite = bool(x.sum(dtype=torch.float64).isfinite())
    flat, dense, last = weights.flatten(1, -3), None, None
    for batch, chunk in _chunks(text, x, heads, not finite):
        slots = chunk.slots(flat[batch], full)
        shape = (slots.shape[0] * len(chunk.query) * kv_heads, heads // kv_heads * slots.shape[2], chunk.key.shape[1])
        if chunk.sides is not last or dense.shape != shape:  # else the band covers what was there before
            dense, last = slots.new_zeros(shape), chunk.sides
        band = chunk.band(dense, heads)
        band.copy_(slots.reshape(band.shape))
        yield batch, chunk, dense


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


@functools.lru_cache(maxsize=256)
def _read(text: str) -> Neighborhood:
    return Neighborhood(**ast.literal_eval(text)[1])


def _keys(text: str, rank: int) -> int:
    return math.prod(along(_read(text), "window", rank))


def _table(bias: Tensor, window: tuple[int, ...]) -> Tensor:
    """`[prod(window), heads, prod(window)]`: the biases of a window whose first key is entry 0, 1, ... of the bias."""
    rank = len(window)
    for i, w in enumerate(window):
        bias = bias.unfold(i + 1, w, 1)
    return bias.flatten(1 + rank).flatten(1, rank).transpose(0, 1)


@functools.lru_cache(maxsize=64)
def _rows_of_table(text: str, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """`[tokens]`: which row of the table each query takes."""
    pattern, rows = _read(text), torch.zeros(1, dtype=torch.long, device=device)
    for axis, window in zip(pattern.axes(grid), along(pattern, "window", len(grid)), strict=True):
        starts = torch.tensor([axis.lo[p] - p + window - 1 for p in axis.places], device=device)
        rows = (rows[:, None] * window + starts).flatten()
    return rows


@torch.library.custom_op("vision_attn::window_scores", mutates_args=())
def _scores(q: Tensor, k: Tensor, table: Tensor | None, pattern: str, scale: float, absent: float) -> Tensor:
    heads, kv_heads, full = q.shape[-2], k.shape[-2], torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:-1], _keys(pattern, q.ndim - 3))
    rows = None if table is None else _rows_of_table(pattern, tuple(q.shape[1:-2]), q.device)
    flat, query, key = out.flatten(1, -3), q.flatten(1, -3), k.flatten(1, -3)
    for batch, chunk in _chunks(pattern, q, heads):
        part = _product(
            chunk.by_head(query[batch], chunk.query, kv_heads, full) * scale,
            chunk.by_head(key[batch], chunk.key, kv_heads, full).mT,
        )
        part = chunk.band(part, heads).flatten(-len(chunk.windows)).flatten(2, -3)
        if rows is not None:
            part = part + table.index_select(0, rows[chunk.query].flatten()).view(part.shape[1:])
        if chunk.absent is not None:
            part = part.masked_fill(chunk.absent, absent)
        flat[batch].index_copy_(1, chunk.query.flatten(), part.flatten(1, 2).to(out.dtype))
    return out


@torch.library.custom_op("vision_attn::window_sum", mutates_args=())
def _sum(weights: Tensor, v: Tensor, pattern: str, scale: float) -> Tensor:
    heads, kv_heads, value = weights.shape[-2], v.shape[-2], v.flatten(1, -3)
    out = v.new_empty(*weights.shape[:-1], v.shape[-1])
    flat = out.flatten(1, -3)
    for batch, chunk, dense in _dense(weights, v, pattern, kv_heads):
        part = _product(dense, chunk.by_head(value[batch], chunk.key, kv_heads, dense.dtype)) * scale
        part = chunk.by_token(part, chunk.query.shape[1], heads)
        flat[batch].index_copy_(1, chunk.query.flatten(), part.to(out.dtype))
    return out


@torch.library.custom_op("vision_attn::window_spread", mutates_args=())
def _spread(weights: Tensor, x: Tensor, pattern: str, scale: float, kv_heads: int) -> Tensor:
    """The transpose of `window_sum`: every query gives its x to the keys of its window."""
    query, full = x.flatten(1, -3), torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(*x.shape[:-2], kv_heads, x.shape[-1], dtype=full)
    flat = out.flatten(1, -3)
    for batch, chunk, dense in _dense(weights, x, pattern, kv_heads):
        part = _product(dense.mT, chunk.by_head(query[batch], chunk.query, kv_heads, full)) * scale
        flat[batch].index_add_(1, chunk.key.flatten(), chunk.by_token(part, chunk.key.shape[1], kv_heads))
    return out.to(x.dtype)


@torch.library.custom_op("vision_attn::window_bias", mutates_args=())
def _bias(weights: Tensor, pattern: str) -> Tensor:
    """The transpose of adding the table to the scores."""
    heads, keys = weights.shape[-2:]
    rows = _rows_of_table(pattern, tuple(weights.shape[1:-2]), weights.device)
    full, flat = torch.promote_types(weights.dtype, torch.float32), weights.flatten(1, -3)
    out = weights.new_zeros(keys, heads, keys, dtype=full)
    for batch, chunk in _chunks(pattern, weights[..., :1], heads):
        slots = chunk.slots(flat[batch], full)
        out.index_add_(0, rows[chunk.query].flatten(), slots.sum(0).flatten(0, 1))
    return out.to(weights.dtype)


@_scores.register_fake
def _(q, k, table, pattern, scale, absent):
    return q.new_empty(*q.shape[:-1], _keys(pattern, q.ndim - 3))


@_sum.register_fake
def _(weights, v, pattern, scale):
    return v.new_empty(*weights.shape[:-1], v.shape[-1])


@_spread.register_fake
def _(weights, x, pattern, scale, kv_heads):
    return x.new_empty(*x.shape[:-2], kv_heads, x.shape[-1])


@_bias.register_fake
def _(weights, pattern):
    heads, keys = weights.shape[-2:]
    return weights.new_empty(keys, heads, keys)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))
    ctx.options = tuple(t for t in inputs if t is not None and not isinstance(t, Tensor))


def _scores_backward(ctx, grad):
    (q, k, *_), (pattern, scale, _), need = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
    ops = torch.ops.vision_attn
    by_q = ops.window_sum(grad, k, pattern, scale) if need[0] else None
    by_k = ops.window_spread(grad, q, pattern, scale, k.shape[-2]) if need[1] else None
    return by_q, by_k, ops.window_bias(grad, pattern) if need[2] else None, None, None, None


def _sum_backward(ctx, grad):
    (weights, v), (pattern, scale), need = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
    ops = torch.ops.vision_attn
    by_weights = ops.window_scores(grad, v, None, pattern, scale, 0.0) if need[0] else None
    return by_weights, ops.window_spread(weights, grad, pattern, scale, v.shape[-2]) if need[1] else None, None, None


def _spread_backward(ctx, grad):
    (weights, x), (pattern, scale, _), need = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
    ops = torch.ops.vision_attn
    by_weights = ops.window_scores(x, grad, None, pattern, scale, 0.0) if need[0] else None
    return by_weights, ops.window_sum(weights, grad, pattern, scale) if need[1] else None, None, None, None


def _bias_backward(ctx, grad):
    (weights,), (pattern,) = ctx.saved_tensors, ctx.options
    nothing = weights[..., :0]
    return torch.ops.vision_attn.window_scores(nothing, nothing, grad, pattern, 1.0, 0.0), None


for _op, _backward in (
    (_scores, _scores_backward),
    (_sum, _sum_backward),
    (_spread, _spread_backward),
    (_bias, _bias_backward),
):
    _op.register_autograd(_backward, setup_context=_save)
