"""Tiles of separable patterns for the CPU kernel: which queries share the lanes of a tile, and which keys they need."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math

import torch

from ..patterns import Separable
from ..patterns.base import Axis
from ..tiles import cut

# Cost of one key for a tile of one and of two vectors of queries, and of a tile in keys: as measured with AVX-512.
KEY_COST, TILE_COST = {1: 1.0, 2: 1.8}, 24


class Side(ctypes.Structure):
    """As in call.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("tiles", "lanes", "kinds")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("query", "kind", "first", "start", "key", "seen")]


class Boxes(ctypes.Structure):
    """As in call.h."""

    _fields_ = [("vectors", ctypes.c_int32), ("group", ctypes.c_int32), ("side", Side * 3)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The structure for C, and the tables it points into."""

    structure: Boxes
    tables: list[torch.Tensor]


@functools.lru_cache(maxsize=64)
def plan(pattern: Separable, grid: tuple[int, ...], group: int, lanes: int) -> Plan:
    """How to cut `grid` for vectors of `lanes` floats when `group` query heads share their keys."""
    axes = [Axis((0,), (0,), (1,), (0, 1))] * (3 - len(grid)) + list(pattern.axes(grid))
    vectors, heads, sides = _shape(axes, group, lanes)
    boxes, tables = Boxes(vectors, heads), []
    for index, (axis, side) in enumerate(zip(axes, sides, strict=True)):
        inner = math.prod(sides[index + 1 :])
        every = sum(1 << (o * side * inner + i) for o in range(heads * math.prod(sides[:index])) for i in range(inner))
        columns = _side(axis, side, [every << (i * inner) for i in range(side)])
        made = [torch.tensor(c, dtype=torch.int64).to(torch.int32) for c in columns]
        boxes.side[index] = Side(len(columns[1]), side, len(columns[3]) - 1, *(t.data_ptr() for t in made))
        tables += made
    return Plan(boxes, tables)


def _shape(axes: list[Axis], group: int, lanes: int) -> tuple[int, int, tuple[int, ...]]:
    """Vectors per tile, query heads and queries along each axis in it: the cheapest under the cost above."""
    most = lanes * max(KEY_COST)
    rows = []
    for axis in axes:
        sides = [s for s in {*(2**i for i in range(6)), axis.extent} if s <= min(most, axis.extent)]
        tiles = [cut(axis, s) for s in sides]
        rows.append([(s, sum(high - low for *_, low, high in t), len(t)) for s, t in zip(sides, tiles, strict=True)])
    heads = sorted(h for h in {*(2**i for i in range(6)), group} if h <= min(most, group))
    best = None
    for h, *combination in itertools.product(heads, *rows):
        sides, keys, tiles = zip(*combination, strict=True)
        vectors = -(-h * math.prod(sides) // lanes)
        if vectors not in KEY_COST:
            continue
        cost = -(-group // h) * (math.prod(keys) + TILE_COST * math.prod(tiles)) * KEY_COST[vectors]
        best = min(best or (math.inf,), (cost, vectors, h, sides))
    return best[1:]


def _side(axis: Axis, side: int, lanes: list[int]) -> tuple[list[int], ...]:
    """The tables of `Side`; `lanes[i]` are the bits of all lanes that hold query i of a tile along this axis."""
    query, kind, first, start, key, seen = [], [], [], [0], [], []
    kinds: dict[tuple, int] = {}
    for begin, stop, low, high in cut(axis, side):
        query += [*axis.order[begin:stop], *[-1] * (side - (stop - begin))]
        first.append(axis.order[low])
        ends = tuple((axis.lo[p] - low, axis.hi[p] - low) for p in range(begin, stop))
        places = tuple(y - axis.order[low] for y in axis.order[low:high])
        number = kinds.setdefault((low - begin, ends, places), len(kinds))
        kind.append(number)
        if number == len(start) - 1:
            key += places
            seen += [
                sum(b for b, (lo, hi) in zip(lanes, ends, strict=False) if lo <= y < hi) for y in range(high - low)
            ]
            start.append(len(key))
    return query, kind, first, start, key, seen
