"""Tiles of separable patterns for the CPU kernel: which queries share the lanes of a tile, and which keys they need."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math

import torch

from ..patterns import Circle, Separable
from ..patterns.base import Axis
from ..tiles import cut

# What a key costs a tile of two vectors of queries: this much once, and the rest for every vector that sees it (a tile
# of one vector: 1). What a tile costs on top, in keys. As measured with AVX-512.
SHARED, TILE_COST = 0.25, 24


class Side(ctypes.Structure):
    """As in call.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("tiles", "lanes", "kinds")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("query", "kind", "first", "start", "key", "seen")]


class Boxes(ctypes.Structure):
    """As in call.h."""

    _fields_ = [*((n, ctypes.c_int32) for n in ("vectors", "group", "radius")), ("side", Side * 3)]


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
    boxes, tables = Boxes(vectors, heads, pattern.radius if isinstance(pattern, Circle) else 0), []
    for index, (axis, side) in enumerate(zip(axes, sides, strict=True)):
        inner = math.prod(sides[index + 1 :])
        every = sum(1 << (o * side * inner + i) for o in range(heads * math.prod(sides[:index])) for i in range(inner))
        columns = _side(axis, side, [every << (i * inner) for i in range(side)])
        made = [torch.tensor(c, dtype=torch.int64, device="cpu").to(torch.int32) for c in columns]
        boxes.side[index] = Side(len(columns[1]), side, len(columns[3]) - 1, *(t.data_ptr() for t in made))
        tables += made
    return Plan(boxes, tables)


@functools.lru_cache(maxsize=64)
def places(pattern: Separable, grid: tuple[int, ...]) -> tuple[torch.Tensor, dict]:
    """Where a relative bias has the entry of a pair: `place`, int32 `[tokens]`, and the other numbers of `Call`."""
    axes, reaches = pattern.axes(grid), pattern.reach(len(grid))
    spans = [1] * (3 - len(grid)) + [2 * reach - 1 for reach in reaches]
    place, middle = torch.zeros(1, dtype=torch.int64, device="cpu"), 0
    for axis, reach in zip(axes, reaches, strict=True):
        place = (place[:, None] * (2 * reach - 1) + torch.tensor(axis.places, device="cpu")).flatten()
        middle = middle * (2 * reach - 1) + reach - 1
    step = (ctypes.c_int64 * 2)(spans[1] * spans[2], spans[2])
    return place.to(torch.int32), dict(entries=math.prod(spans), middle=middle, step=step)


def _shape(axes: list[Axis], group: int, lanes: int) -> tuple[int, int, tuple[int, ...]]:
    """Vectors per tile, query heads and queries along each axis in it: the cheapest under the cost above."""
    powers, rows = [2**i for i in range((2 * lanes).bit_length())], []
    for axis in axes:
        tiles = {s: cut(axis, s) for s in {*powers, axis.extent} if s <= min(2 * lanes, axis.extent)}
        rows.append({s: (sum(high - low for *_, low, high in t), len(t)) for s, t in tiles.items()})
    best = (float("inf"),)
    for heads, *sides in itertools.product({h for h in {*powers, group} if h <= group}, *rows):
        vectors = -(-heads * math.prod(sides) // lanes)
        if vectors > 2:
            continue
        keys, tiles = (math.prod(row[side][i] for row, side in zip(rows, sides, strict=True)) for i in range(2))
        seen = keys
        if vectors == 2:  # each vector is half of the tile, and where no query head is split also half as long
            outer = next((i for i, side in enumerate(sides) if side > 1), 0)
            half = rows[outer].get(sides[outer] // 2, rows[outer][sides[outer]])[0] / 2
            each = keys if heads > 1 else keys * half / rows[outer][sides[outer]][0]
            seen = SHARED * keys + (1 - SHARED) * 2 * each
        cost = -(-group // heads) * (seen + TILE_COST * tiles)
        best = min(best, (cost, vectors, heads, tuple(sides)))
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
