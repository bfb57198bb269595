"""Blocked local attention: a block of queries sees its own block and a margin around it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .base import Axis, Ints, Separable, along, plain_axis, set_ints


@dataclasses.dataclass(frozen=True)
class Halo(Separable):
    """The grid is cut into blocks; the tokens of a block see the block and `halo` tokens around it, clipped at borders.

    Along an axis of extent `n`, block `b` sees the keys from `max(b * block - halo, 0)` to before `min((b + 1) * block
    + halo, n)`. A block whose halo lies inside the grid sees what `Neighborhood(window=block + 2 * halo, stride=block)`
    shows it; at a border the neighborhood moves inward and keeps its size, while the halo is cut off. A block size that
    does not divide the axis leaves a shorter last block.

    Args:
        block: tokens per block along an axis, 1 to the extent. One int or one per axis.
        halo: tokens added on each side, at least 0. One int or one per axis.

    Raises:
        ValueError: an option out of range here, or a block larger than the grid in `check`, `mask` and `attend`.

    >>> Halo(block=2, halo=1).mask((6,)).int().tolist()[::2]
    [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]

    Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet).
    """

    block: Ints
    halo: Ints
    name: ClassVar[str] = "halo"

    def __post_init__(self) -> None:
        set_ints(self, 1, "block")
        set_ints(self, 0, "halo")

    def check(self, grid: tuple[int, ...]) -> None:
        super().check(grid)
        along(self, "halo", len(grid))
        for axis, (extent, block) in enumerate(zip(grid, along(self, "block", len(grid)), strict=False)):
            if block > extent:
                raise ValueError(
                    f"{self}: a block of {block} is larger than the grid, which has {extent} tokens on axis {axis} "
                    f"of {grid}; use a block of at most {extent} there"
                )

    def axis(self, extent: int, index: int) -> Axis:
        block, halo = (v[index] if isinstance(v, tuple) else v for v in (self.block, self.halo))
        first = [x // block * block for x in range(extent)]
        return plain_axis([(max(a - halo, 0), min(a + block + halo, extent)) for a in first])
