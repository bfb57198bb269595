"""Query tiles and the keys they need, on one axis at a time; what a tile shape costs; the speed-up bound.

Everything is derived from the intervals of `Axis`: along an axis both ends of a query's interval never decrease, so the
keys that a run of queries needs are one interval, and so are the keys that all of them share. See the README of this
folder.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch

from .patterns import Separable
from .patterns.base import Axis

# Cost model on a CPU, in query-key pairs of 64 channels: copying a key, starting a tile, a chunk of like tiles.
KEY_COST, TILE_COST, CHUNK_COST = 24, 400, 4000
MOST_QUERIES, MOST_PAIRS = 1024, 2**20


def cut(axis: Axis, side: int) -> list[tuple[int, int, int, int]]:
    """Cut an axis into query tiles of at most `side` positions: `(first, stop, first key, stop key)`, keys as a union.

    Tiles do not straddle dilation groups, and do not cut a run of queries that share one interval when the run fits a
    tile.
    """
    tiles = []
    for first, stop in itertools.pairwise(axis.groups):
        while first < stop:
            end = min(first + side, stop)
            if end < stop:
                run = end
                while run > first and (axis.lo[run - 1], axis.hi[run - 1]) == (axis.lo[end], axis.hi[end]):
                    run -= 1
                if first < run < end:
                    end = run
            tiles.append((first, end, axis.lo[first], axis.hi[end - 1]))
            first = end
    return tiles


@functools.lru_cache(maxsize=256)
def tile_sides(pattern: Separable, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Tile side per axis for gathering: the cheapest of the powers of two under the cost model above."""
    options = []
    for axis in pattern.axes(grid):
        sides = [2**i for i in range(axis.extent.bit_length()) if 2**i < axis.extent] + [axis.extent]
        rows = []
        for side in sides:
            tiles = cut(axis, side)
            pairs = [(stop - first) * (last - low) for first, stop, low, last in tiles]
            keys = sum(last - low for _, _, low, last in tiles)
            kinds = len({(stop - first, last - low) for first, stop, low, last in tiles})
            rows.append((side, min(side, axis.extent), max(pairs), sum(pairs), keys, len(tiles), kinds))
        options.append(rows)

    def cost(combination: tuple) -> tuple[float, int]:
        queries, largest, pairs, keys, tiles, kinds = (math.prod(row[i] for row in combination) for i in range(1, 7))
        over = max(queries / MOST_QUERIES, largest / MOST_PAIRS, 1)
        return (over if over > 1 else 1, pairs + KEY_COST * keys + TILE_COST * tiles + CHUNK_COST * kinds)

    return tuple(row[0] for row in min(itertools.product(*options), key=cost))


def visits(axis: Axis, queries: int, keys: int, aligned: bool = False) -> tuple[int, int]:
    """Key tiles of `keys` positions that the query tiles of `queries` positions of one axis visit; how many of them are
    full.

    Unaligned key tiles start where the union of a query tile starts; aligned ones at multiples of `keys`. A visited
    tile is full when every query of the tile sees all of it.
    """
    total = full = 0
    for first in range(0, axis.extent, queries):
        last = min(first + queries, axis.extent) - 1
        lo, hi = axis.lo[first], axis.hi[last]
        start = lo // keys * keys if aligned else lo
        count = max(-(-(hi - start) // keys), 0)
        total += count
        # box r, from start + r * keys on, is full when it starts at lo[last] or later and stops by hi[first]
        full += max(min((axis.hi[first] - start) // keys, count) - max(-(-(axis.lo[last] - start) // keys), 0), 0)
    return total, full


def bound(
    pattern: Separable, grid: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...], aligned: bool = False
) -> tuple[float, float]:
    """Speed-up over dense attention at equal arithmetic rate with these tiles, and the share of visited tiles that are
    full.

    A pattern that is dilated counts as separate problems, one per dilation group.
    """
    counts = []
    for axis, tq, tk in zip(pattern.axes(grid), queries, keys, strict=True):
        groups = [_group(axis, first, stop) for first, stop in itertools.pairwise(axis.groups)]
        counts.append([sum(c) for c in zip(*(visits(group, tq, tk, aligned) for group in groups), strict=True)])
    total, full = (math.prod(c[i] for c in counts) for i in range(2))
    return math.prod(grid) ** 2 / (total * math.prod(queries) * math.prod(keys)), full / total


def _group(axis: Axis, first: int, stop: int) -> Axis:
    shifted = [tuple(x - first for x in ends[first:stop]) for ends in (axis.lo, axis.hi)]
    return Axis(tuple(range(stop - first)), *shifted, (0, stop - first))


@functools.lru_cache(maxsize=256)
def best_bound(
    pattern: Separable, grid: tuple[int, ...], queries: int = 64, keys: int = 64, aligned: bool = False
) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """The largest `bound` over tiles of `queries` and of `keys` tokens with power-of-two sides: bound, query tile, key
    tile.

    Of equal ones the pair of shapes with the most full tiles.
    """
    groups = [
        [_group(axis, first, stop) for first, stop in itertools.pairwise(axis.groups)] for axis in pattern.axes(grid)
    ]

    @functools.cache
    def count(index: int, tq: int, tk: int) -> tuple[int, int]:
        total, full = zip(*(visits(group, tq, tk, aligned) for group in groups[index]), strict=True)
        return sum(total), sum(full)

    def cost(tiles: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int]:
        counts = [count(index, tq, tk) for index, (tq, tk) in enumerate(zip(*tiles, strict=True))]
        return math.prod(c[0] for c in counts), -math.prod(c[1] for c in counts)

    best = min(itertools.product(boxes(queries, len(grid)), boxes(keys, len(grid))), key=cost)
    return math.prod(grid) ** 2 / (cost(best)[0] * queries * keys), *best


def boxes(size: int, rank: int) -> list[tuple[int, ...]]:
    """Shapes of `size` tokens with power-of-two sides."""
    powers = [2**i for i in range(size.bit_length())]
    return [shape for shape in itertools.product(powers, repeat=rank) if math.prod(shape) == size]


def tile_maps(axis: Axis, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For tiles of `side` positions, bool `[tiles, tiles]`: the query tile sees any of the key tile; all of it does."""
    first = torch.arange(0, axis.extent, side)
    last = (first + side).clamp(max=axis.extent) - 1
    lo, hi = torch.tensor(axis.lo), torch.tensor(axis.hi)
    visited = (lo[first][:, None] < first + side) & (first < hi[last][:, None])
    return visited, (lo[last][:, None] <= first) & (first + side <= hi[first][:, None])


@functools.lru_cache(maxsize=256)
def aligned_tile(pattern: Separable, grid: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The box of `size` tokens with power-of-two sides that, as query and key tile in one, makes the fewest visits."""
    axes = pattern.axes(grid)
    return min(
        boxes(size, len(grid)),
        key=lambda s: math.prod(visits(a, t, t, aligned=True)[0] for a, t in zip(axes, s, strict=True)),
    )
