"""Different patterns for different heads."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from .base import Pattern, is_int


@dataclasses.dataclass(frozen=True)
class PerHead(Pattern):
    """The first heads follow one pattern, the next ones another: local and global heads, streaming heads.

    `attend` computes every part on its own, with the backend that suits it, so a part costs what it costs alone.

    Args:
        parts: `(heads, pattern)` pairs, in the order of the heads; the counts add up to the heads of q. With grouped
            KV heads every count must be a multiple of the query heads per KV head.

    Raises:
        TypeError, ValueError: parts of another form; in `attend`, counts that do not fit the heads.

    >>> from vision_attn import Dense, Neighborhood
    >>> round(PerHead(parts=((6, Neighborhood(window=7)), (2, Dense()))).density((28, 28)), 4)
    0.2969
    """

    parts: tuple[tuple[int, Pattern], ...]
    name: ClassVar[str] = "per-head"

    def __post_init__(self) -> None:
        parts = tuple(tuple(part) for part in self.parts) if isinstance(self.parts, (list, tuple)) else ()
        good = parts and all(len(p) == 2 and is_int(p[0]) and isinstance(p[1], Pattern) for p in parts)
        if not good or any(isinstance(pattern, PerHead) for _, pattern in parts):
            raise TypeError(
                f"PerHead(parts={self.parts!r}): give pairs (heads, pattern) such as "
                "((6, Neighborhood(window=7)), (2, Dense())), none of them PerHead itself"
            )
        if min(heads for heads, _ in parts) < 1:
            raise ValueError(f"PerHead(parts={self.parts!r}): every count of heads must be at least 1")
        object.__setattr__(self, "parts", parts)

    @property
    def heads(self) -> int:
        return sum(heads for heads, _ in self.parts)

    def check(self, grid: tuple[int, ...]) -> None:
        for _, pattern in self.parts:
            pattern.check(grid)

    def mask(self, grid: tuple[int, ...], device: Any = "cpu") -> torch.Tensor:
        """Bool `[heads, tokens, tokens]`."""
        masks = [pattern.mask(grid, device) for _, pattern in self.parts]
        return torch.cat([m.expand(heads, *m.shape[-2:]) for m, (heads, _) in zip(masks, self.parts, strict=True)])

    def density(self, grid: tuple[int, ...]) -> float:
        return sum(heads * pattern.density(grid) for heads, pattern in self.parts) / self.heads

    def is_dense(self, grid: tuple[int, ...]) -> bool:
        return all(pattern.is_dense(grid) for _, pattern in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return {"pattern": self.name, "parts": [[heads, pattern.to_dict()] for heads, pattern in self.parts]}

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> PerHead:
        return cls(tuple((heads, Pattern.from_dict(pattern)) for heads, pattern in options["parts"]))
