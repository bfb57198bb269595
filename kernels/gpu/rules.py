"""What the block-list kernels know of a pattern: which pairs of tokens a partial block allows, and the score rule.

Three tests, chosen when a kernel is compiled, and small tables of int32 that they read:

- intervals: every key has a place on each of a few axes, every query an interval of places; all must agree. Patterns
  that are products over the axes, and `LengthDecay`. Per tile this reads a few numbers per query and per key.
- radial: the half width of the diagonal per pair of frames; the interval of keys follows per query and frame.
- masks: one byte per pair for each kind of partial block, equal blocks stored once. Any other pattern with lists of its
  own (`Streaming`, `PowerStep`, patterns from elsewhere). A mask of 128 x 64 is 8 KB where keys and values of 64 tokens
  of 128 channels are 32 KB, so it costs traffic; and it cannot be made for lists that come with the data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..patterns import Blocked, LengthDecay, Pattern, Radial, Separable
from ..patterns.blocks import Lists

NONE, INTERVALS, RADIAL, MASKS = (tl.constexpr(kind) for kind in range(4))
LARGEST_TILE = 128


class Decay(NamedTuple):
    """`LengthDecay` as a kernel sees it. Distances in tokens; a band that is not there ends before it starts."""

    near: float
    change: float
    length: float
    beta: float
    untouched: int
    first1: int
    last1: int
    first2: int
    last2: int
    first3: int
    last3: int
    first4: int
    last4: int


@triton.jit
def allowed(
    first_query, first_key, query, key, entry, rule, tokens,
    KIND: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile of queries and a tile of keys see each other.

    Args:
        first_query, first_key: the first token of each tile.
        query, key: numbers in the tile, from 0; they broadcast against each other.
        entry: which entry of the lists this is.
        PARTS: axes of intervals, or the most frames that a tile of keys touches.
        BLOCK: tokens per block, `(queries, keys)`.
    """
    if KIND == MASKS:  # what is read past the end of a block belongs to tokens that are masked, or not stored
        at = tl.load(rule.numbers + entry).to(tl.int64) * (BLOCK[0] * BLOCK[1])
        at += first_query % BLOCK[0] * BLOCK[1] + first_key % BLOCK[1]
        return tl.load(rule.table + at + (query * BLOCK[1] + key)) != 0
    else:
        query = tl.minimum(first_query + query, tokens - 1)
        key = tl.minimum(first_key + key, tokens - 1)
        return _by_token(query, key, first_key, rule, tokens, KIND, PARTS)


@triton.jit
def _by_token(query, key, first_key, rule, tokens, KIND: tl.constexpr, PARTS: tl.constexpr):
    if KIND == INTERVALS:
        seen = (query >= 0) & (key >= 0)
        for part in tl.static_range(PARTS):
            table = rule.table + 3 * part * tokens
            place = tl.load(table + key)
            lo = tl.load(table + tokens + query)
            hi = tl.load(table + 2 * tokens + query)
            seen &= (place - lo).to(tl.uint32) < (hi - lo).to(tl.uint32)
    else:
        frame = query // rule.positions
        position = query - frame * rule.positions
        seen = (query < 0) & (key < 0)
        for part in tl.static_range(PARTS):
            other = tl.minimum(first_key // rule.positions + part, rule.frames - 1)
            width = tl.load(rule.table + frame * rule.frames + other)
            lo = other * rule.positions + tl.maximum(position - width, 0)
            hi = other * rule.positions + tl.minimum(position + width, rule.positions - 1)
            length = tl.maximum(hi + 1 - lo, 0)  # of a frame that is not seen the width is -1
            seen |= (key - lo).to(tl.uint32) < length.to(tl.uint32)
    return seen


@triton.jit
def multiplier(apart, decay, SHAPE: tl.constexpr, BANDS: tl.constexpr):
    """What `LengthDecay` multiplies scores that are not negative by, for distances in tokens."""
    factor = apart.to(tl.float32) * 0.0 + decay.near
    if SHAPE > 0:
        x = apart.to(tl.float32) / decay.length
        factor = decay.near + decay.change * (x if SHAPE == 1 else x * x)
    if BANDS:
        risk = (apart >= decay.first1) & (apart <= decay.last1)
        risk |= (apart >= decay.first2) & (apart <= decay.last2)
        risk |= (apart >= decay.first3) & (apart <= decay.last3)
        risk |= (apart >= decay.first4) & (apart <= decay.last4)
        factor = tl.where(risk, decay.beta, factor)
    return tl.where(apart <= decay.untouched, 1.0, factor)


class Test(NamedTuple):
    """The tables of `allowed` as a kernel sees them; what a test does not need is a dummy."""

    table: torch.Tensor
    numbers: torch.Tensor
    positions: int = 1
    frames: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """The test of a pattern on a grid: which of the three, its tables, and the axes of intervals."""

    kind: int
    test: Test
    axes: int = 0

    def parts(self, keys: int, block: int) -> int:
        """PARTS of `allowed` for tiles of `keys` keys, blocks of `block` keys."""
        if self.kind != RADIAL.value:
            return self.axes
        positions = self.test.positions
        if positions % keys == block % keys == 0:
            return 1
        return min((keys + positions - 2) // positions + 1, self.test.frames)


@functools.lru_cache(maxsize=32)
def tester(pattern: Pattern | None, grid: tuple[int, ...], device: torch.device) -> Rule | None:
    """The test of a pattern by intervals or by frames; None when neither tells its pairs. Without a pattern no test."""
    tokens = math.prod(grid)
    if pattern is None:
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        return Rule(NONE.value, Test(nothing, nothing))
    if isinstance(pattern, Radial):
        if pattern.rule == "block":
            return None
        table = pattern._pair_widths(grid).to(device, torch.int32).contiguous()
        return Rule(RADIAL.value, Test(table, table, math.prod(grid[1:]), grid[0]))
    parts = _intervals(pattern, grid, tokens)
    if parts is None:
        return None
    table = torch.stack(parts).to(device, torch.int32)
    return Rule(INTERVALS.value, Test(table, table), len(parts) // 3)


def _intervals(pattern: Pattern, grid: tuple[int, ...], tokens: int) -> list[torch.Tensor] | None:
    """For every axis: place of each key, first place that each query sees, and one past the last."""
    token = torch.arange(tokens)
    if isinstance(pattern, LengthDecay):
        cut = pattern.cut(grid) or (-1, tokens)
        return [token, torch.zeros_like(token), torch.where(token > cut[0], tokens, cut[1] + 1)]
    if not isinstance(pattern, Separable) or pattern.inside(grid) is not None:
        return None
    parts = []
    for index, axis in enumerate(pattern.axes(grid)):
        places = torch.tensor(axis.places)
        at = token // math.prod(grid[index + 1 :]) % axis.extent
        parts += [places[at], *(torch.tensor(ends)[places[at]] for ends in (axis.lo, axis.hi))]
    return parts


def masks(pattern: Blocked, grid: tuple[int, ...], lists: Lists, device: torch.device) -> Rule:
    """The test of any pattern: a byte per pair for each kind of partial block. `lists` are on the CPU."""
    tokens, predicate = math.prod(grid), pattern.predicate(grid)
    rows, slot = lists.index.shape[-2], torch.arange(lists.index.shape[-1])
    partial = (slot >= lists.full_count[..., None]) & (slot < lists.count[..., None])
    entries = partial.flatten().nonzero().squeeze(1)
    numbers = torch.zeros(lists.index.numel(), dtype=torch.int32)
    kinds: dict[bytes, int] = {}
    for some in entries.split(128):
        query = some // len(slot) % rows * lists.block[0]
        key = lists.index.flatten()[some].long() * lists.block[1]
        query, key = (
            (first[:, None] + torch.arange(side)).clamp(max=tokens - 1)
            for first, side in zip((query, key), lists.block, strict=True)
        )
        tiles = predicate(query[:, :, None], key[:, None]).expand(-1, *lists.block).to(torch.uint8).numpy()
        numbers[some] = torch.tensor([kinds.setdefault(t.tobytes(), len(kinds)) for t in tiles], dtype=torch.int32)
    table = torch.frombuffer(bytearray(b"".join(kinds) + bytes(LARGEST_TILE * (lists.block[1] + 1))), dtype=torch.uint8)
    return Rule(MASKS.value, Test(table.to(device), numbers.to(device)))


def decay(pattern: Pattern, grid: tuple[int, ...]) -> tuple[Decay, int, bool]:
    """`LengthDecay` as a kernel sees it, its SHAPE (-1: no decay), and whether it has BANDS."""
    if not isinstance(pattern, LengthDecay):
        return Decay(1.0, 0.0, 1.0, 1.0, 0, *(1, 0) * 4), -1, False
    shape = ("constant", "linear", "parabolic").index(pattern.shape)
    near, far = (pattern.alpha, pattern.alpha) if shape == 0 else pattern.alpha
    bands = pattern.bands(grid)
    ends = [end for band in bands for end in band] or [1, 0] * 4
    numbers = Decay(near, far - near, float(math.prod(grid)), pattern.beta, pattern.untouched(grid), *ends)
    return numbers, shape, bool(bands)


def uniform(pattern: Pattern, grid: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor | bool:
    """Bool `[query blocks, key blocks]`: one multiplier for the whole pair of blocks; True if there is none at all."""
    if not isinstance(pattern, LengthDecay):
        return True
    tokens = math.prod(grid)
    first_q, first_k = (torch.arange(0, tokens, side) for side in block)
    last_q, last_k = (
        (first + side).clamp(max=tokens) - 1 for first, side in zip((first_q, first_k), block, strict=True)
    )
    furthest = torch.maximum(last_q[:, None] - first_k, last_k - first_q[:, None])
    nearest = torch.maximum(first_q[:, None] - last_k, first_k - last_q[:, None]).clamp(min=0)
    same = furthest <= pattern.untouched(grid)
    if pattern.shape == "constant":
        # the multiplier changes from these distances to the next
        changes = [pattern.untouched(grid)] + [end for first, last in pattern.bands(grid) for end in (first - 1, last)]
        same = functools.reduce(torch.logical_and, ((furthest <= c) | (nearest > c) for c in changes))
    return same
