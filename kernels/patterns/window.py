"""Non-overlapping windows, with the shift of Swin."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .base import Axis, Ints, Separable, along, plain_axis, set_ints


@dataclasses.dataclass(frozen=True)
class Window(Separable):
    """The grid is cut into windows; tokens see each other exactly when they share a window.

    Cuts lie at `shift, shift + size, shift + 2 * size, ...` along each axis, so with a shift the first window and, as a
    rule, the last one are smaller (what the rolled and masked windows of Swin compute). A size that does not divide the
    axis leaves a shorter last window. Every option is one int or a tuple with one int per axis.

    Args:
        size: tokens per window along an axis, 1 to the extent of that axis.
        shift: where the first cut lies, 0 to `size - 1`; Swin uses `size // 2` in every second layer.

    >>> Window(size=2, shift=1).mask((4,)).int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]

    Paper: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.
    """

    size: Ints
    shift: Ints = 0
    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        set_ints(self, 1, "size")
        set_ints(self, 0, "shift")
        rank = max(len(v) if isinstance(v, tuple) else 1 for v in (self.size, self.shift))
        for axis, (size, shift) in enumerate(zip(along(self, "size", rank), along(self, "shift", rank), strict=False)):
            if shift >= size:
                raise ValueError(
                    f"{self}: shift {shift} on axis {axis} must be smaller than the size {size} of a window"
                )

    def check(self, grid: tuple[int, ...]) -> None:
        super().check(grid)
        along(self, "shift", len(grid))
        for axis, (extent, size) in enumerate(zip(grid, along(self, "size", len(grid)), strict=False)):
            if size > extent:
                raise ValueError(
                    f"{self}: a window of {size} is larger than the grid, which has {extent} tokens on axis "
                    f"{axis} of {grid}; use a size of at most {extent} there"
                )

    def reach(self, rank: int) -> tuple[int, ...]:
        return along(self, "size", rank)

    def axis(self, extent: int, index: int) -> Axis:
        size, shift = (v[index] if isinstance(v, tuple) else v for v in (self.size, self.shift))
        first = [(x - shift) // size * size + shift for x in range(extent)]
        return plain_axis([(max(a, 0), min(a + size, extent)) for a in first])
