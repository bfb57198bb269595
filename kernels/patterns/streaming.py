"""Streaming heads: the last tokens, and the first ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch

from .base import Pattern, Predicate, check_grid, is_int
from .blocks import Blocked, Lists, lists_from_map

TILE = (128, 64)  # queries and keys per block of the lists


@dataclasses.dataclass(frozen=True)
class Streaming(Blocked):
    """Every query sees itself, the `window - 1` tokens before it, and the first `sink` tokens that are not after it.

    Tokens count in the order of the grid, row by row.

    Args:
        window: tokens, at least 1.
        sink: tokens, at least 0; StreamingLLM uses 4, DuoAttention 64 with a window of 256.

    >>> Streaming(window=2, sink=1).mask((5,)).int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]

    Papers: Efficient Streaming Language Models with Attention Sinks; DuoAttention: Efficient Long-Context LLM Inference
    with Retrieval and Streaming Heads.
    """

    window: int
    sink: int = 0
    name: ClassVar[str] = "streaming"

    def __post_init__(self) -> None:
        check_counts(self, window=1, sink=0)

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        def allowed(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & ((query - key < self.window) | (key < self.sink))

        return allowed

    def density(self, grid: tuple[int, ...]) -> float:
        check_grid(grid)
        seen = torch.arange(1, math.prod(grid) + 1)  # tokens up to and with the query
        recent = seen.clamp(max=self.window)
        return float((recent + (seen - recent).clamp(max=self.sink)).sum()) / math.prod(grid) ** 2

    def lists(self, grid: tuple[int, ...], device: Any = "cpu") -> Lists:
        return _lists(self, math.prod(grid), str(device))


@functools.lru_cache(maxsize=16)
def _lists(pattern: Streaming, tokens: int, device: str) -> Lists:
    spans = Spans(tokens, TILE)
    recent, sink = spans.distances(0, pattern.window - 1), spans.sink(pattern.sink, causal=True)
    return spans.lists([recent, sink], device)


Maps = tuple[torch.Tensor, torch.Tensor]  # bool [query blocks, key blocks]: any pair of tokens, all pairs


class Spans:
    """First and last token of every query block (a column) and of every key block (a row); what pairs of them hold."""

    def __init__(self, tokens: int, block: tuple[int, int]):
        self.block = block
        (self.q0, self.q1), (self.k0, self.k1) = (
            (first, (first + side).clamp(max=tokens) - 1)
            for first, side in ((torch.arange(0, tokens, side), side) for side in block)
        )
        self.q0, self.q1 = self.q0[:, None], self.q1[:, None]

    def distances(self, low: int, high: int, unit: int = 1) -> Maps:
        """Pairs whose distance `query // unit - key // unit` is at least `low` and at most `high`."""
        least, most = self.q0 // unit - self.k1 // unit, self.q1 // unit - self.k0 // unit
        return (least <= high) & (most >= low), (least >= low) & (most <= high)

    def sink(self, tokens: int, causal: bool) -> Maps:
        """Pairs whose key is one of the first tokens, and not after the query if causal."""
        first, all_first = (self.k0 < tokens).expand(len(self.q0), -1), (self.k1 < tokens).expand(len(self.q0), -1)
        return (first & (self.k0 <= self.q1), all_first & (self.k1 <= self.q0)) if causal else (first, all_first)

    def lists(self, parts: list[Maps], device: str) -> Lists:
        """Lists of the union. A block that only several parts together fill is not called full, which is safe."""
        visited, full = (functools.reduce(torch.logical_or, maps) for maps in zip(*parts, strict=True))
        lists = lists_from_map(self.block, visited, full)
        return Lists(self.block, lists.index.to(device), lists.count.to(device), lists.full_count.to(device))


def check_counts(pattern: Pattern, **least: int) -> None:
    """Check fields that hold a number of tokens."""
    for name, minimum in least.items():
        value = getattr(pattern, name)
        where = f"{type(pattern).__name__}({name}={value!r}): {name}"
        if not is_int(value):
            raise TypeError(f"{where} must be an int of at least {minimum}")
        if value < minimum:
            raise ValueError(f"{where} must be at least {minimum}")
