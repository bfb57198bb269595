"""Patterns that are lists of blocks of the flattened sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .base import Pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Which key blocks each query block visits.

    `index` int32 `[*lead, query blocks, slots]` holds key block numbers; the first `count` of a row are meant, the rest
    is padding. Of those the first `full_count` are allowed as a whole, the others need the predicate token by token.
    `block` is `(queries, keys)` in consecutive tokens; the last block of a sequence may be short. `lead` broadcasts
    over (batch, heads).
    """

    block: tuple[int, int]
    index: torch.Tensor
    count: torch.Tensor
    full_count: torch.Tensor


class Blocked(Pattern):
    """A pattern without axes of its own, lowered to block lists plus a predicate inside the partial blocks."""

    def lists(self, grid: tuple[int, ...], device: Any = "cpu") -> Lists:
        """Block lists of this pattern on `grid`."""
        raise NotImplementedError


def lists_from_map(block: tuple[int, int], visited: torch.Tensor, full: torch.Tensor | None = None) -> Lists:
    """Block lists from bool maps `[*lead, query blocks, key blocks]`: `full` blocks first, each part in ascending
    order.

    There are as many slots as key blocks, which FlexAttention insists on.
    """
    full = visited if full is None else full & visited
    rank = 2 - visited.to(torch.int8) - full.to(torch.int8)
    index = rank.argsort(dim=-1, stable=True).to(torch.int32)
    return Lists(block, index, visited.sum(-1, dtype=torch.int32), full.sum(-1, dtype=torch.int32))


def map_from_lists(index: torch.Tensor, count: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """Bool map `[*lead, query blocks, key blocks]` of the first `count` entries of every row of `index`."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    out = torch.zeros(*index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=index.device)
    out.scatter_(-1, torch.where(listed, index, key_blocks).long(), True)
    return out[..., :key_blocks]


def block_lengths(tokens: int, block: int, device: Any = "cpu") -> torch.Tensor:
    """Tokens in each block of a sequence; only the last may be short."""
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp(max=block)
