"""Sliding tile attention: whole tiles see whole tiles."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .base import Axis, Ints, Separable, along, plain_axis, set_ints


@dataclasses.dataclass(frozen=True)
class SlidingTile(Separable):
    """The grid is cut into tiles; every query of a tile sees the same `window` tiles around its own.

    Along an axis of `n` tiles, tile `i` sees the tiles from `clamp(i - window // 2, 0, n - window)` on, `window` of
    them: at a border the window moves inward. An even window reaches one tile further to the left. A window of more
    than `n` tiles is the full axis. A tile size that does not divide the axis leaves a last tile that is shorter, and
    counts as one. With an odd window and a tile that divides the axis this equals `Neighborhood(window=tile * window,
    stride=tile)`.

    Args:
        tile: tokens per tile along an axis, 1 to the extent. One int or one per axis, for example `(6, 8, 8)`.
        window: tiles seen along an axis, at least 1. One int or one per axis.

    >>> SlidingTile(tile=2, window=1).mask((5,)).int().tolist()
    [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]

    Paper: Fast Video Generation with Sliding Tile Attention.
    """

    tile: Ints
    window: Ints
    name: ClassVar[str] = "sliding-tile"

    def __post_init__(self) -> None:
        set_ints(self, 1, "tile", "window")

    def check(self, grid: tuple[int, ...]) -> None:
        super().check(grid)
        along(self, "window", len(grid))
        for axis, (extent, tile) in enumerate(zip(grid, along(self, "tile", len(grid)), strict=False)):
            if tile > extent:
                raise ValueError(
                    f"{self}: a tile of {tile} is larger than the grid, which has {extent} tokens on axis {axis} "
                    f"of {grid}; use a tile of at most {extent} there"
                )

    def axis(self, extent: int, index: int) -> Axis:
        tile, window = (v[index] if isinstance(v, tuple) else v for v in (self.tile, self.window))
        tiles = -(-extent // tile)
        window = min(window, tiles)
        first = [min(max(x // tile - window // 2, 0), tiles - window) for x in range(extent)]
        return plain_axis([(a * tile, min((a + window) * tile, extent)) for a in first])
