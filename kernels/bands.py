"""Queries in tiles whose windows are a diagonal band of one matrix product.

A tile holds queries whose windows start at one place, or move on by one with each query. One matrix product pairs it
with the union of its keys, and what each query has with its own window is a strided view of that product: nothing is
copied once per key of a window.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .patterns import Neighborhood
from .patterns.base import Axis, along

CHUNK_BYTES = 8 * 2**20  # of products and gathered tokens at a time
TILE_QUERIES = 64
MOST_TOKENS_KEPT = 2**14  # of a grid whose chunks are kept for the next call


@dataclasses.dataclass(frozen=True)
class _Side:
    """Tiles of one axis that look alike: query i of a tile has `counts[i]` keys, from key `slope * i` of the tile on.

    `query` `[tiles, queries]` and `key` `[tiles, keys]` are coordinates times the step of the axis in the flat grid.
    """

    query: Tensor
    key: Tensor
    slope: int
    counts: tuple[int, ...]


def _cut(axis: Axis, side: int) -> list[tuple[int, int, int]]:
    """Tiles `(first, stop, slope)` of at most `side` queries whose windows start `slope` (0 or 1) further each."""
    tiles = []
    for first, stop in itertools.pairwise(axis.groups):
        while first < stop:
            end, slope = first + 1, 0
            while end < min(first + side, stop):
                step = axis.lo[end] - axis.lo[end - 1]
                if step > 1 or (end > first + 1 and step != slope):
                    break
                end, slope = end + 1, step
            tiles.append((first, end, slope))
            first = end
    return tiles


def _tile(window: tuple[int, ...], heads: int, dim: int) -> tuple[int, ...]:
    """Queries per axis and tile: a union not much larger than a window, and a quarter of a chunk at most."""
    tile = [min(round(TILE_QUERIES ** (1 / len(window))), w) for w in window]
    while max(tile) > 1:
        union = [w + n - 1 for w, n in zip(window, tile, strict=True)]
        if 16 * _floats(tile, union, heads, dim) <= CHUNK_BYTES:
            break
        tile[tile.index(max(tile))] //= 2
    return tuple(tile)


def _floats(queries: list[int], keys: list[int], heads: int, dim: int) -> int:
    """Numbers that are alive for one tile: the product and its band, and gathered tokens."""
    queries, keys = math.prod(queries), math.prod(keys)
    return heads * (2 * queries * keys + 2 * dim * (queries + keys))


@functools.lru_cache(maxsize=64)
def _sides(pattern: Neighborhood, grid: tuple[int, ...], tile: tuple[int, ...], device: torch.device):
    out = []
    windows = along(pattern, "window", len(grid))
    for index, (axis, side, window) in enumerate(zip(pattern.axes(grid), tile, windows, strict=True)):
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for first, stop, slope in _cut(axis, side):
            counts = tuple(axis.hi[p] - axis.lo[p] for p in range(first, stop))
            alike.setdefault((slope, counts), []).append(first)
        order, lo, hi = (torch.tensor(t, device=device) for t in (axis.order, axis.lo, axis.hi))
        step, sides = math.prod(grid[index + 1 :]), []
        for (slope, counts), firsts in alike.items():
            query = torch.tensor(firsts, device=device)[:, None] + torch.arange(len(counts), device=device)
            key = lo[query[:, :1]] + torch.arange(window + slope * (len(counts) - 1), device=device)
            key = torch.minimum(key, hi[query[:, -1:]] - 1)  # beyond it are only slots that do not exist
            sides.append(_Side(order[query] * step, order[key] * step, slope, counts))
        out.append(sides)
    return out


class Chunk:
    """Tiles that look alike: `query` `[rows, queries]` and `key` `[rows, union]` are token numbers; `absent`
    `[queries, 1, keys]` marks slots that do not exist, None when all do."""

    def __init__(self, sides: tuple[_Side, ...], at: tuple[Tensor, ...], windows: tuple[int, ...]):
        self.sides, self.windows = sides, windows
        self.query = _every_pair([s.query[i] for s, i in zip(sides, at, strict=True)])
        self.key = _every_pair([s.key[i] for s, i in zip(sides, at, strict=True)])
        self.absent = None
        if any(c < w for s, w in zip(sides, windows, strict=True) for c in s.counts):
            device, there = self.query.device, torch.ones(1, 1, dtype=torch.bool, device=self.query.device)
            for s, w in zip(sides, windows, strict=True):
                here = torch.arange(w, device=device) < torch.tensor(s.counts, device=device)[:, None]
                there = (there[:, None, :, None] & here[:, None]).flatten(2).flatten(0, 1)
            self.absent = ~there[:, None]

    def by_head(self, x: Tensor, index: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """The tokens `index` `[rows, n]` of x `[batch, tokens, heads, dim]`, as `[batch * rows * kv_heads, heads /
        kv_heads * n, dim]`."""
        batch, _, heads, dim = x.shape
        rows, n, group = *index.shape, heads // kv_heads
        x = x.index_select(1, index.flatten()).to(dtype).view(batch, rows, n, kv_heads, group, dim)
        return x.permute(0, 1, 3, 4, 2, 5).reshape(batch * rows * kv_heads, group * n, dim)

    def by_token(self, x: Tensor, n: int, heads: int) -> Tensor:
        """The way back, to `[batch, rows * n, heads, dim]`."""
        return x.view(-1, len(self.query), heads, n, x.shape[-1]).transpose(2, 3).flatten(1, 2)

    def slots(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights `[batch, rows, queries, heads, keys]` of x `[batch, tokens, heads, keys]`; without a key, 0."""
        x = x.index_select(1, self.query.flatten()).to(dtype).unflatten(1, self.query.shape)
        return x if self.absent is None else x.masked_fill(self.absent, 0)

    def band(self, product: Tensor, heads: int) -> Tensor:
        """The slots in a product `[.., heads / kv_heads * queries, union]`, as a view `[batch, rows, *queries, heads,
        *windows]`."""
        lengths, widths = ([getattr(s, n).shape[1] for s in self.sides] for n in ("query", "key"))
        union, queries, rows = math.prod(widths), math.prod(lengths), len(self.query)
        by_key = [math.prod(widths[i + 1 :]) for i in range(len(widths))]
        by_query = [
            math.prod(lengths[i + 1 :]) * union + side.slope * step
            for i, (side, step) in enumerate(zip(self.sides, by_key, strict=True))
        ]
        head, row = queries * union, heads * queries * union
        size = (product.numel() // (rows * row), rows, *lengths, heads, *self.windows)
        return product.as_strided(size, (rows * row, row, *by_query, head, *by_key))


def _every_pair(parts: list[Tensor]) -> Tensor:
    """`[rows, a]`, `[rows, b]`, ... to `[rows, a * b * ...]` by adding."""
    return functools.reduce(lambda x, y: (x[:, :, None] + y[:, None]).flatten(1), parts)


def _make(pattern, grid, tile, heads, dim, device) -> Iterator[Chunk]:
    windows = along(pattern, "window", len(grid))
    for sides in itertools.product(*_sides(pattern, grid, tile, device)):
        tiles = [len(s.query) for s in sides]
        floats = _floats([s.query.shape[1] for s in sides], [s.key.shape[1] for s in sides], heads, dim)
        rows, total = max(CHUNK_BYTES // (4 * floats), 1), math.prod(tiles)
        for start in range(0, total, rows):
            at = torch.unravel_index(torch.arange(start, min(start + rows, total), device=device), tiles)
            yield Chunk(sides, at, windows)


@functools.lru_cache(maxsize=16)
def _kept(*problem) -> list[Chunk]:
    return list(_make(*problem))


def chunks(
    pattern: Neighborhood, grid: tuple[int, ...], batch: int, heads: int, dim: int, device: torch.device, exact: bool
) -> Iterator[tuple[slice, Chunk]]:
    """Slices of the batch with chunks that cover all queries, for `heads` heads of `dim` channels.

    `exact`: one query per tile, so that no product holds a key that its query does not see.
    """
    tile = (1,) * len(grid) if exact else _tile(along(pattern, "window", len(grid)), heads, dim)
    problem = pattern, grid, tile, heads, dim, device
    for chunk in (_make if exact or math.prod(grid) > MOST_TOKENS_KEPT else _kept)(*problem):
        floats = len(chunk.query) * _floats(chunk.query.shape[1:], chunk.key.shape[1:], heads, dim)
        step = max(CHUNK_BYTES // (4 * floats), 1)
        for first in range(0, batch, step):
            yield slice(first, first + step), chunk
