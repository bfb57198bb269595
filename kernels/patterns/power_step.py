"""Steps of powers of two: with every layer the reach of a token grows exponentially."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch

from .base import Predicate, check_grid
from .blocks import Blocked, Lists
from .streaming import TILE, Spans, check_counts


@dataclasses.dataclass(frozen=True)
class PowerStep(Blocked):
    """Every query sees the tokens near it, the first tokens, and blocks that are 1, 2, 4, 8, ... blocks away.

    Tokens count in the order of the grid, row by row. Query `i` sees key `j` when `abs(i - j) < window`, when `j <
    sink`, or when `abs(i // block - j // block)` is a power of two; if causal, only when `j <= i`.

    Args:
        block: tokens per block, at least 1. Multiples of 64 and 128 are computed with few partly filled blocks.
        window: tokens, at least 1; the query itself is one of them.
        sink: tokens, at least 0.
        causal: look back only; False also looks forward, for images and diffusion.

    >>> PowerStep(block=1, window=1).mask((9,))[8].nonzero().flatten().tolist()
    [0, 4, 6, 7, 8]

    Paper: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention.
    """

    block: int
    window: int
    sink: int = 0
    causal: bool = True
    name: ClassVar[str] = "power-step"

    def __post_init__(self) -> None:
        check_counts(self, block=1, window=1, sink=0)
        if not isinstance(self.causal, bool):
            raise TypeError(f"PowerStep(causal={self.causal!r}): causal must be True or False")

    def _steps(self, grid: tuple[int, ...]) -> list[int]:
        """The distances in blocks that occur."""
        return [2**i for i in range(((math.prod(grid) - 1) // self.block).bit_length())]

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        def allowed(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            apart = (query // self.block - key // self.block).abs()
            power = (apart > 0) & (apart & (apart - 1) == 0)
            seen = ((query - key).abs() < self.window) | (key < self.sink) | power
            return seen & (key <= query) if self.causal else seen

        return allowed

    def density(self, grid: tuple[int, ...]) -> float:
        check_grid(grid)
        tokens = math.prod(grid)
        query = torch.arange(tokens)
        first = (query - self.window + 1).clamp(min=0)  # first key of the window, then one past its last
        stop = query + 1 if self.causal else (query + self.window).clamp(max=tokens)
        sink = stop.clamp(max=self.sink) if self.causal else torch.full_like(query, min(self.sink, tokens))
        pairs = int((stop - first + torch.minimum(sink, first) + (sink - stop).clamp(min=0)).sum())
        for step in self._steps(grid):
            for side in (-step,) if self.causal else (-step, step):
                start = (query // self.block + side) * self.block
                start, end = start.clamp(min=0, max=tokens), (start + self.block).clamp(min=0, max=tokens)
                # of such a block, what is neither a sink nor in the window
                start = torch.maximum(start, sink)
                left = (torch.minimum(end, first) - start).clamp(min=0)
                right = (end - torch.maximum(start, stop)).clamp(min=0)
                pairs += int((left + right).sum())
        return pairs / tokens**2

    def lists(self, grid: tuple[int, ...], device: Any = "cpu") -> Lists:
        return _lists(self, math.prod(grid), str(device))


@functools.lru_cache(maxsize=16)
def _lists(pattern: PowerStep, tokens: int, device: str) -> Lists:
    sides = [next((n for n in (128, 64) if pattern.block % n == 0), default) for default in TILE]
    spans = Spans(tokens, (sides[0], sides[1]))
    least = 0 if pattern.causal else 1 - pattern.window
    parts = [spans.distances(least, pattern.window - 1), spans.sink(pattern.sink, pattern.causal)]
    for step in pattern._steps((tokens,)):
        parts += [spans.distances(side, side, pattern.block) for side in ((step,) if pattern.causal else (step, -step))]
    return spans.lists(parts, device)
