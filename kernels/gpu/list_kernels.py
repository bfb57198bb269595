"""Attention over block lists as Triton kernels: forward, and a backward without atomics.

One program owns a tile of queries (or, for the gradients of the keys, a tile of keys) of one head and visits the blocks
that its list names: first the full ones, which need no test, then the partial ones, then the extra tokens. A block of
the lists has any length; it is cut into tiles, of which the last may be short.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import _base2, _extra, _load, _store, _visible
from .common import LOG2E, dot, softmax_end, softmax_step
from .rules import NONE, allowed, multiplier


class Visits(NamedTuple):
    """Block lists, or their transpose, as a kernel sees them.

    A program reads list number `batch * by_batch + head * by_head`. `order` says which row starts first, `slots` how
    many entries a row has room for. Of lists, `entries` are key blocks `[lists, rows, slots]`, and `ends` `[lists,
    rows, 2]` tells how many are full, and how many there are. Of the transpose, `entries` `[lists, rows * slots]` are
    places in the lists, sorted by key block, and `ends` `[lists, 2 * columns + 1]` tells where the full and the partial
    ones of each start.
    """

    order: Any
    entries: Any
    ends: Any
    rows: int
    columns: int
    slots: int
    by_batch: int
    by_head: int


@triton.jit
def _program(visits, count, heads, TILES: tl.constexpr):
    """Which batch entry, head, block and tile of the block a program owns; tiles are fastest, so that neighbours share
    blocks in cache."""
    tiles = count * TILES
    at = tl.program_id(0)
    block = tl.load(visits.order + at % tiles // TILES)
    return (at // tiles // heads).to(tl.int64), (at // tiles % heads).to(tl.int64), block, at % TILES


@triton.jit
def _rows(tensor, batch, head, token):
    """Where tokens lie, in elements; they lie along the last axis of the grid."""
    return batch * tensor.batch + head * tensor.head + token.to(tl.int64) * tensor.w


@triton.jit
def _tile(
    box, tensor, batch, head, first, stop,
    N: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """The N tokens from `first` on, `[N, WIDTH]`: by pointer, with CHECK, zero from `stop` on; by descriptor zero past
    the sequence."""
    if BOXED:
        outer = (batch * tensor.by_batch + head * tensor.by_head).to(tl.int32)
        inner = (head * tensor.inner).to(tl.int32)
        return box.load([outer, 0, 0, first, inner]).reshape(N, WIDTH)
    else:
        token = first + tl.arange(0, N)
        return _load(tensor, _rows(tensor, batch, head, token), token < stop, DIM, WIDTH, CHECK)


@triton.jit
def _scores(
    s, first_query, first_key, query, key, stop_key, entry, bias, rule, decay, tokens, scale,
    BLOCK: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, SHAPE: tl.constexpr, BANDS: tl.constexpr,
    BIAS: tl.constexpr, PARTIAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Products of a tile to scores, minus infinity where a pair is not allowed, and what a rule multiplied them by.

    `query` and `key` number the tokens of the tile from its first ones; they broadcast against `s`. Full blocks have
    one multiplier for all their pairs.
    """
    slope = 1.0
    if SHAPE >= 0:
        apart = tl.abs(first_query - first_key + query - key) if PARTIAL else tl.abs(first_query - first_key)
        s = s * scale
        slope = tl.where(s < 0, 1.0, multiplier(apart, decay, SHAPE, BANDS))
        s = s * slope
    elif BIAS:
        s = s * scale + tl.load(bias + entry).to(tl.float32)
    if PARTIAL and KIND != NONE:
        seen = allowed(first_query, first_key, query, key, entry, rule, tokens, KIND, PARTS, BLOCK)
        s = tl.where(seen & (key < stop_key - first_key), s, float("-inf"))
    elif PARTIAL or RAGGED:
        s = tl.where(key < stop_key - first_key, s, float("-inf"))
    return s, slope


@triton.jit
def forward(
    k_box, v_box, q, k, v, extra_k, extra_v, extra_mask, bias, out, lse,
    visits, rule, decay, tokens, heads, group, extra, scale,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, SHAPE: tl.constexpr,
    BANDS: tl.constexpr, BIAS: tl.constexpr, LOOPS: tl.constexpr, RAGGED: tl.constexpr, BOXED: tl.constexpr,
    EXTRA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of queries of one head."""
    OWN: tl.constexpr = (BLOCK[0] + M - 1) // M
    SUB: tl.constexpr = (BLOCK[1] + N - 1) // N
    batch, head, row, tile = _program(visits, visits.rows, heads, OWN)
    first, stop = row * BLOCK[0] + tile * M, tl.minimum((row + 1) * BLOCK[0], tokens)
    at = (batch * visits.by_batch + head * visits.by_head) * visits.rows + row
    token = first + tl.arange(0, M)
    there = token < stop
    query = _load(q, _rows(q, batch, head, token), there, DIM, WIDTH, True)
    factor = LOG2E if SHAPE >= 0 or BIAS else scale * LOG2E
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, VALUE_WIDTH], tl.float32)
    begin = 0
    for PARTIAL in tl.static_range(LOOPS):
        end = tl.load(visits.ends + 2 * at + PARTIAL) * SUB
        for step in tl.range(begin, end):
            entry = at * visits.slots + step // SUB
            block = tl.load(visits.entries + entry)
            start, last = block * BLOCK[1] + step % SUB * N, tl.minimum((block + 1) * BLOCK[1], tokens)
            key = _tile(k_box, k, batch, head // group, start, last, N, DIM, WIDTH, PARTIAL or RAGGED, BOXED)
            s, _ = _scores(
                dot(query, key.T, tl.zeros([M, N], tl.float32)),
                first, start, tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], last,
                entry, bias, rule, decay, tokens, scale,
                BLOCK, KIND, PARTS, SHAPE, BANDS, BIAS, PARTIAL, RAGGED,
            )  # fmt: skip
            p, m, total, acc = softmax_step(s, m, total, acc, factor, PARTIAL or BIAS)
            value = _tile(v_box, v, batch, head // group, start, last, N, VALUE, VALUE_WIDTH, PARTIAL or RAGGED, BOXED)
            acc = dot(p.to(value.dtype), value, acc)
        begin = end
    if EXTRA:
        for start in tl.range(0, extra, N):
            number = start + tl.arange(0, N)
            key = _extra(extra_k, batch, head // group, number, extra, DIM, WIDTH)
            s = dot(query, key.T, tl.zeros([M, N], tl.float32))
            if SHAPE >= 0 or BIAS:
                s = s * scale
            s = tl.where(_visible(extra_mask, batch, number, extra, MASKED)[None, :], s, float("-inf"))
            p, m, total, acc = softmax_step(s, m, total, acc, factor, True)
            value = _extra(extra_v, batch, head // group, number, extra, VALUE, VALUE_WIDTH)
            acc = dot(p.to(value.dtype), value, acc)
    acc, log = softmax_end(m, total, acc)
    _store(out, _rows(out, batch, head, token), there, acc, VALUE, VALUE_WIDTH)
    tl.store(lse.data + _rows(lse, batch, head, token), log, mask=there)


@triton.jit
def grad_query(
    k_box, v_box, q, k, v, extra_k, extra_v, extra_mask, bias, out, lse, grad_out, grad_lse, delta, grad_q, grad_bias,
    visits, rule, decay, tokens, heads, group, extra, scale,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, SHAPE: tl.constexpr,
    BANDS: tl.constexpr, BIAS: tl.constexpr, LOOPS: tl.constexpr, RAGGED: tl.constexpr, BOXED: tl.constexpr,
    EXTRA: tl.constexpr, MASKED: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, `delta`, which the gradients of the keys need too, and the gradient of the bias.

    `grad_bias` is `[batch, heads, rows, tiles of a query block, slots, tiles of a key block]`, zero at first; the tiles
    are to be summed.
    """
    OWN: tl.constexpr = (BLOCK[0] + M - 1) // M
    SUB: tl.constexpr = (BLOCK[1] + N - 1) // N
    batch, head, row, tile = _program(visits, visits.rows, heads, OWN)
    first, stop = row * BLOCK[0] + tile * M, tl.minimum((row + 1) * BLOCK[0], tokens)
    at = (batch * visits.by_batch + head * visits.by_head) * visits.rows + row
    of_bias = (((batch * heads + head) * visits.rows + row) * OWN + tile) * visits.slots * SUB
    token = first + tl.arange(0, M)
    there = token < stop
    query = _load(q, _rows(q, batch, head, token), there, DIM, WIDTH, True)
    outer = _load(grad_out, _rows(grad_out, batch, head, token), there, VALUE, VALUE_WIDTH, True)
    result = _load(out, _rows(out, batch, head, token), there, VALUE, VALUE_WIDTH, True)
    d = tl.sum(outer.to(tl.float32) * result.to(tl.float32), 1)
    if LSE:
        d -= tl.load(grad_lse.data + _rows(grad_lse, batch, head, token), mask=there, other=0.0)
    tl.store(delta.data + _rows(delta, batch, head, token), d, mask=there)
    top = _base2(lse, _rows(lse, batch, head, token), there)
    factor = LOG2E if SHAPE >= 0 or BIAS else scale * LOG2E
    acc = tl.zeros([M, WIDTH], tl.float32)
    begin = 0
    for PARTIAL in tl.static_range(LOOPS):
        end = tl.load(visits.ends + 2 * at + PARTIAL) * SUB
        for step in tl.range(begin, end):
            entry = at * visits.slots + step // SUB
            block = tl.load(visits.entries + entry)
            start, last = block * BLOCK[1] + step % SUB * N, tl.minimum((block + 1) * BLOCK[1], tokens)
            key = _tile(k_box, k, batch, head // group, start, last, N, DIM, WIDTH, PARTIAL or RAGGED, BOXED)
            value = _tile(v_box, v, batch, head // group, start, last, N, VALUE, VALUE_WIDTH, PARTIAL or RAGGED, BOXED)
            s, slope = _scores(
                dot(query, key.T, tl.zeros([M, N], tl.float32)),
                first, start, tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], last,
                entry, bias, rule, decay, tokens, scale,
                BLOCK, KIND, PARTS, SHAPE, BANDS, BIAS, PARTIAL, RAGGED,
            )  # fmt: skip
            p = tl.exp2(s * factor - top[:, None])
            ds = p * (dot(outer, value.T, tl.zeros([M, N], tl.float32)) - d[:, None])
            if BIAS:
                tl.store(grad_bias + of_bias + step, tl.sum(tl.sum(ds, 1), 0))
            acc = dot((ds * slope).to(key.dtype), key, acc)
        begin = end
    if EXTRA:
        for start in tl.range(0, extra, N):
            number = start + tl.arange(0, N)
            key = _extra(extra_k, batch, head // group, number, extra, DIM, WIDTH)
            value = _extra(extra_v, batch, head // group, number, extra, VALUE, VALUE_WIDTH)
            p = tl.exp2(dot(query, key.T, tl.zeros([M, N], tl.float32)) * (scale * LOG2E) - top[:, None])
            p = tl.where(_visible(extra_mask, batch, number, extra, MASKED)[None, :], p, 0.0)
            ds = p * (dot(outer, value.T, tl.zeros([M, N], tl.float32)) - d[:, None])
            acc = dot(ds.to(key.dtype), key, acc)
    _store(grad_q, _rows(grad_q, batch, head, token), there, acc * scale, DIM, WIDTH)


@triton.jit
def grad_key(
    q_box, grad_out_box, q, k, v, bias, lse, grad_out, delta, grad_k, grad_v,
    visits, rule, decay, tokens, heads, group, scale,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, SHAPE: tl.constexpr,
    BANDS: tl.constexpr, BIAS: tl.constexpr, LOOPS: tl.constexpr, RAGGED: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one KV head, from transposed lists; `heads` counts KV heads."""
    OWN: tl.constexpr = (BLOCK[1] + M - 1) // M
    SUB: tl.constexpr = (BLOCK[0] + N - 1) // N
    batch, head, column, tile = _program(visits, visits.columns, heads, OWN)
    first, stop = column * BLOCK[1] + tile * M, tl.minimum((column + 1) * BLOCK[1], tokens)
    token = first + tl.arange(0, M)
    there = token < stop
    key = _load(k, _rows(k, batch, head, token), there, DIM, WIDTH, True)
    value = _load(v, _rows(v, batch, head, token), there, VALUE, VALUE_WIDTH, True)
    factor = LOG2E if SHAPE >= 0 or BIAS else scale * LOG2E
    acc_k = tl.zeros([M, WIDTH], tl.float32)
    acc_v = tl.zeros([M, VALUE_WIDTH], tl.float32)
    for reader in tl.range(head * group, head * group + group):
        lists = batch * visits.by_batch + reader * visits.by_head
        entries = lists * visits.rows * visits.slots
        ends = visits.ends + lists * (2 * visits.columns + 1) + 2 * column
        for PARTIAL in tl.static_range(LOOPS):
            for step in tl.range(tl.load(ends + PARTIAL) * SUB, tl.load(ends + PARTIAL + 1) * SUB):
                place = tl.load(visits.entries + entries + step // SUB)
                row = place // visits.slots
                start, last = row * BLOCK[0] + step % SUB * N, tl.minimum((row + 1) * BLOCK[0], tokens)
                number = start + tl.arange(0, N)
                query = _tile(q_box, q, batch, reader, start, last, N, DIM, WIDTH, RAGGED, BOXED)
                outer = _tile(grad_out_box, grad_out, batch, reader, start, last, N, VALUE, VALUE_WIDTH, RAGGED, BOXED)
                offsets = _rows(lse, batch, reader, number)  # delta lies like lse
                top = _base2(lse, offsets, number < last)
                d = tl.load(delta.data + offsets, mask=number < last, other=0.0)
                s, slope = _scores(
                    dot(key, query.T, tl.zeros([M, N], tl.float32)),
                    start, first, tl.arange(0, N)[None, :], tl.arange(0, M)[:, None], stop,
                    entries + place, bias, rule, decay, tokens, scale,
                    BLOCK, KIND, PARTS, SHAPE, BANDS, BIAS, PARTIAL, False,
                )  # fmt: skip
                p = tl.exp2(s * factor - top[None, :])
                acc_v = dot(p.to(outer.dtype), outer, acc_v)
                ds = p * (dot(value, outer.T, tl.zeros([M, N], tl.float32)) - d[None, :]) * slope
                acc_k = dot(ds.to(query.dtype), query, acc_k)
    _store(grad_k, _rows(grad_k, batch, head, token), there, acc_k * scale, DIM, WIDTH)
    _store(grad_v, _rows(grad_v, batch, head, token), there, acc_v, VALUE, VALUE_WIDTH)
