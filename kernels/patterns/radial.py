"""Radial attention for video: near frames see all of each other, far frames a narrowing diagonal."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch

from .base import Predicate, check_grid, is_int
from .blocks import Blocked, Lists, block_lengths, lists_from_map

RULES = ("token", "block")
# Blocks of the token rule, which is exact with any: short ones leave less to mask, wide ones keep long lists short.
SHORT, WIDE, LONG = (128, 64), (128, 128), 65536


@dataclasses.dataclass(frozen=True)
class Radial(Blocked):
    """Static sparse pattern for video: attention narrows with the distance between frames.

    The grid is `(frames, h, w)` or `(frames, positions)`. Let `P` be the tokens of a frame, `t` the distance of two
    frames, `g = t.bit_length()` and `base = 2 ** P.bit_length() / 2 ** g`. Frames at distance 0 or 1 see each other
    fully. Further apart, positions `a` and `b` see each other when `abs(a - b) <= max(base * decay, block)`; but where
    `base < thin` only frame distances that are multiples of `int(thin / base)` are kept at all.

    Args:
        decay: width of the diagonals, above 0; less is sparser. 1.0 is the paper's setting, 0.2 what its authors ship
            for Wan2.1.
        block: narrowest half width of a diagonal in tokens, and the block size of the block rule; at least 1.
        sink: every token sees the first frame (the setting for Wan; HunyuanVideo uses False).
        rule: "token" is the exact definition above. "block" is what the authors run: the sequence is cut into blocks of
            `block` tokens, and a block pair is kept as a whole or dropped as a whole, by how much of it the token rule
            fills. A last block that is short sees everything and is seen by everything.
        thin: the constant of the thinning rule, 128 in the published code. On grids of fewer than about 128 positions
            it removes every distant frame, even the neighbours; 0 switches thinning off.

    Raises:
        ValueError: in `check` (and so in `attend`) when the grid has a single axis, or when the block rule drops a
            diagonal block, so that tokens would not see themselves.

    >>> round(Radial(decay=0.2).density((18, 48, 80)), 3)
    0.269

    Paper: Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation.
    """

    decay: float = 1.0
    block: int = 128
    sink: bool = True
    rule: str = "token"
    thin: int = 128
    name: ClassVar[str] = "radial"

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise TypeError(f"Radial(decay={self.decay!r}): decay must be a number above 0")
        if not (math.isfinite(self.decay) and self.decay > 0):
            raise ValueError(f"Radial(decay={self.decay!r}): decay must be finite and above 0, usually 0.2 to 1")
        object.__setattr__(self, "decay", float(self.decay))
        for name, least in (("block", 1), ("thin", 0)):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(f"Radial({name}={value!r}): {name} must be an int of at least {least}")
            if value < least:
                raise ValueError(f"Radial({name}={value!r}): {name} must be at least {least}")
        if not isinstance(self.sink, bool):
            raise TypeError(f"Radial(sink={self.sink!r}): sink must be True or False")
        if self.rule not in RULES:
            raise ValueError(f"Radial(rule={self.rule!r}): rule must be one of {', '.join(map(repr, RULES))}")

    def check(self, grid: tuple[int, ...]) -> None:
        check_grid(grid)
        if len(grid) == 1:
            raise ValueError(f"Radial needs a grid of (frames, h, w) or (frames, positions); got {grid}")
        if self.rule == "block":
            kept = self.block_map(grid).diagonal()
            if not kept.all():
                positions = math.prod(grid[1:])
                raise ValueError(
                    f"{self} drops {int((~kept).sum())} of {len(kept)} diagonal blocks on grid {grid}: tokens there "
                    f"would not see themselves; use rule='token', or a block below the {positions} tokens of a frame"
                )

    def widths(self, grid: tuple[int, ...]) -> list[int]:
        """For every frame distance the largest `abs(a - b)` that is allowed; -1 where the frame pair is empty."""
        frames, positions = grid[0], math.prod(grid[1:])
        out = []
        for t in range(frames):
            base = 2.0 ** (positions.bit_length() - t.bit_length())
            if base < self.thin and t % int(self.thin / base):
                out.append(-1)
            elif t <= 1:
                out.append(positions - 1)
            else:  # distances are whole numbers, so comparing with the floor is comparing with the real width
                out.append(min(math.floor(max(base * self.decay, self.block)), positions - 1))
        return out

    def _pair_widths(self, grid: tuple[int, ...]) -> torch.Tensor:
        """Half width for every pair of (query frame, key frame), sink included."""
        frame = torch.arange(grid[0])
        widths = torch.tensor(self.widths(grid))[(frame[:, None] - frame).abs()]
        if self.sink:
            widths[:, 0] = math.prod(grid[1:]) - 1
        return widths

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        if self.rule == "block":
            kept = self.block_map(grid).to(device)
            return lambda query, key: kept[query // self.block, key // self.block]
        token, positions = torch.arange(math.prod(grid), device=device), math.prod(grid[1:])
        frame, place = token // positions, (token % positions).int()
        widths = self._pair_widths(grid).to(device, torch.int32)
        return lambda query, key: (place[query] - place[key]).abs() <= widths[frame[query], frame[key]]

    def density(self, grid: tuple[int, ...]) -> float:
        self.check(grid)
        positions = math.prod(grid[1:])
        if self.rule == "block":
            lengths = block_lengths(math.prod(grid), self.block).double()
            return float(lengths @ self.block_map(grid).double() @ lengths) / math.prod(grid) ** 2
        pairs = 0
        for width in self._pair_widths(grid).flatten().tolist():
            pairs += positions * (2 * width + 1) - width * (width + 1) if width >= 0 else 0
        return pairs / math.prod(grid) ** 2

    def block_map(self, grid: tuple[int, ...]) -> torch.Tensor:
        """The published block rule: bool `[blocks, blocks]`, True where the pair of blocks is kept."""
        return _block_rule(dataclasses.replace(self, rule="token"), (grid[0], math.prod(grid[1:])))

    def lists(self, grid: tuple[int, ...], device: Any = "cpu") -> Lists:
        return _lists(self, (grid[0], math.prod(grid[1:])), str(device))


@functools.lru_cache(maxsize=16)
def _lists(pattern: Radial, grid: tuple[int, int], device: str) -> Lists:
    if pattern.rule == "block":
        block, visited, full = (pattern.block, pattern.block), pattern.block_map(grid), None
    else:
        block = SHORT if math.prod(grid) <= LONG else WIDE
        visited, full = _token_blocks(pattern, grid, block)
    lists = lists_from_map(block, visited, full)
    return Lists(block, lists.index.to(device), lists.count.to(device), lists.full_count.to(device))


def _runs(grid: tuple[int, int], block: int) -> list[tuple[torch.Tensor, ...]]:
    """Blocks as runs of positions in one frame: frame, first and last position, and whether the block has that run."""
    frames, positions = grid
    starts = torch.arange(0, frames * positions, block)
    stops = (starts + block).clamp(max=frames * positions)
    runs = []
    for s in range(int(((stops - 1) // positions - starts // positions).max()) + 1):
        frame = starts // positions + s
        first, last = torch.maximum(starts, frame * positions), torch.minimum(stops, (frame + 1) * positions) - 1
        runs.append((frame.clamp(max=frames - 1), first - frame * positions, last - frame * positions, first <= last))
    return runs


def _token_blocks(pattern: Radial, grid: tuple[int, int], block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs of blocks hold any allowed pair of tokens, and which hold nothing else.

    A pair of runs is a rectangle of a frame pair; its smallest and largest distance from the diagonal decide.
    """
    widths, tokens = pattern._pair_widths(grid), math.prod(grid)
    visited = torch.zeros(*(-(-tokens // b) for b in block), dtype=torch.bool)
    full = torch.ones_like(visited)
    for frame_q, a0, a1, real_q in _runs(grid, block[0]):
        for frame_k, b0, b1, real_k in _runs(grid, block[1]):
            width = widths[frame_q[:, None], frame_k]
            apart = torch.maximum(b0 - a1[:, None], a0[:, None] - b1).clamp(min=0)
            furthest = torch.maximum(b1 - a0[:, None], a1[:, None] - b0)
            real = real_q[:, None] & real_k
            visited |= real & (apart <= width)
            full &= ~real | (furthest <= width)
    return visited, full


@functools.lru_cache(maxsize=16)
def _block_rule(pattern: Radial, grid: tuple[int, int]) -> torch.Tensor:
    """Judge every frame pair on its own canvas of blocks, then combine.

    A frame pair laid at an offset of its first block keeps a block when more than 0.6 of the block's columns that hold
    anything are filled to more than a third. What sticks out of the canvas of `ceil(positions / block)` blocks is
    dropped.
    """
    frames, positions = grid
    block, whole = pattern.block, frames * positions // pattern.block
    across = -(-positions // block)
    total = -(-frames * positions // block)
    out = torch.zeros(total, total, dtype=torch.bool)
    out[whole:, :] = True
    out[:, whole:] = True

    @functools.cache
    def keep(width: int, offset_q: int, offset_k: int) -> torch.Tensor:
        column = torch.arange(across * block) - offset_k
        edges = torch.arange(across + 1)[:, None] * block - offset_q
        first = torch.maximum((column - width).clamp(min=0), edges[:-1])
        last = torch.minimum((column + width).clamp(max=positions - 1), edges[1:] - 1)
        filled = (last - first + 1).clamp(min=0) * ((column >= 0) & (column < positions))
        filled = filled.view(across, across, block)
        return 5 * (3 * filled > block).sum(-1) > 3 * (filled > 0).sum(-1)

    for i, row in enumerate(pattern._pair_widths(grid).tolist()):
        for j, width in enumerate(row):
            if width >= 0:
                r, c = i * positions // block, j * positions // block
                rows, columns = min(across, whole - r), min(across, whole - c)
                if rows > 0 and columns > 0:
                    kept = keep(width, i * positions % block, j * positions % block)
                    out[r : r + rows, c : c + columns] |= kept[:rows, :columns]
    return out
