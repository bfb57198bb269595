"""How many bytes attention on a cut grid moves: the rows or blocks that are seen, all keys, or Ulysses' exchange."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import torch

from .patterns import Blocked, Circle, Pattern, PerHead, Separable
from .patterns.blocks import map_from_lists
from .routes import route, spans

# Tokens of a Wan-like model: 81 frames, of which every fourth is kept, in patches of 16 x 16 pixels.
VIDEOS = {"720p": (21, 45, 80), "4k": (21, 135, 240), "8k": (21, 270, 480)}
WORLDS = tuple(2**n for n in range(1, 11))


@dataclasses.dataclass(frozen=True)
class Volume:
    """Bytes that the busiest rank receives in one layer's forward call.

    `axis` is the one that is cut and `peers` from how many ranks it hears; `halo` is `attend(..., parallel=Shards())`,
    None where the axis has fewer rows than there are ranks. `all_gather` moves all keys and values. `ulysses` swaps
    tokens for heads before and after, for q, k, v and the result; None where the ranks do not divide the heads.
    """

    ranks: int
    axis: int | None
    peers: int
    halo: int | None
    all_gather: int
    ulysses: int | None

    @property
    def least(self) -> str:
        """What moves least, "halo" where it moves as much as others do not."""
        ways = {"halo": self.halo, "all-gather": self.all_gather, "Ulysses": self.ulysses}
        there = {way: moved for way, moved in ways.items() if moved is not None}
        return min(there, key=lambda way: (there[way], way == "halo"))


def volumes(
    pattern: Pattern,
    grid: tuple[int, ...],
    ranks: Iterable[int] = WORLDS,
    *,
    axis: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Volume]:
    """Bytes moved per layer by three ways to share one attention call, for numbers of ranks.

    Rows are dealt as evenly as they go. Text is on all ranks, so it is not counted.

    Args:
        pattern, grid: as in `attend`; a `PerHead` stands for as many times its heads as `heads` says.
        ranks: how many, each from 2.
        axis: that is cut, from 0; None takes the one whose busiest rank receives least.
        heads: times the batch; also of keys and values unless `kv_heads` says another number.
        head_dim: channels per head, of values too.
        dtype: of what is moved.

    Raises:
        ValueError, TypeError: a pattern that cannot be cut, numbers out of range.

    >>> from vision_attn import Neighborhood
    >>> v = volumes(Neighborhood((18, 24, 24)), VIDEOS["720p"], [8], heads=40)[0]
    >>> v.axis, v.halo < v.all_gather / 2, v.least
    (2, True, 'Ulysses')
    """
    kv_heads = heads if kv_heads is None else kv_heads
    parts = ((1, pattern),)
    if isinstance(pattern, PerHead):  # parts exchange one after the other, each for its share of the heads
        if heads % pattern.heads or any(count * kv_heads % pattern.heads for count, _ in pattern.parts):
            raise ValueError(f"heads={heads} with {kv_heads} of keys do not fit a pattern of {pattern.heads} heads")
        parts = pattern.parts
    for _, part in parts:
        if not isinstance(part, (Separable, Blocked)) or part.score_rule(grid) is not None:
            raise ValueError(f"{type(part).__name__} cannot be cut over ranks: the rows that it needs are not known")
    pattern.check(grid)
    if axis is not None and not 0 <= axis < len(grid):
        raise ValueError(f"axis={axis}: the grid has {len(grid)} axes, numbered from 0")
    found = []
    for count in ranks:
        if type(count) is not int or count < 2:
            raise ValueError(f"ranks must be whole numbers from 2; got {count!r}")
        each = 2 * kv_heads * head_dim * dtype.itemsize  # bytes of a token's key and value
        tokens = math.prod(grid)
        swapped = (2 * heads + 2 * kv_heads) * head_dim * dtype.itemsize
        share = -(-tokens // count)
        ulysses = None
        if not heads % count and not kv_heads % count:  # what a rank gets of others: their tokens, its heads; and back
            ulysses = -(-(swapped * share * (count - 1)) // count)
        cuts = []
        for cut in range(len(grid)) if axis is None else (axis,):
            whole = any(isinstance(part, Circle) for _, part in parts) and cut < len(grid) - 2  # sees every frame
            if grid[cut] >= count and not whole:
                moved, peers = _busiest(parts, grid, cut, even(grid[cut], count))
                cuts.append((moved, cut, peers))
        moved, cut, peers = min(cuts) if cuts else (None, None, 0)
        least = min(even(tokens, count)) if cut is None else tokens // grid[cut] * min(even(grid[cut], count))
        halo = None if moved is None else moved * each // sum(share for share, _ in parts)
        found.append(Volume(count, cut, peers, halo, (tokens - least) * each, ulysses))
    return found


def stops_paying(pattern: Pattern, grid: tuple[int, ...], *, heads: int = 1, **options: Any) -> int | None:
    """The fewest ranks with which Ulysses moves less than the halo; None where there are none.

    Halos stay as wide as windows however many ranks there are, while Ulysses moves less and less per rank; but it needs
    a number of ranks that divides the heads. Arguments as for `volumes`.
    """
    together = math.gcd(heads, options.get("kv_heads") or heads)
    counts = [n for n in range(2, together + 1) if not together % n]
    found = volumes(pattern, grid, counts, heads=heads, **options)
    return next((v.ranks for v in found if v.halo is not None and v.least == "Ulysses"), None)


def even(rows: int, count: int) -> tuple[int, ...]:
    """Rows of every rank when they are dealt as evenly as they go, the first ones getting one more."""
    return tuple(rows // count + (rank < rows % count) for rank in range(count))


def _busiest(parts: tuple[tuple[int, Pattern], ...], grid, axis: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Tokens times shares of the heads that the busiest rank gets, and from how many ranks at most in one exchange."""
    each = [[(share * moved, peers) for moved, peers in received(part, grid, axis, sizes)] for share, part in parts]
    return max((sum(moved for moved, _ in rank), max(n for _, n in rank)) for rank in zip(*each, strict=True))


@functools.lru_cache(maxsize=256)
def received(pattern: Pattern, grid: tuple[int, ...], axis: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """How many tokens' keys and values each rank gets, and from how many ranks."""
    if isinstance(pattern, Blocked):
        return _blocks_received(pattern, grid, axis, sizes)
    plan, line = route(pattern, grid, axis, sizes), math.prod(grid) // grid[axis]
    found = []
    for rank in range(len(sizes)):
        rows = [b - a for a, b in (plan.rows(giver, rank) for giver in range(len(sizes)))]
        found.append((sum(rows) * line, sum(n > 0 for n in rows)))
    side = getattr(pattern, "pooled", None)
    if side is None:
        return found
    cells = [-(-stop // side) - first // side for first, stop in spans(sizes)]  # lines of them, some from two ranks
    return [(n + (sum(cells) - cells[rank]) * (line // side), len(sizes) - 1) for rank, (n, _) in enumerate(found)]


def _blocks_received(pattern: Blocked, grid, axis: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    lists = pattern.lists(grid)
    tokens, (queries, keys) = math.prod(grid), lists.block
    blocks = -(-tokens // keys)
    visited = map_from_lists(lists.index, lists.count, blocks)
    visited = visited.reshape(-1, *visited.shape[-2:]).any(0)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    owner = owner.view(-1, *[1] * (len(grid) - axis - 1)).expand(grid).flatten()
    place = torch.arange(tokens)
    rows = torch.zeros(len(sizes), len(visited), dtype=torch.bool)
    rows[owner, place // queries] = True
    held = torch.zeros(len(sizes), blocks, dtype=torch.long)  # tokens of each rank in each key block
    held.view(-1).index_add_(0, owner * blocks + place // keys, torch.ones_like(place))
    found = []
    for rank, mine in enumerate(rows):
        taken = held[:, visited[mine].any(0)].sum(1)
        taken[rank] = 0
        found.append((int(taken.sum()), int((taken > 0).sum())))
    return found


def as_text(found: list[Volume], stop: int | None) -> str:
    """The volumes as a table for people."""
    lines = [
        "bytes that the busiest rank receives, per layer and forward call:",
        f"  {'ranks':>5} {'axis':>5} {'halo':>9} {'from':>5} {'all-gather':>11} {'Ulysses':>9}  least",
    ]
    for v in found:
        halo, ulysses = ("-" if n is None else size(n) for n in (v.halo, v.ulysses))
        cut = "-" if v.axis is None else v.axis
        lines.append(f"  {v.ranks:>5} {cut:>5} {halo:>9} {v.peers:>5} {size(v.all_gather):>11} {ulysses:>9}  {v.least}")
    if any(v.halo is None for v in found):
        lines.append("  halo -: no axis has that many rows, or the pattern cannot be cut there")
    if any(v.ulysses is None for v in found):
        lines.append("  Ulysses -: that many ranks do not divide the heads")
    if stop is not None:
        lines.append(f"  from {stop} ranks on Ulysses moves less than the halo, where it can")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in words, three digits."""
    power = min(int(math.log10(max(count, 1)) / 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
