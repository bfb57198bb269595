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

from .patterns.base import ScoreRule


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of an attention call.

    `query` `[rows, Q]` and `key` `[rows, U]` hold token numbers; for one batch and head a query is in one chunk only.
    `allowed` is bool `[rows or 1, Q, U]`, or what to add to the scores, 0 or -inf, or None when everything is allowed;
    `bias`, of the same shape, says which entry of the bias each pair takes. `batch`, `heads` and `kv_heads` say which
    part of the tensors is meant.
    """

    query: torch.Tensor
    key: torch.Tensor
    allowed: torch.Tensor | None
    bias: torch.Tensor | None
    batch: slice
    heads: slice
    kv_heads: slice


@dataclasses.dataclass(frozen=True)
class Options:
    """`extra` tokens stand at the end of k and v, for every query. `may_be_empty` guards rows that see nothing."""

    scale: float
    extra: int
    lse: bool
    rule: ScoreRule | None = None
    may_be_empty: bool = False


Source = Callable[[], Iterator[Chunk]]


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    extra_mask: torch.Tensor | None,
    chunks: Source,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q `[batch, tokens, heads, dim]`, k and v `[batch, tokens + extra, kv_heads, dim]`, bias `[batch or 1, heads or 1,
    entries]` to out and lse of all tokens."""
    out, lse = _Recompute.apply(q, k, v, bias, extra_mask, chunks, options)
    return out, lse if options.lse else None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, extra_mask, chunks, options):
        ctx.save_for_backward(q, k, v, bias, extra_mask)
        ctx.chunks, ctx.options = chunks, options
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        full = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:-1] if options.lse else (0,), float("-inf"), dtype=full, device=q.device)
        k, v, bad = _without_bad(k, v)
        for chunk in chunks():
            part, part_lse = _attend(*_gather(q, k, v, bias, chunk, options), chunk, extra_mask, bad, options)
            _put(out, chunk, part)
            if options.lse:
                _put(lse, chunk, part_lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, bias, extra_mask = ctx.saved_tensors
        grads = gradients(q, k, v, bias, extra_mask, ctx.chunks, ctx.options, grad_out, grad_lse)
        return *grads, None, None, None


def gradients(q, k, v, bias, extra_mask, chunks: Source, options: Options, grad_out, grad_lse) -> list:
    """Gradients of q, k, v and bias of `attend_chunks`; `grad_lse` is ignored unless the options ask for lse."""
    full = torch.promote_types(q.dtype, torch.float32)
    grads = [None if t is None else torch.zeros(t.shape, dtype=full, device=t.device) for t in (q, k, v, bias)]
    k, v, bad = _without_bad(k, v)
    for chunk in chunks():

        def part(*gathered, chunk=chunk):
            bias = gathered[3] if len(gathered) > 3 else None
            out, lse = _attend(*gathered[:3], bias, chunk, extra_mask, bad, options)
            return (out, lse) if options.lse else (out,)

        # torch.func and not autograd.grad: it also works inside a registered operator, where autograd is switched off.
        inputs = [t for t in _gather(q, k, v, bias, chunk, options) if t is not None]
        outputs, pull = torch.func.vjp(part, *inputs)
        outer = zip((grad_out, grad_lse), outputs, strict=False)
        by = pull(tuple(_take(g, chunk.batch, chunk.heads, chunk.query).to(o.dtype) for g, o in outer))
        _put(grads[0], chunk, by[0])
        keys = _with_extra(chunk.key, q.shape[1], options.extra).flatten()
        for grad, by_key in zip(grads[1:3], by[1:3], strict=True):
            grad[chunk.batch, :, chunk.kv_heads].index_add_(1, keys, by_key.to(full))
        if bias is not None:
            _part_of_bias(grads[3], chunk).add_(by[3])
    return [None if g is None else g.to(q.dtype) for g in grads]


def _without_bad(k, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values without those tokens that are not finite, and which they are, `[batch, tokens, kv_heads]`.

    0 times NaN is NaN, so in a matrix product they would reach every query of their tile. On a CPU a sum tells that
    there are none; elsewhere asking would stall the device.
    """
    full = torch.promote_types(k.dtype, torch.float32)
    if k.device.type == "cpu" and bool((k.sum(dtype=full) + v.sum(dtype=full)).isfinite()):
        return k, v, None
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    return k.masked_fill(bad[..., None], 0), v.masked_fill(bad[..., None], 0), bad


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the scores: 0 where a pair is allowed, -inf elsewhere. What is additive already is returned."""
    if allowed.dtype == dtype:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def _part_of_bias(bias: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The batch entries and heads of a chunk; a size of 1 is for all of them."""
    batch = chunk.batch if len(bias) > 1 else slice(None)
    return bias[batch, chunk.heads if bias.shape[1] > 1 else slice(None)]


def _take(tensor: torch.Tensor, batch: slice, heads: slice, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` of a part of a tensor, `[batch, tokens taken, heads, ...]`."""
    part = tensor[batch, :, heads]
    if len(part) == 1:  # selecting rows of a matrix takes half the time on a CPU
        return part[0].flatten(1).index_select(0, index.flatten()).view(1, -1, *part.shape[2:])
    return part.index_select(1, index.flatten())


def _put(tensor: torch.Tensor, chunk: Chunk, part: torch.Tensor) -> None:
    tensor[chunk.batch, :, chunk.heads].index_copy_(1, chunk.query.flatten(), part.to(tensor.dtype))


def _with_extra(key: torch.Tensor, tokens: int, extra: int) -> torch.Tensor:
    """`[rows, U + extra]`: the extra tokens stand after the tokens of the grid."""
    if not extra:
        return key
    return torch.cat([key, torch.arange(tokens, tokens + extra, device=key.device).expand(len(key), -1)], 1)


def _gather(q, k, v, bias, chunk: Chunk, options: Options) -> list[torch.Tensor | None]:
    """`[batch, rows * Q, heads, dim]`, keys and values `[batch, rows * (U + extra), kv_heads, dim]`, the bias."""
    keys = _with_extra(chunk.key, q.shape[1], options.extra)
    parts = [
        _take(q, chunk.batch, chunk.heads, chunk.query),
        _take(k, chunk.batch, chunk.kv_heads, keys),
        _take(v, chunk.batch, chunk.kv_heads, keys),
    ]
    parts.append(None if bias is None else _part_of_bias(bias, chunk))
    # CPU products of half floats are slow, and round the sums; a chunk is small enough to widen.
    wide = q.device.type == "cpu" and q.dtype.itemsize == 2
    return [t if t is None or not wide else t.float() for t in parts]


def _attend(q, k, v, bias, chunk: Chunk, extra_mask, bad, options: Options):
    """One small attention. Returns out `[batch, rows * Q, heads, dim]` and lse `[batch, rows * Q, heads]`, or None."""
    batch, rows, heads, kv_heads = q.shape[0], len(chunk.query), q.shape[2], k.shape[2]
    group, length = heads // kv_heads, chunk.query.shape[1]
    # to [batch * rows, kv_heads, group * Q, dim]: the query heads of a KV head become more rows
    query = q.view(batch * rows, length, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key, value = (t.view(batch * rows, -1, kv_heads, t.shape[-1]).transpose(1, 2) for t in (k, v))
    allowed, added = _allowed(chunk, extra_mask, batch, options.extra), None

    def by_query(t):
        """From one row per query to one per query and query head."""
        return t.repeat(1, 1, group, 1) if group > 1 and t.shape[2] > 1 else t

    some = None
    if allowed is not None:
        if options.may_be_empty:  # its lists are bool; such a row attends to everything, and is then set to 0
            some = allowed.any(-1, keepdim=True)
            allowed = allowed | ~some
        added = by_query(additive(allowed, q.dtype))
    if bias is not None:
        pairs = _bias_of_pairs(bias, chunk.bias, (batch, rows, kv_heads, group), options.extra)
        added = pairs if added is None else added + pairs
    lse = None
    if options.lse or options.rule:
        scores = (query @ key.transpose(-1, -2)) * options.scale
        if options.rule is not None:
            inner = scores[..., : chunk.key.shape[1]]
            tokens = by_query(chunk.query[:, None, :, None]), chunk.key[:, None, None]
            inner = options.rule(inner, *(t.repeat(batch, 1, 1, 1) for t in tokens))
            scores = torch.cat([inner, scores[..., chunk.key.shape[1] :]], -1) if options.extra else inner
        scores = scores if added is None else scores + added
        top = scores.detach().amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        out, lse = weights @ value / total, total.log() + top
    else:
        out = F.scaled_dot_product_attention(query, key, value, added, scale=options.scale)

    def put(where, number):
        nonlocal out, lse
        where = by_query(where)
        out, lse = out.masked_fill(where, number[0]), None if lse is None else lse.masked_fill(where, number[1])

    if some is not None:
        put(~some, (0.0, float("-inf")))
    if bad is not None:
        seen = _take(
            bad, chunk.batch, chunk.kv_heads, _with_extra(chunk.key, bad.shape[1] - options.extra, options.extra)
        )
        seen = seen.view(batch * rows, -1, kv_heads).transpose(1, 2)[:, :, None]
        if allowed is not None:
            seen = seen & (allowed if allowed.dtype == torch.bool else allowed == 0)
            seen = seen if some is None else seen & some
        put(seen.any(-1, keepdim=True), (float("nan"), float("nan")))

    def ungroup(t):
        return t.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4).reshape(batch, rows * length, heads, t.shape[-1])

    return ungroup(out), None if lse is None else ungroup(lse).squeeze(-1)


def _bias_of_pairs(bias: torch.Tensor, index: torch.Tensor, sizes: tuple[int, ...], extra: int) -> torch.Tensor:
    """`[batch * rows or 1, kv_heads, group * Q, U + extra]` from bias `[batch or 1, heads or 1, entries]`; extra tokens
    have none."""
    batch, rows, kv_heads, group = sizes
    pairs = bias[:, :, index].transpose(1, 2)  # [batch or 1, rows or 1, heads or 1, Q, U]
    if pairs.shape[:2] == (1, 1):  # the same in all tiles
        batch = rows = 1
    pairs = pairs.expand(batch, rows, kv_heads * group, -1, -1).flatten(0, 1)
    return F.pad(pairs.unflatten(1, (kv_heads, group)).flatten(2, 3), (0, extra))


def _allowed(chunk: Chunk, extra_mask: torch.Tensor | None, batch: int, extra: int) -> torch.Tensor | None:
    """As `Chunk.allowed`, `[batch * rows or 1, 1, Q or 1, U + extra]`."""
    allowed, rows = chunk.allowed, len(chunk.query)
    if extra_mask is None:
        if allowed is None:
            return None
        allowed = F.pad(allowed, (0, extra), value=allowed.dtype == torch.bool) if extra else allowed
        allowed = allowed.repeat(batch, 1, 1) if len(allowed) > 1 else allowed
        return allowed[:, None]
    if allowed is None:
        allowed = chunk.key.new_ones(1, 1, chunk.key.shape[1], dtype=torch.bool)
    allowed = allowed if allowed.dtype == torch.bool else allowed == 0
    visible = extra_mask[chunk.batch][:, None, None].expand(-1, rows, allowed.shape[1], -1)
    return torch.cat([allowed.expand(batch, rows, -1, -1), visible], -1).flatten(0, 1)[:, None]
