"""Box arithmetic on the host: which boxes of keys a box of queries visits, and which of them need no test.

Every axis is cut into own tiles of positions (see `Axis`) that stay inside one dilation group. A tile visits the boxes
that start where the union of its intervals starts, one after another, up to the end of the union; those inside the
intersection are full, and they follow one another too. The boxes of a grid are the products over its axes, so a kernel
needs one row of eight integers per tile and axis, and no lists. With `transposed` axes the same rows serve the
gradients of the keys: own tiles are keys then, and the visited boxes are queries.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from ..patterns import Circle, Separable
from ..patterns.base import Axis, plain_axis

ONE = Axis((0,), (0,), (1,), (0, 1))  # stands for the leading axes that a grid of fewer than three lacks


class Row(NamedTuple):
    """One tile of an axis. All are positions, except `count` and `full_*`, which number the visited boxes."""

    first: int
    stop: int  # one past the last own position
    start: int  # where the first visited box starts
    end: int  # one past the last position to visit
    count: int
    full_first: int
    full_stop: int
    shift: int  # coordinate = shift + step * position


def step(axis: Axis) -> int | None:
    """Distance of neighbouring positions on the grid, the same in all dilation groups; None when there is no such
    number."""
    groups = [axis.order[a:b] for a, b in itertools.pairwise(axis.groups)]
    steps = {y - x for group in groups for x, y in itertools.pairwise(group)} or {1}
    return steps.pop() if len(steps) == 1 else None


def transposed(axis: Axis) -> Axis:
    """The same pairs seen from the keys: the queries of a key are one interval too, since both ends never decrease."""
    lo = [0] * axis.extent
    hi = [0] * axis.extent
    first = stop = 0
    for key in range(axis.extent):
        while first < axis.extent and axis.hi[first] <= key:
            first += 1
        while stop < axis.extent and axis.lo[stop] <= key:
            stop += 1
        lo[key], hi[key] = first, stop
    return Axis(axis.order, tuple(lo), tuple(hi), axis.groups)


def rows(axis: Axis, sure: Axis, own: int, seen: int) -> list[Row]:
    """The tiles of `own` positions of an axis and the boxes of `seen` positions they visit.

    `sure` holds the intervals inside which no further test is needed: `axis` itself, unless the pattern is no product.
    """
    out = []
    stride = step(axis)
    for low, high in itertools.pairwise(axis.groups):
        for first in range(low, high, own):
            stop = min(first + own, high)
            start, end = axis.lo[first], axis.hi[stop - 1]
            count = max(-(-(end - start) // seen), 0)
            full_first = max(-(-(sure.lo[stop - 1] - start) // seen), 0)
            full_stop = min((sure.hi[first] - start) // seen, count)
            if full_stop <= full_first:
                full_first = full_stop = 0
            shift = axis.order[low] - stride * low
            out.append(Row(first, stop, start, end, count, full_first, full_stop, shift))
    return out[::-1] if out[0].count < out[-1].count else out  # causal: long tiles start first


@functools.lru_cache(maxsize=256)
def axes(pattern: Separable, grid: tuple[int, ...], keys_own: bool = False) -> tuple[tuple[Axis, Axis], ...]:
    """Three `(axis, sure)`, leading ones of one token; with `keys_own` seen from the keys."""
    found = [(axis, axis) for axis in pattern.axes(grid)]
    if isinstance(pattern, Circle):  # the largest square in the disc is free of the further test
        half = math.isqrt((pattern.radius**2 - 1) // 2)
        for index in (-2, -1):
            extent = grid[index]
            square = plain_axis([(max(x - half, 0), min(x + half + 1, extent)) for x in range(extent)])
            found[index] = found[index][0], square
    if keys_own:
        found = [tuple(map(transposed, pair)) for pair in found]
    return ((ONE, ONE),) * (3 - len(grid)) + tuple(found)


@functools.lru_cache(maxsize=256)
def steps(pattern: Separable, grid: tuple[int, ...]) -> tuple[int | None, ...]:
    """`step` of three axes."""
    return tuple(step(axis) for axis, _ in axes(pattern, grid))


class Boxes(NamedTuple):
    """Sides of own and visited boxes, and what they cost: visits of boxes, full ones among them, own tiles."""

    own: tuple[int, int, int]
    seen: tuple[int, int, int]
    visits: int
    full: int
    tiles: int


@functools.lru_cache(maxsize=1024)
def best_boxes(
    pattern: Separable, grid: tuple[int, ...], own: int, seen: int, keys_own: bool = False, extra: int = 0
) -> Boxes:
    """The boxes of `own` and `seen` tokens with power-of-two sides that make the fewest visits; on ties, that have the
    most full boxes.

    `extra` counts the boxes of extra tokens that every own tile visits besides.
    """
    found, missing = axes(pattern, grid, keys_own), 3 - len(grid)

    @functools.cache
    def cost(index: int, own_side: int, seen_side: int) -> tuple[int, int, int]:
        tiles = rows(*found[index], own_side, seen_side)
        return sum(r.count for r in tiles), sum(r.full_stop - r.full_first for r in tiles), len(tiles)

    def boxes(sides: tuple) -> Boxes:
        costs = (cost(index, *pair) for index, pair in enumerate(zip(*sides, strict=True)))
        return Boxes(*sides, *map(math.prod, zip(*costs, strict=True)))

    options = (boxes(sides) for sides in itertools.product(shapes(own, missing), shapes(seen, missing)))
    return min(options, key=lambda b: (b.visits + b.tiles * extra, -b.full))


def shapes(tokens: int, missing: int) -> list[tuple[int, int, int]]:
    """Boxes of `tokens`, a power of two, with power-of-two sides; 1 on the first `missing` axes."""
    powers = [2**i for i in range(tokens.bit_length())]
    free = itertools.product(powers, repeat=3 - missing)
    return [(1,) * missing + sides for sides in free if math.prod(sides) == tokens]
