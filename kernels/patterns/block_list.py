"""Block lists that the caller computed: routing, gates, top-k, or any mask of blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from .base import Ints, Pattern, Predicate, check_grid, is_int
from .blocks import Blocked, Lists, block_lengths, lists_from_map, map_from_lists


@dataclasses.dataclass(frozen=True, eq=False)
class BlockList(Blocked):
    """Blocks of consecutive tokens (row-major) see the blocks that their list names.

    Query block `i` sees the key blocks `index[..., i, :count[..., i]]`, each at most once. Leading dimensions, if any,
    are `[heads, ...]` or `[batch, heads, ...]`, and a size of 1 repeats. A row may be empty: those queries return 0,
    and an lse of minus infinity. Two lists are equal only when they are the same object, because comparing data on a
    GPU would stall it.

    Args:
        block: tokens per block, one int or `(queries, keys)`. The last block of the sequence may be short.
        index: int `[*lead, query blocks, slots]`, key block numbers; entries past `count` are ignored.
        count: int `[*lead, query blocks]`, entries used per row.
        full_count: int `[*lead, query blocks]`: the first ones need no test against `within`. Only with `within`.
        within: another pattern that also has to allow a pair of tokens, tested in the blocks that are not full.

    Raises:
        TypeError, ValueError: tensors of the wrong kind or shape; in `check`, lists that do not fit the grid.

    >>> banded = torch.eye(4, dtype=torch.bool)
    >>> BlockList.from_mask(banded, block=2).density((8,))
    0.25
    """

    block: Ints
    index: torch.Tensor
    count: torch.Tensor
    full_count: torch.Tensor | None = None
    within: Pattern | None = None
    name: ClassVar[str] = "block-list"

    def __post_init__(self) -> None:
        block = tuple(self.block) if isinstance(self.block, (list, tuple)) else (self.block, self.block)
        if len(block) != 2 or not all(is_int(n) and n > 0 for n in block):
            raise ValueError(f"BlockList(block={self.block!r}): give one positive int, or two for (queries, keys)")
        object.__setattr__(self, "block", block)
        tensors = {"index": self.index, "count": self.count}
        if self.full_count is not None:
            if self.within is None:
                raise ValueError(
                    "BlockList: full_count says where `within` need not be tested, so it needs a pattern in `within`"
                )
            tensors["full_count"] = self.full_count
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"BlockList({name}=...): must be an int32 or int64 tensor, got {_kind(value)}")
            want = self.index.shape if name == "index" else self.index.shape[:-1]
            if value.shape != want:
                raise ValueError(
                    f"BlockList({name}=...): shape {tuple(value.shape)} does not fit index {tuple(self.index.shape)}"
                )
            if value.device != self.index.device:
                raise ValueError(f"BlockList({name}=...) is on {value.device} but index is on {self.index.device}")
        if not 2 <= self.index.ndim <= 4 or not self.index.shape[-1]:
            raise ValueError(
                f"BlockList(index=...): shape {tuple(self.index.shape)}; use [query blocks, slots] with at least "
                "one slot, optionally with heads, or batch and heads, in front"
            )
        if self.within is not None and not isinstance(self.within, Pattern):
            raise TypeError(f"BlockList(within=...): must be a pattern, got {_kind(self.within)}")
        if self.within is not None and isinstance(self.within, BlockList):
            raise TypeError("BlockList(within=...): must be another kind of pattern; intersect the block masks instead")

    @classmethod
    def from_mask(cls, mask: torch.Tensor, block: Ints, within: Pattern | None = None) -> BlockList:
        """From bool `[*lead, query blocks, key blocks]`, True where the pair of blocks is visited."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim < 2:
            raise TypeError(
                f"BlockList.from_mask needs a bool tensor [..., query blocks, key blocks], got {_kind(mask)}"
            )
        lists = lists_from_map((0, 0), mask)
        return cls(block, lists.index, lists.count, None, within)

    def check(self, grid: tuple[int, ...]) -> None:
        check_grid(grid)
        tokens = math.prod(grid)
        rows, keys = (-(-tokens // b) for b in self.block)
        if self.index.shape[-2] != rows:
            raise ValueError(
                f"BlockList has {self.index.shape[-2]} rows, but {tokens} tokens of grid {grid} "
                f"are {rows} blocks of {self.block[0]}"
            )
        listed = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        used = self.index[listed]
        if used.numel() and not (0 <= int(used.min()) and int(used.max()) < keys):
            raise ValueError(
                f"BlockList names key blocks {int(used.min())} to {int(used.max())}, but {tokens} tokens "
                f"of grid {grid} are {keys} blocks of {self.block[1]}: 0 to {keys - 1}"
            )
        if int(self.count.min()) < 0 or int(self.count.max()) > self.index.shape[-1]:
            raise ValueError(f"BlockList(count=...): must lie between 0 and the {self.index.shape[-1]} slots of index")
        if used.numel() != int(map_from_lists(self.index, self.count, keys).sum()):
            raise ValueError("BlockList names a key block twice in one row; name each once")
        if self.full_count is not None and bool(((self.full_count < 0) | (self.full_count > self.count)).any()):
            raise ValueError("BlockList(full_count=...): must lie between 0 and count in every row")
        if self.within is not None:
            self.within.check(grid)

    def mask(self, grid: tuple[int, ...], device: Any = "cpu") -> torch.Tensor:
        """Bool `[*lead, tokens, tokens]`."""
        self.check(grid)
        tokens = math.prod(grid)

        def spread(count: torch.Tensor) -> torch.Tensor:
            blocks = map_from_lists(self.index, count, -(-tokens // self.block[1])).to(device)
            rows = blocks.repeat_interleave(self.block[0], -2)[..., :tokens, :]
            return rows.repeat_interleave(self.block[1], -1)[..., :tokens]

        seen = spread(self.count)
        if self.within is None:
            return seen
        tested = seen & self.within.mask(grid, device)
        return tested if self.full_count is None else tested | spread(self.full_count)

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        """The test inside the blocks that are not full."""
        if self.within is None:
            return lambda query, key: torch.ones_like(query + key, dtype=torch.bool)
        return self.within.predicate(grid, device)

    def bias_shape(self, grid: tuple[int, ...], heads: int) -> tuple[int, ...]:
        return tuple(self.index.shape)

    def spread_bias(self, bias: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        tokens = math.prod(grid)
        columns = -(-tokens // self.block[1])
        listed = torch.arange(self.index.shape[-1], device=bias.device) < self.count[..., None].to(bias.device)
        column = torch.where(listed, self.index.to(bias.device), columns).long()
        blocks = bias.new_zeros(*bias.shape[:-1], columns + 1).scatter(-1, column, bias)[..., :columns]
        rows = blocks.repeat_interleave(self.block[0], -2)[..., :tokens, :]
        return rows.repeat_interleave(self.block[1], -1)[..., :tokens]

    def density(self, grid: tuple[int, ...]) -> float:
        self.check(grid)
        tokens = math.prod(grid)
        columns = -(-tokens // self.block[1])
        rows, lengths = (block_lengths(tokens, b, self.index.device).double() for b in self.block)
        visited = map_from_lists(self.index, self.count, columns)
        pairs = rows[:, None] * lengths
        if self.within is not None:
            full = torch.zeros_like(self.count) if self.full_count is None else self.full_count
            tested = visited & ~map_from_lists(self.index, full, columns)
            pairs = torch.where(tested, self._pairs_within(grid).to(pairs), pairs)
        return float((visited * pairs).sum((-2, -1)).mean()) / tokens**2

    def _pairs_within(self, grid: tuple[int, ...]) -> torch.Tensor:
        """How many pairs of tokens `within` allows in each pair of blocks, one row of blocks at a time."""
        tokens = math.prod(grid)
        key, allowed = torch.arange(tokens), self.within.predicate(grid)
        ends = (torch.arange(1, -(-tokens // self.block[1]) + 1) * self.block[1]).clamp(max=tokens) - 1
        rows = [allowed(query[:, None], key).sum(0).cumsum(0)[ends] for query in key.split(self.block[0])]
        return torch.stack(rows).diff(prepend=torch.zeros(len(rows), 1, dtype=torch.int64))

    def lists(self, grid: tuple[int, ...], device: Any = "cpu") -> Lists:
        full = self.full_count
        if full is None:
            full = self.count if self.within is None else torch.zeros_like(self.count)
        parts = [t.to(device=device, dtype=torch.int32) for t in (self.index, self.count, full)]
        return Lists(self.block, *parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "pattern": self.name,
            "block": list(self.block),
            "index": self.index.tolist(),
            "count": self.count.tolist(),
            "full_count": None if self.full_count is None else self.full_count.tolist(),
            "within": None if self.within is None else self.within.to_dict(),
        }

    def spell(self) -> str:
        within = "None" if self.within is None else self.within.spell()
        return f"('{self.name}', {{'block': {self.block!r}, 'within': {within}}})"

    def tensors(self) -> list[torch.Tensor]:
        return [self.index, self.count] + ([] if self.full_count is None else [self.full_count])

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> BlockList:
        tensors = {
            n: None if options.get(n) is None else torch.tensor(options[n], dtype=torch.int32)
            for n in ("index", "count", "full_count")
        }
        within = options.get("within")
        return cls(options["block"], **tensors, within=None if within is None else Pattern.from_dict(within))


def _kind(value: Any) -> str:
    return f"{value.dtype} tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
