"""Which rows of a cut grid go from where to where, and what is left to compute on each rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch

from .exchange import Moves
from .patterns import Blocked, BlockList, Pattern, Separable
from .patterns.base import Axis, Predicate
from .patterns.blocks import map_from_lists


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


def spans(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First row and one past the last of every rank."""
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    return tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))


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
        return span(self.own[rank], self.need[rank])

    def received(self, rank: int) -> int:
        """Rows that a rank gets from others."""
        return sum(b - a for a, b in (self.rows(giver, rank) for giver in range(len(self.own))))

    def moves(self, rank: int) -> Moves:
        (start, stop), (low, high) = self.own[rank], self.held(rank)
        give, take = {}, {}
        for other in range(len(self.own)):
            for found, (first, last), origin in (
                (give, self.rows(rank, other), start),
                (take, self.rows(other, rank), low),
            ):
                if last > first:
                    found[other] = slice(first - origin, last - origin)
        return Moves(self.axis + 1, high - low, slice(start - low, stop - low), give, take)


def route(pattern: Separable, grid: tuple[int, ...], axis: int, sizes: tuple[int, ...]) -> Route:
    """Plan the exchange for ranks that hold `sizes` rows each.

    >>> from vision_attn import Neighborhood
    >>> route(Neighborhood(window=5), (12, 8), 0, (4, 4, 4)).need
    ((0, 6), (2, 10), (6, 12))
    """
    own = spans(sizes)
    return Route(axis, own, tuple(needed(pattern, grid, axis, *rows) for rows in own))


def span(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The shortest run of rows that holds both."""
    return min(a[0], b[0]), max(a[1], b[1])


@functools.lru_cache(maxsize=256)
def inner(pattern: Separable, grid: tuple[int, ...], axis: int, own: tuple[int, int]) -> tuple[int, int]:
    """The longest run of own rows that see own rows only."""
    runs, start = [(own[0], own[0])], None
    for row in range(own[0], own[1] + 1):
        alone = row < own[1] and span(needed(pattern, grid, axis, row, row + 1), own) == own
        if alone and start is None:
            start = row
        if not alone and start is not None:
            runs.append((start, row))
            start = None
    return max(runs, key=lambda run: run[1] - run[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Renumbered(Pattern):
    """A pattern on some tokens of its grid: token `i` here is `tokens[i]` there."""

    pattern: Pattern
    grid: tuple[int, ...]
    tokens: torch.Tensor

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        allowed, tokens = self.pattern.predicate(self.grid, device), self.tokens.to(device)
        return lambda query, key: allowed(tokens[query], tokens[key])


@dataclasses.dataclass(frozen=True, eq=False)
class BlockRoute:
    """What one rank exchanges and computes of a pattern made of block lists.

    Args:
        moves: of tokens of the flattened sequence.
        pattern: what its queries see, on a line of the tokens it holds; queries of others see nothing there.
        rows: which rows of the whole lists these are, and how many slots they have, to cut a bias to them.
    """

    moves: Moves
    pattern: BlockList
    rows: torch.Tensor

    def bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias[..., self.rows.to(bias.device), : self.pattern.index.shape[-1]]


# Static patterns come again with every layer and step; a list that is new in every call pushes old ones out.
@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept for calls that have gradients
def block_route(
    pattern: Blocked, grid: tuple[int, ...], axis: int, sizes: tuple[int, ...], rank: int, device: torch.device
) -> BlockRoute:
    """Plan the exchange of a pattern made of block lists: a rank gets the tokens of the key blocks that any of its
    query blocks visits, whatever the batch entry and head."""
    pattern.check(grid)
    lists = pattern.lists(grid, "cpu")
    tokens, (queries, keys) = math.prod(grid), lists.block
    visited = map_from_lists(lists.index, lists.count, -(-tokens // keys))
    visited = visited.reshape(-1, *visited.shape[-2:]).any(0)
    row = torch.arange(tokens) // math.prod(grid[axis + 1 :]) % grid[axis]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[row]
    mine = (owner == rank).nonzero().flatten()

    def need(taker: int) -> torch.Tensor:
        """Which tokens a rank needs, bool."""
        rows = ((owner == taker).nonzero().flatten() // queries).unique()
        return visited[rows].any(0).repeat_interleave(keys)[:tokens]

    unit = math.lcm(queries, keys)  # whole units are held, so that blocks stay what they are
    units = torch.arange(tokens) // unit
    wanted = need(rank)
    here = torch.zeros(-(-tokens // unit), dtype=torch.bool).index_fill_(0, units[wanted | (owner == rank)], True)
    held = here[units].nonzero().flatten()
    place = here[units].cumsum(0) - 1
    give, take = {}, {}
    for other in range(len(sizes)):
        if other != rank:
            give[other] = need(other)[mine].nonzero().flatten().to(device)
            take[other] = place[((owner == other) & wanted).nonzero().flatten()].to(device)
    give, take = ({other: rows for other, rows in found.items() if rows.numel()} for found in (give, take))

    rows, blocks = (held[::side] // side for side in lists.block)
    own = torch.zeros(len(visited), dtype=torch.bool).index_fill_(0, mine // queries, True)[rows]
    renumbered = torch.zeros(visited.shape[1], dtype=torch.long).index_copy_(0, blocks, torch.arange(len(blocks)))
    slots = max(min(lists.index.shape[-1], len(blocks)), 1)
    count, full = (t[..., rows] * own for t in (lists.count, lists.full_count))
    listed = torch.arange(slots) < count[..., None]
    index = renumbered[torch.where(listed, lists.index[..., rows, :slots].long(), blocks[0])]
    within = pattern.within if isinstance(pattern, BlockList) else pattern
    within = None if within is None or torch.equal(count, full) else Renumbered(within, grid, held.to(device))
    parts = [t.to(device=device, dtype=torch.int32) for t in (index, count, full)]
    piece = BlockList(lists.block, *parts[:2], None if within is None else parts[2], within)
    moves = Moves(1, len(held), place[mine].to(device), give, take)
    return BlockRoute(moves, piece, rows)
