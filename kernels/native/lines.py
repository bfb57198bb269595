"""Separable patterns for the form of the CPU kernel that has keys in its lanes, and when that form is taken."""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch

from ..patterns import Circle, Separable
from ..patterns.base import Axis
from ..problem import Problem
from ..tiles import cut

QUERIES = 32  # in a tile, as in lines.h; and the columns below are COLUMNS at most


class Side(ctypes.Structure):
    """Axis in call.h."""

    _fields_ = [("tiles", ctypes.c_int32), *((n, ctypes.c_void_p) for n in ("order", "low", "high", "cut"))]


class Rows(ctypes.Structure):
    """As in call.h."""

    _fields_ = [
        ("first", ctypes.c_void_p), ("batch", ctypes.c_int64), ("axis", ctypes.c_int64 * 3), ("head", ctypes.c_int64)
    ]  # fmt: skip

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Rows:
        stride = tensor.stride()
        return cls(tensor.data_ptr(), stride[0], (0,) * (6 - tensor.ndim) + stride[1:-2], stride[-2])


class Lines(ctypes.Structure):
    """As in call.h."""

    _fields_ = [("key", Rows), ("value", Rows), ("axis", Side * 3)]


def chosen(problem: Problem, lanes: int) -> bool:
    """Whether a call is computed with keys in the lanes: where that is possible, and was measured to be faster."""
    pattern = problem.pattern
    if not isinstance(pattern, Separable) or isinstance(pattern, Circle) or problem.extra:
        return False
    return len(pattern.axes(problem.grid)[-1].groups) == 2 and faster(pattern, problem.grid, lanes)


@functools.lru_cache(maxsize=256)
def faster(pattern: Separable, grid: tuple[int, ...], lanes: int) -> bool:
    """Most lanes are keys that a query sees, two rows of a tile or more share a line, and few planes of a video are
    seen.

    As measured with AVX-512, heads of 64, on 64 x 64 tokens: slower at windows below 7, even there, 1.2 times as fast
    at 11 and 13; at (w, 13) faster from w = 3 on. On 8 x 32 x 32, (w, 13, 13): 1.1 times as fast at w = 5, slower at 8.
    """
    planes, rows, columns = _axes(pattern, grid)
    side = _columns(columns, lanes)
    full = _seen(columns) > 2 / 3 * lanes * _vectors(columns, side, lanes)
    needed = sum(high - low for *_, low, high in cut(rows, QUERIES // side))
    return full and _seen(rows) >= 2 * needed and _seen(planes) <= 5 * planes.extent


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sides for C, and the tables they point into."""

    sides: list[Side]
    tables: list[torch.Tensor]

    def structure(self, key: torch.Tensor, value: torch.Tensor) -> Lines:
        return Lines(Rows.of(key), Rows.of(value), (Side * 3)(*self.sides))


@functools.lru_cache(maxsize=64)
def plan(pattern: Separable, grid: tuple[int, ...], lanes: int) -> Plan:
    axes = _axes(pattern, grid)
    across = _columns(axes[2], lanes)
    sides, tables = [], []
    for axis, side in zip(axes, (1, QUERIES // across, across), strict=True):
        cuts = [first for first, *_ in cut(axis, side)] + [axis.extent]
        made = [torch.tensor(t, dtype=torch.int32, device="cpu") for t in (axis.order, axis.lo, axis.hi, cuts)]
        sides.append(Side(len(cuts) - 1, *(t.data_ptr() for t in made)))
        tables += made
    return Plan(sides, tables)


def _axes(pattern: Separable, grid: tuple[int, ...]) -> list[Axis]:
    return [Axis((0,), (0,), (1,), (0, 1))] * (3 - len(grid)) + list(pattern.axes(grid))


def _seen(axis: Axis) -> int:
    return sum(axis.hi) - sum(axis.lo)


def _columns(axis: Axis, lanes: int) -> int:
    """How many queries of a tile lie along the last axis: those that need the fewest vectors of keys."""
    return min((4, 2, 1), key=lambda side: _vectors(axis, side, lanes))


def _vectors(axis: Axis, side: int, lanes: int) -> int:
    """Vectors of keys that all queries along the axis need together, when tiles are `side` long."""
    return sum((stop - first) * -(-(high - low) // lanes) for first, stop, low, high in cut(axis, side))
