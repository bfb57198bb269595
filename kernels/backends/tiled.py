"""Plain torch on any device: gather the keys of a tile of queries, run one small attention, forward and backward.

Never builds anything of tokens x tokens. Separable patterns use boxes of queries and the box of keys they need;
the others use rows of their block lists.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..gather import Chunk, Options, additive, attend_chunks, gradients
from ..patterns import Blocked, BlockList, Dense, Separable
from ..patterns.blocks import Lists
from ..problem import Problem
from ..tiles import MOST_PAIRS, cut, tile_sides

CHUNK_BYTES = 8 * 2**20  # of gathered keys, values and scores at a time; the fastest of 1 to 32 MB on a CPU

KEPT_BYTES = 32 * 2**20  # of chunks kept for the next call


def missing(device: str) -> list[str]:
    return []


def limits(problem: Problem) -> list[str]:
    known = isinstance(problem.pattern, (Separable, Blocked))
    return [] if known else [f"{type(problem.pattern).__name__} gives neither intervals nor block lists"]


def by_name_only(problem: Problem) -> str | None:
    return None


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    if _is_sdpa(problem):
        return _dense(q, *_flat(k, v, extra_kv), scale), None
    chunks, options = _plan(problem, q.device, scale)
    inputs = q.flatten(1, -3), *_flat(k, v, extra_kv), _flat_bias(problem, bias)
    out, lse = attend_chunks(*inputs, extra_mask, chunks, options)
    return out.view(*q.shape[:-1], -1), None if lse is None else lse.view(q.shape[:-1])


def backward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse):
    """Gradients of q, k, v, the extra keys and values, and the bias, None where there is no such input; without
    autograd, for the operator of compiled graphs."""
    key, value = _flat(k, v, extra_kv)
    if _is_sdpa(problem):
        by_query, *by_key = torch.func.vjp(lambda *qkv: _dense(*qkv, scale), q, key, value)[1](grad_out)
        by_bias = None
    else:
        chunks, options = _plan(problem, q.device, scale)
        outer = grad_out.flatten(1, -3), grad_lse.flatten(1, -2) if options.lse else grad_lse
        inputs = q.flatten(1, -3), key, value, _flat_bias(problem, bias)
        by_query, *by_key, by_bias = gradients(*inputs, extra_mask, chunks, options, *outer)
    return [
        by_query.view(q.shape),
        *(g[:, : problem.tokens].reshape(t.shape) for g, t in zip(by_key, (k, v), strict=True)),
        *(None if extra_kv is None else g[:, problem.tokens :] for g in by_key),
        None if bias is None else by_bias.view(bias.shape),
    ]


def _flat_bias(problem: Problem, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`[batch or 1, heads or 1, entries]`."""
    if bias is None:
        return None
    lead = (1, bias.shape[0]) if isinstance(problem.pattern, Separable) else (1, 1, *bias.shape[:-2])[-2:]
    return bias.reshape(*lead, -1)


def _flat(k, v, extra_kv) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = k.flatten(1, -3), v.flatten(1, -3)
    if extra_kv is None:
        return key, value
    return torch.cat([key, extra_kv[0]], 1), torch.cat([value, extra_kv[1]], 1)


def _is_sdpa(problem: Problem) -> bool:
    """Nothing to leave out: one call of the ordinary attention is the fastest."""
    return isinstance(problem.pattern, Dense) and not problem.extra_mask and not problem.return_lse


def _dense(q, key, value, scale):
    query, key, value = (t.transpose(1, 2) for t in (q.flatten(1, -3), key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).reshape(*q.shape[:-1], -1)


def _plan(problem: Problem, device: torch.device, scale: float):
    may_be_empty = isinstance(problem.pattern, BlockList)
    rule = problem.pattern.score_rule(problem.grid, device)
    options = Options(scale, problem.extra, problem.return_lse, rule, may_be_empty)
    return functools.partial(_chunks, problem, device), options


def _chunks(problem: Problem, device: torch.device) -> Iterator[Chunk]:
    # a BlockList is new in every call as a rule: not worth keeping
    kept = None if isinstance(problem.pattern, BlockList) else _kept(problem, device)
    return _make(problem, device) if kept is None else iter(kept)


@functools.lru_cache(maxsize=8)
def _kept(problem: Problem, device: torch.device) -> list[Chunk] | None:
    """The chunks of a problem that comes again and again, if they are small; with masks to add, if those are too."""
    chunks, size = [], 0
    for chunk in _make(problem, device):
        chunks.append(chunk)
        size += sum(0 if t is None else t.nbytes for t in (chunk.query, chunk.key, chunk.allowed, chunk.bias))
        if size > KEPT_BYTES:
            return None
    half = device.type == "cpu" and problem.dtype.itemsize == 2  # computed in float32
    dtype = torch.float32 if half else problem.dtype
    masks = {id(chunk.allowed): chunk.allowed for chunk in chunks if chunk.allowed is not None}
    if size + sum(mask.numel() for mask in masks.values()) * dtype.itemsize > KEPT_BYTES:
        return chunks
    added = {key: additive(mask, dtype) for key, mask in masks.items()}
    return [dataclasses.replace(chunk, allowed=added.get(id(chunk.allowed))) for chunk in chunks]


def _make(problem: Problem, device: torch.device) -> Iterator[Chunk]:
    if isinstance(problem.pattern, Separable):
        return _boxes(problem, device)
    few = problem.tokens**2 <= MOST_PAIRS and not isinstance(problem.pattern, BlockList)
    return (_whole if few else _rows)(problem, device)


def _whole(problem: Problem, device: torch.device) -> Iterator[Chunk]:
    """A grid so small that all of it is one tile."""
    token = torch.arange(problem.tokens, device=device)[None]
    allowed = problem.pattern.mask(problem.grid, device)[None]
    for part in _Room(problem, problem.tokens, problem.tokens).parts():
        yield Chunk(token, token, allowed, None, *part)


class _Room:
    """Cuts a call so that one chunk stays under CHUNK_BYTES: first fewer tiles at a time, then fewer batch entries and
    heads."""

    def __init__(
        self, problem: Problem, queries: int, keys: int, batch: range | None = None, heads: range | None = None
    ):
        self.group = problem.heads // problem.kv_heads
        keys += problem.extra
        floats = keys * (problem.head_dim + problem.value_dim) + queries * self.group * problem.head_dim
        scores = problem.return_lse or problem.bias or problem.pattern.score_rule(problem.grid) is not None
        floats += 2 * self.group * queries * keys if scores else 0
        floats *= 3 if problem.needs_grad else 1  # the gradients of a chunk are as large as the chunk
        units = max(CHUNK_BYTES // (max(problem.dtype.itemsize, 4) * floats), 1)
        self.batch = batch or range(problem.batch)
        self.heads = heads or range(problem.heads)
        kv_heads = len(self.heads) // self.group or 1
        self.kv_step = min(kv_heads, units)
        self.batch_step = min(len(self.batch), max(units // self.kv_step, 1))
        self.rows = max(units // (self.kv_step * self.batch_step), 1)

    def parts(self) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of (batch, heads, KV heads)."""
        for b in range(self.batch.start, self.batch.stop, self.batch_step):
            batch = slice(b, min(b + self.batch_step, self.batch.stop))
            if len(self.heads) < self.group:  # one query head at a time: block lists of its own
                kv = self.heads.start // self.group
                yield batch, slice(self.heads.start, self.heads.stop), slice(kv, kv + 1)
                continue
            first, stop = self.heads.start // self.group, self.heads.stop // self.group
            for h in range(first, stop, self.kv_step):
                kv = slice(h, min(h + self.kv_step, stop))
                yield batch, slice(kv.start * self.group, kv.stop * self.group), kv


@dataclasses.dataclass(frozen=True)
class _Side:
    """Tiles of one axis that have the same numbers of queries and keys.

    `query` `[tiles, t]` and `key` `[tiles, u]` are coordinates times the step of the axis in the flattened grid;
    `allowed` is bool `[tiles or 1, t, u]`; `apart`, of the same shape, is how far the key is from the query, from 0 to
    `span - 1` where it is in reach, for patterns that take a bias.
    """

    query: torch.Tensor
    key: torch.Tensor
    allowed: torch.Tensor
    apart: torch.Tensor
    span: int


@functools.lru_cache(maxsize=64)
def _sides(pattern: Separable, grid: tuple[int, ...], device: torch.device) -> list[list[_Side]]:
    out, reach = [], pattern.reach(len(grid)) or (1,) * len(grid)
    for index, (axis, side) in enumerate(zip(pattern.axes(grid), tile_sides(pattern, grid), strict=True)):
        span = 2 * reach[index] - 1
        step = math.prod(grid[index + 1 :])
        alike: dict[tuple[int, int], list] = {}
        for first, stop, low, high in cut(axis, side):
            alike.setdefault((stop - first, high - low), []).append((first, low))
        order, lo, hi = (torch.tensor(t, device=device) for t in (axis.order, axis.lo, axis.hi))
        sides = []
        for (queries, keys), tiles in alike.items():
            first, low = torch.tensor(tiles, device=device).T
            query = first[:, None] + torch.arange(queries, device=device)
            key = low[:, None] + torch.arange(keys, device=device)
            allowed = (lo[query][..., None] <= key[:, None]) & (key[:, None] < hi[query][..., None])
            apart = (key[:, None] - query[..., None] + reach[index] - 1).clamp(0, span - 1)
            allowed, apart = (t[:1] if bool((t == t[:1]).all()) else t for t in (allowed, apart))
            sides.append(_Side(order[query] * step, order[key] * step, allowed, apart, span))
        out.append(sides)
    return out


def _boxes(problem: Problem, device: torch.device) -> Iterator[Chunk]:
    """Chunks of a separable pattern: boxes of queries, with the box of all keys that any of them sees."""
    inside = problem.pattern.inside(problem.grid, device)
    for sides in itertools.product(*_sides(problem.pattern, problem.grid, device)):
        tiles = [len(side.query) for side in sides]
        queries, keys = (math.prod(getattr(side, n).shape[1] for side in sides) for n in ("query", "key"))
        everything = inside is None and all(bool(side.allowed.all()) for side in sides)
        room, total = _Room(problem, queries, keys), math.prod(tiles)
        shared: dict[str, torch.Tensor] = {}  # what is the same in all these tiles is made once

        def of_pairs(name: str, at: tuple[torch.Tensor, ...], combine, sides=sides, shared=shared) -> torch.Tensor:
            parts = [getattr(side, name) for side in sides]
            if all(len(part) == 1 for part in parts):
                if name not in shared:
                    shared[name] = combine(parts)
                return shared[name]
            return combine([p if len(p) == 1 else p[i] for p, i in zip(parts, at, strict=True)])

        for start in range(0, total, room.rows):
            at = torch.unravel_index(torch.arange(start, min(start + room.rows, total), device=device), tiles)
            query, key = (_sum([getattr(s, n)[i] for s, i in zip(sides, at, strict=False)]) for n in ("query", "key"))
            allowed = None if everything else of_pairs("allowed", at, _product)
            if inside is not None:
                allowed = allowed & inside(query[..., None], key[:, None])
            spans = [side.span for side in sides]
            bias = of_pairs("apart", at, functools.partial(_ravel, spans)) if problem.bias else None
            for part in room.parts():
                yield Chunk(query, key, allowed, bias, *part)


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """`[rows, a]`, `[rows, b]`, ... to `[rows, a * b * ...]` by adding."""
    return functools.reduce(lambda x, y: (x[:, :, None] + y[:, None]).flatten(1), parts)


def _pairs(parts: list[torch.Tensor], combine) -> torch.Tensor:
    """`[rows, q1, k1]`, `[rows, q2, k2]`, ... to `[rows, q1 * q2 * ..., k1 * k2 * ...]`."""
    return functools.reduce(
        lambda x, y: combine(x[:, :, None, :, None], y[:, None, :, None]).flatten(3, 4).flatten(1, 2), parts
    )


def _product(parts: list[torch.Tensor]) -> torch.Tensor:
    return _pairs(parts, torch.logical_and)


def _ravel(spans: list[int], parts: list[torch.Tensor]) -> torch.Tensor:
    """Numbers per axis, below `spans`, to one number row-major."""
    steps = [math.prod(spans[i + 1 :]) for i in range(len(spans))]
    return _pairs([part * step for part, step in zip(parts, steps, strict=True)], torch.add)


def _rows(problem: Problem, device: torch.device) -> Iterator[Chunk]:
    """Chunks of block lists: blocks of queries with about the same number of key blocks, each with its key blocks."""
    lists = problem.pattern.lists(problem.grid, device)
    predicate = problem.pattern.predicate(problem.grid, device)
    lead = (1, 1, *lists.index.shape[:-2])[-2:]
    index, count, full = (
        t.reshape(*lead, *t.shape[lists.index.ndim - 2 :]) for t in (lists.index, lists.count, lists.full_count)
    )
    for b, h in itertools.product(*map(range, lead)):
        batch = range(b, b + 1) if lead[0] > 1 else range(problem.batch)
        heads = range(h, h + 1) if lead[1] > 1 else range(problem.heads)
        counts = count[b, h].tolist()
        order = sorted((r for r, n in enumerate(counts) if n or problem.extra), key=lambda r: -counts[r])
        while order:
            # rows of the same length (only the last block may be short) and of nearly as many blocks as the first
            length, width = _length(problem, lists, order[0]), max(counts[order[0]], 1)
            room = _Room(problem, length, width * lists.block[1], batch, heads)
            some = [
                r for r in order[: room.rows] if _length(problem, lists, r) == length and 4 * counts[r] >= 3 * width
            ]
            some = some or order[:1]
            order = [r for r in order if r not in set(some)]
            rows = torch.tensor(some, device=device)
            picked = index[b, h, rows, :width].long(), count[b, h, rows], full[b, h, rows]
            query = rows[:, None] * lists.block[0] + torch.arange(length, device=device)
            key, allowed = _block_keys(problem, lists.block[1], query, *picked, predicate)
            bias = None
            if problem.bias:  # one entry per row and slot
                slot = torch.arange(key.shape[1], device=device) // lists.block[1]
                bias = (rows[:, None] * index.shape[-1] + slot)[:, None].expand(-1, length, -1)
            for part in room.parts():
                yield Chunk(query, key, allowed, bias, *part)


def _length(problem: Problem, lists: Lists, row: int) -> int:
    return min(lists.block[0], problem.tokens - row * lists.block[0])


def _block_keys(problem, block, query, index, count, full, predicate) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Key tokens `[rows, width * block]` of listed blocks, and bool `[rows, Q, width * block]` or None when all are
    allowed."""
    key = (index[..., None] * block + torch.arange(block, device=index.device)).flatten(1)
    slot = torch.arange(key.shape[1], device=index.device) // block
    real = (slot < count[:, None]) & (key < problem.tokens)
    key = key.where(real, 0)
    sure = int(full.min()) * block  # keys in blocks that are full in every row need no test
    tested = key[:, None, sure:]
    if not tested.shape[-1] or bool((full >= count).all()):
        return key, None if bool(real.all()) else real[:, None].expand(-1, query.shape[1], -1)
    passed = predicate(query[..., None], tested) | (slot[sure:] < full[:, None])[:, None]
    return key, real[:, None] & torch.cat([passed.new_ones(*query.shape, sure), passed], -1)
