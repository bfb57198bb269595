"""Attention over gathered chunks: forward and backward in bounded memory.

A chunk names, by token number, some rows of queries and for each row the keys it needs. The forward gathers them, runs
one small attention and writes the rows; the backward gathers and recomputes, so that only the inputs live between the
two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of an attention call.

    `query` `[rows, Q]` and `key` `[rows, U]` hold token numbers; for one batch and head a query is in one chunk only.
    `allowed` is bool `[rows or 1, Q, U]`, or None when everything is. `batch`, `heads` and `kv_heads` say which part of
    the tensors is meant.
    """

    query: torch.Tensor
    key: torch.Tensor
    allowed: torch.Tensor | None
    batch: slice
    heads: slice
    kv_heads: slice


@dataclasses.dataclass(frozen=True)
class Options:
    """`extra` tokens stand at the end of k and v, for every query. `may_be_empty` guards rows that see nothing."""

    scale: float
    extra: int
    lse: bool
    may_be_empty: bool = False


Source = Callable[[], Iterator[Chunk]]


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra_mask: torch.Tensor | None,
    chunks: Source,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q `[batch, tokens, heads, dim]`, k and v `[batch, tokens + extra, kv_heads, dim]` to out and lse of all
    tokens."""
    out, lse = _Recompute.apply(q, k, v, extra_mask, chunks, options)
    return out, lse if options.lse else None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, extra_mask, chunks, options):
        ctx.save_for_backward(q, k, v, extra_mask)
        ctx.chunks, ctx.options = chunks, options
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        full = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:-1] if options.lse else (0,), float("-inf"), dtype=full, device=q.device)
        for chunk in chunks():
            part, part_lse = _attend(*_gather(q, k, v, chunk, options), chunk, extra_mask, options)
            _put(out, chunk, part)
            if options.lse:
                _put(lse, chunk, part_lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, extra_mask = ctx.saved_tensors
        return *gradients(q, k, v, extra_mask, ctx.chunks, ctx.options, grad_out, grad_lse), None, None, None


def gradients(q, k, v, extra_mask, chunks: Source, options: Options, grad_out, grad_lse) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v of `attend_chunks`; `grad_lse` is ignored unless the options ask for lse."""
    full = torch.promote_types(q.dtype, torch.float32)
    grads = [torch.zeros(t.shape, dtype=full, device=t.device) for t in (q, k, v)]
    for chunk in chunks():

        def part(*gathered, chunk=chunk):
            out, lse = _attend(*gathered, chunk, extra_mask, options)
            return (out, lse) if options.lse else (out,)

        # torch.func and not autograd.grad: it also works inside a registered operator, where autograd is switched off.
        outputs, pull = torch.func.vjp(part, *_gather(q, k, v, chunk, options))
        outer = zip((grad_out, grad_lse), outputs, strict=False)
        by_query, *by_key = pull(tuple(_take(g, chunk.batch, chunk.heads, chunk.query).to(o.dtype) for g, o in outer))
        _put(grads[0], chunk, by_query)
        keys = _with_extra(chunk.key, q.shape[1], options.extra).flatten()
        for grad, by in zip(grads[1:], by_key, strict=True):
            grad[chunk.batch, :, chunk.kv_heads].index_add_(1, keys, by.to(full))
    return tuple(g.to(q.dtype) for g in grads)


def _take(tensor: torch.Tensor, batch: slice, heads: slice, index: torch.Tensor) -> torch.Tensor:
    return tensor[batch, :, heads].index_select(1, index.flatten())


def _put(tensor: torch.Tensor, chunk: Chunk, part: torch.Tensor) -> None:
    tensor[chunk.batch, :, chunk.heads].index_copy_(1, chunk.query.flatten(), part.to(tensor.dtype))


def _with_extra(key: torch.Tensor, tokens: int, extra: int) -> torch.Tensor:
    """`[rows, U + extra]`: the extra tokens stand after the tokens of the grid."""
    if not extra:
        return key
    return torch.cat([key, torch.arange(tokens, tokens + extra, device=key.device).expand(len(key), -1)], 1)


def _gather(q, k, v, chunk: Chunk, options: Options) -> list[torch.Tensor]:
    """`[batch, rows * Q, heads, dim]`, and keys and values `[batch, rows * (U + extra), kv_heads, dim]`."""
    keys = _with_extra(chunk.key, q.shape[1], options.extra)
    parts = [
        _take(q, chunk.batch, chunk.heads, chunk.query),
        _take(k, chunk.batch, chunk.kv_heads, keys),
        _take(v, chunk.batch, chunk.kv_heads, keys),
    ]
    # CPU products of half floats are slow, and round the sums; a chunk is small enough to widen.
    return [t.float() for t in parts] if q.device.type == "cpu" and q.dtype.itemsize == 2 else parts


def _attend(q, k, v, chunk: Chunk, extra_mask, options: Options):
    """One small attention. Returns out `[batch, rows * Q, heads, dim]` and lse `[batch, rows * Q, heads]`, or None."""
    batch, rows, heads, kv_heads = q.shape[0], len(chunk.query), q.shape[2], k.shape[2]
    group, length = heads // kv_heads, chunk.query.shape[1]
    # to [batch * rows, kv_heads, group * Q, dim]: the query heads of a KV head become more rows
    query = q.view(batch * rows, length, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key, value = (t.view(batch * rows, -1, kv_heads, t.shape[-1]).transpose(1, 2) for t in (k, v))
    allowed = _allowed(chunk, extra_mask, batch, options.extra)
    some = None
    if allowed is not None:
        if options.may_be_empty:  # such a row attends to everything, and is then multiplied by 0
            some = allowed.any(-1, keepdim=True)
            allowed = allowed | ~some
        bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
        bias = bias.repeat(1, 1, group, 1) if group > 1 and bias.shape[2] > 1 else bias
    else:
        bias = None
    lse = None
    if options.lse:
        scores = (query @ key.transpose(-1, -2)) * options.scale
        scores = scores if bias is None else scores + bias
        top = scores.detach().amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        out, lse = weights @ value / total, total.log() + top
    else:
        out = F.scaled_dot_product_attention(query, key, value, bias, scale=options.scale)

    if some is not None:
        some = some.repeat(1, 1, group, 1) if group > 1 and some.shape[2] > 1 else some
        out = out * some
        lse = None if lse is None else lse.masked_fill(~some, float("-inf"))

    def ungroup(t):
        return t.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4).reshape(batch, rows * length, heads, t.shape[-1])

    return ungroup(out), None if lse is None else ungroup(lse).squeeze(-1)


def _allowed(chunk: Chunk, extra_mask: torch.Tensor | None, batch: int, extra: int) -> torch.Tensor | None:
    """Bool `[batch * rows or 1, 1, Q or 1, U + extra]`."""
    allowed, rows = chunk.allowed, len(chunk.query)
    if extra_mask is None:
        if allowed is None:
            return None
        allowed = F.pad(allowed, (0, extra), value=True) if extra else allowed
        allowed = allowed.repeat(batch, 1, 1) if len(allowed) > 1 else allowed
        return allowed[:, None]
    allowed = chunk.key.new_ones(1, 1, chunk.key.shape[1], dtype=torch.bool) if allowed is None else allowed
    visible = extra_mask[chunk.batch][:, None, None].expand(-1, rows, allowed.shape[1], -1)
    return torch.cat([allowed.expand(batch, rows, -1, -1), visible], -1).flatten(0, 1)[:, None]
