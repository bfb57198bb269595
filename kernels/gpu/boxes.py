"""Attention over boxes of the grid as Triton kernels: forward, and a backward without atomics.

One program owns a box of queries (or, for the gradients of the keys, a box of keys) of one head and visits boxes of the
other side: first those that need no test, then the rest, then the extra tokens. Grids have three axes here, leading
ones of one token. `tables` says what the rows of integers mean that every program reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2E, dot, softmax_end, softmax_step


class Tokens(NamedTuple):
    """A tensor `[batch, t, h, w, heads, dim]` as a kernel sees it: a pointer and strides, in elements.

    If there is a descriptor besides, its first coordinate is `batch * by_batch + head * by_head` and its last
    `head * inner`. It is an argument of its own: not every version of triton can launch with one inside a tuple.
    """

    data: Any
    batch: int
    t: int
    h: int
    w: int
    head: int
    dim: int
    by_batch: int = 0
    by_head: int = 0
    inner: int = 0


class Tables(NamedTuple):
    """What a kernel knows of the pattern: per axis the rows of `tables`, the intervals `[2, extent]` (first, one past
    the last), tiles, extents and steps; `radius2` only of a disc."""

    rows0: Any
    rows1: Any
    rows2: Any
    ends0: Any
    ends1: Any
    ends2: Any
    tiles0: int
    tiles1: int
    tiles2: int
    extent0: int
    extent1: int
    extent2: int
    step0: int
    step1: int
    step2: int
    radius2: int


@triton.jit
def _row(rows, tile):
    """Row `tile` as scalars: first, stop, start, end, count, full_first, full_stop, shift."""
    at = rows + tile * 8
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
        tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
    )  # fmt: skip


@triton.jit
def _program(tables, heads):
    """Batch entry, head and rows of this program. Tiles are fastest, so that neighbours share boxes in cache."""
    tile = tl.program_id(0)
    tile2, tile = tile % tables.tiles2, tile // tables.tiles2
    tile1, tile = tile % tables.tiles1, tile // tables.tiles1
    tile0, tile = tile % tables.tiles0, tile // tables.tiles0
    rows = _row(tables.rows0, tile0), _row(tables.rows1, tile1), _row(tables.rows2, tile2)
    return (tile // heads).to(tl.int64), (tile % heads).to(tl.int64), rows


@triton.jit
def _divide(i, n):
    """`i // n` and `i % n` for small `i`: one float division is cheaper than an integer one."""
    whole = ((i + 0.5) / n).to(tl.int32)
    return whole, i - whole * n


@triton.jit
def _count(rows, PARTIAL: tl.constexpr):
    """How many boxes are full, or are not."""
    a, b, c = rows
    full = (a[6] - a[5]) * (b[6] - b[5]) * (c[6] - c[5])
    return a[4] * b[4] * c[4] - full if PARTIAL else full


@triton.jit
def _start(i, rows, SIDES: tl.constexpr, PARTIAL: tl.constexpr):
    """Positions where box number `i` of the full ones, or of the others, starts.

    The others are three slabs: not full on axis 0; full there but not on axis 1; full on both but not on axis 2.
    """
    a, b, c = rows
    full0, full1, full2 = a[6] - a[5], b[6] - b[5], c[6] - c[5]
    if PARTIAL:
        slab0 = (a[4] - full0) * b[4] * c[4]
        slab1 = full0 * (b[4] - full1) * c[4]
        in0 = i < slab0
        in1 = (i >= slab0) & (i < slab0 + slab1)
        in2 = i >= slab0 + slab1
        i -= tl.where(in0, 0, tl.where(in1, slab0, slab0 + slab1))
        rest, r2 = _divide(i, tl.where(in2, c[4] - full2, c[4]))
        r0, r1 = _divide(rest, tl.where(in0, b[4], tl.where(in1, b[4] - full1, full1)))
        # step over the full ones on the axis of the slab; stay among them on the axes before it
        r0 += tl.where(in0 & (r0 < a[5]), 0, tl.where(in0, full0, a[5]))
        r1 += tl.where(in0 | (in1 & (r1 < b[5])), 0, tl.where(in1, full1, b[5]))
        r2 += tl.where(in2 & (r2 >= c[5]), full2, 0)
    else:
        rest, r2 = _divide(i, full2)
        r0, r1 = _divide(rest, full1)
        r0 += a[5]
        r1 += b[5]
        r2 += c[5]
    return a[2] + r0 * SIDES[0], b[2] + r1 * SIDES[1], c[2] + r2 * SIDES[2]


@triton.jit
def _positions(start, SIDES: tl.constexpr):
    """Positions of the tokens of a box on each axis, row-major."""
    token = tl.arange(0, SIDES[0] * SIDES[1] * SIDES[2])
    return (
        start[0] + token // (SIDES[1] * SIDES[2]),
        start[1] + token // SIDES[2] % SIDES[1],
        start[2] + token % SIDES[2],
    )


@triton.jit
def _below(at, stop):
    return (at[0] < stop[0]) & (at[1] < stop[1]) & (at[2] < stop[2])


@triton.jit
def _offsets(tensor, batch, head, at, rows, tables):
    """Where tokens at these positions lie, in elements."""
    t = rows[0][7] + at[0] * tables.step0
    h = rows[1][7] + at[1] * tables.step1
    w = rows[2][7] + at[2] * tables.step2
    return _at(tensor, batch, head, (t, h, w))


@triton.jit
def _at(tensor, batch, head, at):
    """Where tokens at these coordinates lie; 64 bits wide because every index is before it is multiplied."""
    grid = at[0].to(tl.int64) * tensor.t + at[1].to(tl.int64) * tensor.h + at[2].to(tl.int64) * tensor.w
    return batch * tensor.batch + head * tensor.head + grid


@triton.jit
def _load(tensor, offsets, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """Tokens `[N, WIDTH]`, zero past DIM and (with CHECK) where not `inside`."""
    column = tl.arange(0, WIDTH)
    at = tensor.data + offsets[:, None] + column[None, :].to(tl.int64) * tensor.dim
    if CHECK:
        return tl.load(at, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
    elif DIM < WIDTH:
        return tl.load(at, mask=(column < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(tensor, offsets, inside, value, DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    at = tensor.data + offsets[:, None] + column[None, :].to(tl.int64) * tensor.dim
    tl.store(at, value.to(tensor.data.dtype.element_ty), mask=inside[:, None] & (column < DIM)[None, :])


@triton.jit
def _load_box(
    box, tensor, batch, head, start, rows, tables,
    SIDES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """The tokens of a visited box, `[N, WIDTH]`. Boxes loaded by descriptor are zero outside the grid; loaded by
    pointer, with CHECK, past the last position to visit."""
    if BOXED:
        outer = (batch * tensor.by_batch + head * tensor.by_head).to(tl.int32)
        inner = (head * tensor.inner).to(tl.int32)
        return box.load([outer, start[0], start[1], start[2], inner]).reshape(SIDES[0] * SIDES[1] * SIDES[2], WIDTH)
    else:
        at = _positions(start, SIDES)
        inside = _below(at, (rows[0][3], rows[1][3], rows[2][3]))
        return _load(tensor, _offsets(tensor, batch, head, at, rows, tables), inside, DIM, WIDTH, CHECK)


@triton.jit
def _own(tables, rows, SIDES: tl.constexpr):
    """Of the tokens of the own box: positions, which of them are there, and their intervals."""
    at = _positions((rows[0][0], rows[1][0], rows[2][0]), SIDES)
    there = _below(at, (rows[0][1], rows[1][1], rows[2][1]))
    lo = (
        tl.load(tables.ends0 + at[0], mask=there, other=0),
        tl.load(tables.ends1 + at[1], mask=there, other=0),
        tl.load(tables.ends2 + at[2], mask=there, other=0),
    )
    hi = (
        tl.load(tables.ends0 + tables.extent0 + at[0], mask=there, other=0),
        tl.load(tables.ends1 + tables.extent1 + at[1], mask=there, other=0),
        tl.load(tables.ends2 + tables.extent2 + at[2], mask=there, other=0),
    )
    return at, there, (lo, hi)


@triton.jit
def _within(at, lo, hi):
    """`lo <= at < hi` for own rows and visited columns, as one unsigned comparison."""
    return (at[None, :] - lo[:, None]).to(tl.uint32) < (hi - lo).to(tl.uint32)[:, None]


@triton.jit
def _allowed(own, ends, start, tables, SIDES: tl.constexpr, RANK: tl.constexpr, DISC: tl.constexpr):
    """Which pairs of own rows and tokens of a visited box are allowed, `[M, N]`."""
    lo, hi = ends
    at = _positions(start, SIDES)
    allowed = _within(at[2], lo[2], hi[2])
    if RANK > 1:
        allowed &= _within(at[1], lo[1], hi[1])
    if RANK > 2:
        allowed &= _within(at[0], lo[0], hi[0])
    if DISC:  # no dilation, so positions are coordinates
        dy = own[1][:, None] - at[1][None, :]
        dx = own[2][:, None] - at[2][None, :]
        allowed &= dy * dy + dx * dx < tables.radius2
    return allowed


@triton.jit
def _extra(tensor, batch, head, token, extra, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Extra tokens `[N, WIDTH]`; they lie along the last axis of their tensor."""
    offsets = batch * tensor.batch + head * tensor.head + token.to(tl.int64) * tensor.w
    return _load(tensor, offsets, token < extra, DIM, WIDTH, True)


@triton.jit
def _visible(mask, batch, token, extra, MASKED: tl.constexpr):
    visible = token < extra
    if MASKED:
        at = mask.data + batch * mask.batch + token.to(tl.int64) * mask.w
        visible &= tl.load(at, mask=visible, other=0) != 0
    return visible


@triton.jit
def forward(
    k_box, v_box, q, k, v, extra_k, extra_v, extra_mask, out, lse, tables, heads, group, extra, scale,
    OWN: tl.constexpr, SEEN: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, RANK: tl.constexpr,
    BOXED: tl.constexpr, DISC: tl.constexpr, EXTRA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Output and lse of a box of queries of one head."""
    M: tl.constexpr = OWN[0] * OWN[1] * OWN[2]
    N: tl.constexpr = SEEN[0] * SEEN[1] * SEEN[2]
    batch, head, rows = _program(tables, heads)
    own, there, ends = _own(tables, rows, OWN)
    query = _load(q, _offsets(q, batch, head, own, rows, tables), there, DIM, WIDTH, True)
    factor = scale * LOG2E
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, VALUE_WIDTH], tl.float32)
    for PARTIAL in tl.static_range(2):
        for i in tl.range(0, _count(rows, PARTIAL)):
            start = _start(i, rows, SEEN, PARTIAL)
            key = _load_box(k_box, k, batch, head // group, start, rows, tables, SEEN, DIM, WIDTH, PARTIAL, BOXED)
            s = dot(query, key.T, tl.zeros([M, N], tl.float32))
            if PARTIAL:
                s = tl.where(_allowed(own, ends, start, tables, SEEN, RANK, DISC), s, float("-inf"))
            p, m, total, acc = softmax_step(s, m, total, acc, factor, PARTIAL)
            value = _load_box(
                v_box, v, batch, head // group, start, rows, tables, SEEN, VALUE, VALUE_WIDTH, PARTIAL, BOXED
            )
            acc = dot(p.to(value.dtype), value, acc)
    if EXTRA:
        for first in tl.range(0, extra, N):
            token = first + tl.arange(0, N)
            key = _extra(extra_k, batch, head // group, token, extra, DIM, WIDTH)
            s = dot(query, key.T, tl.zeros([M, N], tl.float32))
            s = tl.where(_visible(extra_mask, batch, token, extra, MASKED)[None, :], s, float("-inf"))
            p, m, total, acc = softmax_step(s, m, total, acc, factor, True)
            value = _extra(extra_v, batch, head // group, token, extra, VALUE, VALUE_WIDTH)
            acc = dot(p.to(value.dtype), value, acc)
    acc, log = softmax_end(m, total, acc)
    _store(out, _offsets(out, batch, head, own, rows, tables), there, acc, VALUE, VALUE_WIDTH)
    tl.store(lse.data + _offsets(lse, batch, head, own, rows, tables), log, mask=there)


@triton.jit
def grad_query(
    k_box, v_box, q, k, v, extra_k, extra_v, extra_mask, out, lse, grad_out, grad_lse, delta, grad_q,
    tables, heads, group, extra, scale,
    OWN: tl.constexpr, SEEN: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, RANK: tl.constexpr,
    BOXED: tl.constexpr, DISC: tl.constexpr, EXTRA: tl.constexpr, MASKED: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Gradient of a box of queries of one head, and `delta`, which the gradients of the keys need too."""
    M: tl.constexpr = OWN[0] * OWN[1] * OWN[2]
    N: tl.constexpr = SEEN[0] * SEEN[1] * SEEN[2]
    batch, head, rows = _program(tables, heads)
    own, there, ends = _own(tables, rows, OWN)
    query = _load(q, _offsets(q, batch, head, own, rows, tables), there, DIM, WIDTH, True)
    outer = _load(grad_out, _offsets(grad_out, batch, head, own, rows, tables), there, VALUE, VALUE_WIDTH, True)
    result = _load(out, _offsets(out, batch, head, own, rows, tables), there, VALUE, VALUE_WIDTH, True)
    d = tl.sum(outer.to(tl.float32) * result.to(tl.float32), 1)
    if LSE:
        d -= tl.load(grad_lse.data + _offsets(grad_lse, batch, head, own, rows, tables), mask=there, other=0.0)
    tl.store(delta.data + _offsets(delta, batch, head, own, rows, tables), d, mask=there)
    top = _base2(lse, _offsets(lse, batch, head, own, rows, tables), there)
    factor = scale * LOG2E
    acc = tl.zeros([M, WIDTH], tl.float32)
    for PARTIAL in tl.static_range(2):
        for i in tl.range(0, _count(rows, PARTIAL)):
            start = _start(i, rows, SEEN, PARTIAL)
            key = _load_box(k_box, k, batch, head // group, start, rows, tables, SEEN, DIM, WIDTH, PARTIAL, BOXED)
            value = _load_box(
                v_box, v, batch, head // group, start, rows, tables, SEEN, VALUE, VALUE_WIDTH, PARTIAL, BOXED
            )
            p = tl.exp2(dot(query, key.T, tl.zeros([M, N], tl.float32)) * factor - top[:, None])
            if PARTIAL:
                p = tl.where(_allowed(own, ends, start, tables, SEEN, RANK, DISC), p, 0.0)
            ds = p * (dot(outer, value.T, tl.zeros([M, N], tl.float32)) - d[:, None])
            acc = dot(ds.to(key.dtype), key, acc)
    if EXTRA:
        for first in tl.range(0, extra, N):
            token = first + tl.arange(0, N)
            key = _extra(extra_k, batch, head // group, token, extra, DIM, WIDTH)
            value = _extra(extra_v, batch, head // group, token, extra, VALUE, VALUE_WIDTH)
            p = tl.exp2(dot(query, key.T, tl.zeros([M, N], tl.float32)) * factor - top[:, None])
            p = tl.where(_visible(extra_mask, batch, token, extra, MASKED)[None, :], p, 0.0)
            ds = p * (dot(outer, value.T, tl.zeros([M, N], tl.float32)) - d[:, None])
            acc = dot(ds.to(key.dtype), key, acc)
    _store(grad_q, _offsets(grad_q, batch, head, own, rows, tables), there, acc * scale, DIM, WIDTH)


@triton.jit
def _base2(lse, offsets, there):
    """lse in base 2; plus infinity, which makes every weight 0, for queries that are not there or see nothing."""
    value = tl.load(lse.data + offsets, mask=there, other=float("-inf")) * LOG2E
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def _load_numbers(lse, delta, batch, head, start, rows, tables, SIDES: tl.constexpr, CHECK: tl.constexpr):
    """lse in base 2 and delta of the queries of a visited box; the two are stored alike."""
    at = _positions(start, SIDES)
    offsets = _offsets(lse, batch, head, at, rows, tables)
    if CHECK:
        inside = _below(at, (rows[0][3], rows[1][3], rows[2][3]))
        return _base2(lse, offsets, inside), tl.load(delta.data + offsets, mask=inside, other=0.0)
    else:
        return tl.load(lse.data + offsets) * LOG2E, tl.load(delta.data + offsets)


@triton.jit
def grad_key(
    q_box, grad_out_box, q, k, v, lse, grad_out, delta, grad_k, grad_v, tables, heads, group, scale,
    OWN: tl.constexpr, SEEN: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, RANK: tl.constexpr, BOXED: tl.constexpr, DISC: tl.constexpr,
):  # fmt: skip
    """Gradients of a box of keys and values of one KV head; `tables` are transposed, and `heads` counts KV heads."""
    M: tl.constexpr = OWN[0] * OWN[1] * OWN[2]
    N: tl.constexpr = SEEN[0] * SEEN[1] * SEEN[2]
    batch, head, rows = _program(tables, heads)
    own, there, ends = _own(tables, rows, OWN)
    key = _load(k, _offsets(k, batch, head, own, rows, tables), there, DIM, WIDTH, True)
    value = _load(v, _offsets(v, batch, head, own, rows, tables), there, VALUE, VALUE_WIDTH, True)
    factor = scale * LOG2E
    acc_k = tl.zeros([M, WIDTH], tl.float32)
    acc_v = tl.zeros([M, VALUE_WIDTH], tl.float32)
    for PARTIAL in tl.static_range(2):
        count = _count(rows, PARTIAL)
        for turn in tl.range(0, count * group):
            reader, i = _divide(turn, count)
            reader += head * group
            start = _start(i, rows, SEEN, PARTIAL)
            query = _load_box(q_box, q, batch, reader, start, rows, tables, SEEN, DIM, WIDTH, PARTIAL, BOXED)
            outer = _load_box(
                grad_out_box, grad_out, batch, reader, start, rows, tables, SEEN, VALUE, VALUE_WIDTH, PARTIAL, BOXED
            )
            top, d = _load_numbers(lse, delta, batch, reader, start, rows, tables, SEEN, PARTIAL)
            p = tl.exp2(dot(key, query.T, tl.zeros([M, N], tl.float32)) * factor - top[None, :])
            if PARTIAL:
                p = tl.where(_allowed(own, ends, start, tables, SEEN, RANK, DISC), p, 0.0)
            acc_v = dot(p.to(outer.dtype), outer, acc_v)
            ds = p * (dot(value, outer.T, tl.zeros([M, N], tl.float32)) - d[None, :])
            acc_k = dot(ds.to(query.dtype), query, acc_k)
    _store(grad_k, _offsets(grad_k, batch, head, own, rows, tables), there, acc_k * scale, DIM, WIDTH)
    _store(grad_v, _offsets(grad_v, batch, head, own, rows, tables), there, acc_v, VALUE, VALUE_WIDTH)


@triton.jit
def grad_extra(
    q, extra_k, extra_v, extra_mask, lse, grad_out, delta, grad_k, grad_v,
    grid, heads, group, extra, scale, share,
    M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of M extra tokens of one KV head from `share` queries of the grid, which come in N at a time.

    `grad_k` and `grad_v` are float32 with one entry per share along their first axis, t, to be summed.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(extra, M)
    token, program = (program % tiles) * M + tl.arange(0, M), program // tiles
    head, program = (program % heads).to(tl.int64), program // heads
    tokens = grid[0] * grid[1] * grid[2]
    shares = tl.cdiv(tokens, share)
    part, batch = (program % shares).to(tl.int64), (program // shares).to(tl.int64)
    key = _extra(extra_k, batch, head, token, extra, DIM, WIDTH)
    value = _extra(extra_v, batch, head, token, extra, VALUE, VALUE_WIDTH)
    visible = _visible(extra_mask, batch, token, extra, MASKED)
    factor = scale * LOG2E
    acc_k = tl.zeros([M, WIDTH], tl.float32)
    acc_v = tl.zeros([M, VALUE_WIDTH], tl.float32)
    for reader in tl.range(head * group, head * group + group):
        for first in tl.range(part * share, tl.minimum(part * share + share, tokens), N):
            number = (first + tl.arange(0, N)).to(tl.int64)
            inside = number < tl.minimum(part * share + share, tokens)
            row = number // grid[2]
            at = row // grid[1], row % grid[1], number % grid[2]
            query = _load(q, _at(q, batch, reader, at), inside, DIM, WIDTH, True)
            outer = _load(grad_out, _at(grad_out, batch, reader, at), inside, VALUE, VALUE_WIDTH, True)
            top = _base2(lse, _at(lse, batch, reader, at), inside)
            d = tl.load(delta.data + _at(delta, batch, reader, at), mask=inside, other=0.0)
            p = tl.exp2(dot(key, query.T, tl.zeros([M, N], tl.float32)) * factor - top[None, :])
            p = tl.where(visible[:, None], p, 0.0)
            acc_v = dot(p.to(outer.dtype), outer, acc_v)
            ds = p * (dot(value, outer.T, tl.zeros([M, N], tl.float32)) - d[None, :])
            acc_k = dot(ds.to(query.dtype), query, acc_k)
    offsets = batch * grad_k.batch + part * grad_k.t + head * grad_k.head + token.to(tl.int64) * grad_k.w
    _store(grad_k, offsets, token < extra, acc_k * scale, DIM, WIDTH)
    offsets = batch * grad_v.batch + part * grad_v.t + head * grad_v.head + token.to(tl.int64) * grad_v.w
    _store(grad_v, offsets, token < extra, acc_v, VALUE, VALUE_WIDTH)
