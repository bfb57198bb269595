"""Block lists for the CPU kernel: the lists of a pattern, and bit masks of the blocks that need a test."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math

import torch

from ..patterns import Blocked, BlockList
from .lines import Rows

AT_ONCE = 2**22  # pairs of tokens tested at a time
FEW = 8  # queries in a block, as in few.h
MOST_KEYS = 4096


class Blocks(ctypes.Structure):
    """As in call.h."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("vectors", "query", "key", "rows", "slots")),
        *((n, ctypes.c_int64) for n in ("batch", "head")),
        *((n, ctypes.c_void_p) for n in ("index", "count", "mask", "bits")),
    ]


class FewBlocks(ctypes.Structure):
    """As in few.h."""

    _fields_ = [("blocks", Blocks), ("key", Rows), ("value", Rows)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The structure for C, and the tensors it points into."""

    structure: Blocks
    tensors: list[torch.Tensor]

    def few(self, lanes: int, value_dim: int) -> bool:
        """Whether the form of few.h can take the lists, and was measured to be faster: blocks of at most `FEW` queries
        and without tests, not too many keys for a cache, and rows of values that are whole vectors."""
        form = self.structure
        short = form.query <= min(FEW, lanes) and form.slots * form.key <= MOST_KEYS
        return short and not form.mask and value_dim % lanes == 0


def plan(pattern: Blocked, grid: tuple[int, ...], lanes: int) -> Plan:
    """The lists of `pattern` on `grid`. Kept for the next call, but for a BlockList, which is new in every call."""
    if isinstance(pattern, BlockList) and pattern.within is None:  # nothing to test, so nothing is made on a device
        return _make(pattern, grid, lanes)
    with torch.device("cpu"):  # whatever the default is
        return (_make if isinstance(pattern, BlockList) else _kept)(pattern, grid, lanes)


def _make(pattern: Blocked, grid: tuple[int, ...], lanes: int) -> Plan:
    lists = pattern.lists(grid)
    index, count, full = (t.to(torch.int32).contiguous() for t in (lists.index, lists.count, lists.full_count))
    rows, slots = index.shape[-2:]
    lead = (1, 1, *index.shape[:-2])[-2:]
    vectors = 2 if lists.block[0] > lanes else 1
    steps = [0 if lead[0] == 1 else lead[1] * rows, 0 if lead[1] == 1 else rows]
    tensors = [index, count]
    if not isinstance(pattern, BlockList) or pattern.within is not None:
        slot = torch.arange(slots)
        tested = (slot >= full[..., None]) & (slot < count[..., None])
        tensors += _masks(pattern, grid, lists.block, index, tested) if tested.any() else ()
    return Plan(Blocks(vectors, *lists.block, rows, slots, *steps, *(t.data_ptr() for t in tensors)), tensors)


_kept = functools.lru_cache(maxsize=8)(_make)


def _masks(pattern, grid, block, index, tested) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 `[*lead, rows, slots]`, which mask a block needs or -1; and int32 `[masks, words, keys]`, where bit `i` of
    word `w` is query `32 * w + i` of the block.

    A pair of blocks that several heads list is tested once, and equal masks are kept once.
    """
    tokens, words = math.prod(grid), -(-block[0] // 32)
    columns = -(-tokens // block[1])
    row = torch.arange(index.shape[-2])[:, None].expand(index.shape)[tested]
    pairs, which = torch.unique(row * columns + index[tested], return_inverse=True)
    allowed, bit = pattern.predicate(grid), torch.ones((), dtype=torch.int64) << torch.arange(32)
    query, key = torch.arange(words * 32), torch.arange(block[1])
    parts = []
    for some in pairs.split(max(AT_ONCE // (words * 32 * block[1]), 1)):
        q = ((some // columns) * block[0])[:, None] + query
        k = ((some % columns) * block[1])[:, None] + key
        real = (query < block[0]) & (q < tokens)
        seen = allowed(q.clamp(max=tokens - 1)[:, :, None], k.clamp(max=tokens - 1)[:, None]) & real[:, :, None]
        parts.append((seen.view(len(some), words, 32, -1) * bit[:, None]).sum(2))
    bits, same = torch.unique(torch.cat(parts), dim=0, return_inverse=True)
    number = torch.full(index.shape, -1, dtype=torch.int32)
    number[tested] = same[which].to(torch.int32)
    return number, bits.to(torch.int32)
