"""Attention on a grid that is cut along one axis over the ranks of a process group, exchanging only the rows that the
windows of other ranks reach."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .patterns import Circle, Dense, Pattern, Separable
from .patterns.base import Axis
from .problem import describe


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a grid is cut over ranks: each holds neighbouring rows along one axis, as many as it likes.

    Args:
        axis: of the grid, from 0.
        group: of processes; all of them when None.
        overlap: compute what needs no rows of others while these are on their way.
    """

    axis: int = 0
    group: Any = None
    overlap: bool = True


@dataclasses.dataclass(frozen=True)
class Part(Separable):
    """What some rows of a pattern see, on the part of the grid that holds the keys they need.

    Args:
        pattern, grid: the whole.
        cut: the axis that is cut.
        keys: first row and one past the last that are there.
        rows: the same of those whose result is wanted; the others see one key each, which costs least.
    """

    pattern: Separable
    grid: tuple[int, ...]
    cut: int
    keys: tuple[int, int]
    rows: tuple[int, int]
    name: ClassVar[str] = "part"

    def axis(self, extent: int, index: int) -> Axis:
        whole = self.pattern.axes(self.grid)[index]
        if index != self.cut:
            return whole
        there, wanted = range(*self.keys), range(*self.rows)
        order, lo, hi, groups = [], [], [], [0]
        for first, stop in zip(whole.groups, whole.groups[1:], strict=False):
            start = len(order)
            here = [p for p in range(first, stop) if whole.order[p] in there]
            real = [p for p in here if whole.order[p] in wanted]
            for p in here:
                if p in real:
                    ends = whole.lo[p] - here[0] + start, whole.hi[p] - here[0] + start
                elif not real or p < real[0]:
                    ends = start, start + 1
                else:  # both ends never decrease
                    ends = start + len(here) - 1, start + len(here)
                lo.append(ends[0])
                hi.append(ends[1])
            order += [whole.order[p] - there.start for p in here]
            groups.append(len(order))
        return Axis(tuple(order), tuple(lo), tuple(hi), tuple(groups))

    def reach(self, rank: int) -> tuple[int, ...] | None:
        return self.pattern.reach(rank)


@functools.lru_cache(maxsize=256)
def needed(pattern: Separable, grid: tuple[int, ...], axis: int, first: int, stop: int) -> tuple[int, int]:
    """First row and one past the last along an axis that the queries of rows `first` to `stop` see.

    >>> from vision_attn import Neighborhood
    >>> needed(Neighborhood(window=5), (12, 8), 0, 4, 8)
    (2, 10)
    """
    whole = pattern.axes(grid)[axis]
    places = [whole.places[x] for x in range(first, stop)]
    return min(whole.order[whole.lo[p]] for p in places), 1 + max(whole.order[whole.hi[p] - 1] for p in places)


@dataclasses.dataclass(frozen=True)
class Route:
    """Which rows go from where to where. `own` and `need` are first row and one past the last, per rank."""

    axis: int
    own: tuple[tuple[int, int], ...]
    need: tuple[tuple[int, int], ...]

    def rows(self, giver: int, taker: int) -> tuple[int, int]:
        """What one rank gives another; empty where the second is not above the first."""
        (a, b), (c, d) = self.own[giver], self.need[taker]
        return (max(a, c), max(max(a, c), min(b, d))) if giver != taker else (a, a)

    def held(self, rank: int) -> tuple[int, int]:
        """First row and one past the last that a rank has in the end."""
        return _span(self.own[rank], self.need[rank])

    def received(self, rank: int) -> int:
        """Rows that a rank gets from others."""
        return sum(b - a for a, b in (self.rows(giver, rank) for giver in range(len(self.own))))


def route(pattern: Separable, grid: tuple[int, ...], axis: int, sizes: tuple[int, ...]) -> Route:
    """Plan the exchange for ranks that hold `sizes` rows each.

    >>> from vision_attn import Neighborhood
    >>> route(Neighborhood(window=5), (12, 8), 0, (4, 4, 4)).need
    ((0, 6), (2, 10), (6, 12))
    """
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    own = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
    return Route(axis, own, tuple(needed(pattern, grid, axis, *rows) for rows in own))


@dataclasses.dataclass
class Traffic:
    """Bytes that this process received and sent in sharded attention."""

    received: int = 0
    sent: int = 0


_COUNTING: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes of keys, values and their gradients that sharded attention moves meanwhile, in this process."""
    traffic = Traffic()
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        _COUNTING.remove(traffic)


class _Exchange:
    """Tensors on their way: `give[rank]` to each, and what `take[rank]` (shapes) says from each."""

    def __init__(self, give: dict[int, torch.Tensor], take: dict[int, torch.Tensor], group: Any) -> None:
        self.take, self.group = take, group
        peer = functools.partial(dist.get_global_rank, group or dist.group.WORLD)
        ops = [dist.P2POp(dist.isend, tensor, peer(rank), group) for rank, tensor in give.items()]
        ops += [dist.P2POp(dist.irecv, tensor, peer(rank), group) for rank, tensor in take.items()]
        self.give = give  # alive until it is sent
        for traffic in _COUNTING:
            traffic.sent += sum(t.nbytes for t in give.values())
            traffic.received += sum(t.nbytes for t in take.values())
        self.peers = sorted({*give, *take})
        with _contact(self.peers, group):
            self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> dict[int, torch.Tensor]:
        with _contact(self.peers, self.group):
            for work in self.works:
                work.wait()
        return self.take


@contextlib.contextmanager
def _contact(peers: Any, group: Any) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} could not exchange rows with ranks {list(peers)}: one of them ended, or did "
            "not make the same call in time"
        ) from error


class _Share(torch.autograd.Function):
    """Keys and values of this rank, and room for those of all rows it needs, with its own in place; the rows of others
    are on their way, in `pending`. Backward sends gradients back to where the rows came from.

    One function gives both, so that its backward runs on every rank, whatever its queries see.
    """

    @staticmethod
    def forward(ctx, k, v, route: Route, rank: int, pending: _Pending):
        ctx.route, ctx.rank, ctx.group, dim = route, rank, pending.group, route.axis + 1
        (start, stop), (low, high) = route.own[rank], route.held(rank)
        give, take = {}, {}
        for other in range(len(route.own)):
            first, last = route.rows(rank, other)
            if last > first:
                give[other] = torch.cat([t.narrow(dim, first - start, last - first).flatten() for t in (k, v)])
            first, last = route.rows(other, rank)
            if last > first:
                take[other] = k.new_empty(sum(t.numel() // t.shape[dim] for t in (k, v)) * (last - first))
        pending.exchange = _Exchange(give, take, pending.group)
        wide = [t.new_empty(*t.shape[:dim], high - low, *t.shape[dim + 1 :]) for t in (k, v)]
        for room, own in zip(wide, (k, v), strict=True):
            room.narrow(dim, start - low, stop - start).copy_(own)
        return k.view_as(k), v.view_as(v), *wide

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        route, rank, dim = ctx.route, ctx.rank, ctx.route.axis + 1
        (start, stop), (low, _) = route.own[rank], route.held(rank)
        own, wide = [g.clone() for g in grads[:2]], grads[2:]
        give, take = {}, {}
        for other in range(len(route.own)):
            first, last = route.rows(other, rank)  # what came from there
            if last > first:
                give[other] = torch.cat([g.narrow(dim, first - low, last - first).flatten() for g in wide])
            first, last = route.rows(rank, other)
            if last > first:
                take[other] = own[0].new_empty(sum(g.numel() // g.shape[dim] for g in own) * (last - first))
        exchange = _Exchange(give, take, ctx.group)
        for mine, all_of_it in zip(own, wide, strict=True):
            mine += all_of_it.narrow(dim, start - low, stop - start)
        for other, flat in exchange.wait().items():
            first, last = route.rows(rank, other)
            for mine, part in zip(own, _parts(flat, own, dim, last - first), strict=True):
                mine.narrow(dim, first - start, last - first).add_(part)
        return *own, None, None, None


@dataclasses.dataclass
class _Pending:
    """Rows of others on their way to this rank."""

    group: Any
    exchange: _Exchange | None = None

    def put(self, route: Route, rank: int, wide: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Wait, and put them where they belong."""
        dim, low = route.axis + 1, route.held(rank)[0]
        with torch.no_grad():
            for other, flat in self.exchange.wait().items():
                first, last = route.rows(other, rank)
                for room, part in zip(wide, _parts(flat, wide, dim, last - first), strict=True):
                    room.narrow(dim, first - low, last - first).copy_(part)


def _parts(flat: torch.Tensor, like: Any, dim: int, rows: int) -> list[torch.Tensor]:
    """Rows of keys and of values, sent as one vector."""
    shapes = [(*t.shape[:dim], rows, *t.shape[dim + 1 :]) for t in like]
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def attend_sharded(q, k, v, pattern: Pattern, shards: Shards, options: dict[str, Any]):
    """`attend` on the rows of this rank: q, k and v are its shares, and so is the result."""
    from .attend import attend

    extra_kv, extra_mask, lse = (options.get(name) for name in ("extra_kv", "extra_mask", "return_lse"))
    problem = describe(q, k, v, Dense(), options.get("scale"), extra_kv, extra_mask, None, bool(lse))
    _check(pattern, shards, problem)
    grid, sizes = _agree(problem, pattern, shards)
    plan = route(pattern, grid, shards.axis, sizes)
    rank = dist.get_rank(shards.group)
    own = plan.own[rank]
    pending = _Pending(shards.group)
    k, v, *wide = _Share.apply(k, v, plan, rank, pending)

    def local(keys: tuple[int, int], rows: tuple[int, int], k, v, held: tuple[int, int]):
        """Results of some rows, with keys and values of the rows `held`, of which `keys` are used."""
        cut = functools.partial(_rows, axis=shards.axis)
        padded = _rows(q, own, keys, shards.axis)
        found = attend(
            padded, cut(k, held, keys), cut(v, held, keys), _part(pattern, grid, shards.axis, keys, rows), **options
        )
        return [cut(t, keys, rows) for t in (found if lse else (found,))]

    inner = _inner(pattern, grid, shards.axis, own)
    pieces = {}
    if shards.overlap and pending.exchange.works and inner[1] > inner[0]:
        pieces[inner] = local(own, inner, k, v, own)
    else:
        inner = own[0], own[0]
    pending.put(plan, rank, wide)
    for rows in ((own[0], inner[0]), (inner[1], own[1])):
        if rows[1] > rows[0]:
            keys = _span(needed(pattern, grid, shards.axis, *rows), rows)
            pieces[rows] = local(keys, rows, *wide, plan.held(rank))
    parts = zip(*(pieces[rows] for rows in sorted(pieces)), strict=True)
    out = tuple(torch.cat(part, shards.axis + 1) for part in parts)
    return out if lse else out[0]


def _check(pattern: Pattern, shards: Shards, problem: Any) -> None:
    if not 0 <= shards.axis < len(problem.grid):
        raise ValueError(f"Shards(axis={shards.axis}): the grid has {len(problem.grid)} axes, numbered from 0")
    if not isinstance(pattern, Separable):
        raise ValueError(
            f"{type(pattern).__name__} has no windows along an axis, so the rows that it needs are not known"
        )
    if isinstance(pattern, Circle) and pattern.pooled is not None:
        raise ValueError("Circle(pooled=...) needs the pooled keys of the whole grid on every rank; use pooled=None")
    if isinstance(pattern, Circle) and shards.axis < len(problem.grid) - 2:
        raise ValueError("Circle sees every frame, so nothing is gained by cutting frames; cut rows or columns")


def _agree(problem: Any, pattern: Pattern, shards: Shards) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The whole grid and the rows of every rank; raises on all of them when their calls do not fit together."""
    names = (
        "grid axes",
        "batch",
        "heads",
        "KV heads",
        "head_dim",
        "value_dim",
        "dtype",
        "extra tokens",
        "pattern",
        "axis",
    )
    grid = list(problem.grid)
    rows, grid[shards.axis] = grid[shards.axis], 0
    code = zlib.crc32(repr(pattern).encode())
    kind = zlib.crc32(str(problem.dtype).encode())
    fields = [len(grid), problem.batch, problem.heads, problem.kv_heads, problem.head_dim, problem.value_dim, kind]
    mine = [*fields, problem.extra, code, shards.axis, *grid, *[0] * (3 - len(grid)), rows]
    tensor = torch.tensor(mine, device=problem.device)
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(shards.group))]
    with _contact(range(len(everyone)), shards.group):
        dist.all_gather(everyone, tensor, group=shards.group)
    table = [t.tolist() for t in everyone]
    for column, name in enumerate((*names, "grid", "grid", "grid")):
        values = [row[column] for row in table]
        if len(set(values)) > 1:
            shown = "" if name in ("dtype", "pattern") else f": {values}, rank by rank"
            raise ValueError(f"the ranks differ in {name}{shown}; only the rows along the cut axis may differ")
    sizes = tuple(row[-1] for row in table)
    if min(sizes) < 1:
        raise ValueError(f"every rank needs at least one row along axis {shards.axis}; they hold {sizes}")
    grid[shards.axis] = sum(sizes)
    return tuple(grid), sizes


def _part(
    pattern: Separable, grid: tuple[int, ...], axis: int, keys: tuple[int, int], rows: tuple[int, int]
) -> Pattern:
    if isinstance(pattern, Circle) or (keys == rows == (0, grid[axis])):
        return pattern  # a disc does not know where the grid ends
    return Part(pattern, grid, axis, keys, rows)


def _rows(tensor: torch.Tensor, held: tuple[int, int], wanted: tuple[int, int], axis: int) -> torch.Tensor:
    """Rows `wanted` along an axis of a tensor that holds rows `held`; zeros where it does not."""
    dim = axis + 1
    first, stop = max(held[0], wanted[0]), min(held[1], wanted[1])
    part = tensor.narrow(dim, first - held[0], stop - first)
    if (first, stop) == wanted:
        return part
    return F.pad(part, (*[0, 0] * (tensor.ndim - 1 - dim), first - wanted[0], wanted[1] - stop))


def _span(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


@functools.lru_cache(maxsize=256)
def _inner(pattern: Separable, grid: tuple[int, ...], axis: int, own: tuple[int, int]) -> tuple[int, int]:
    """The longest run of own rows that see own rows only."""
    runs, start = [(own[0], own[0])], None
    for row in range(own[0], own[1] + 1):
        alone = row < own[1] and _span(needed(pattern, grid, axis, row, row + 1), own) == own
        if alone and start is None:
            start = row
        if not alone and start is not None:
            runs.append((start, row))
            start = None
    return max(runs, key=lambda run: run[1] - run[0])
