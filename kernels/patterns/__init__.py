"""Patterns: who may look at whom. Adding one is one file here and one line in this table."""

from .base import Pattern, Separable
from .block_list import BlockList
from .blocks import Blocked
from .circle import Circle
from .dense import Dense
from .halo import Halo
from .length_decay import LengthDecay
from .neighborhood import Neighborhood
from .per_head import PerHead
from .power_step import PowerStep
from .radial import Radial
from .sliding_tile import SlidingTile
from .streaming import Streaming
from .window import Window

PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls
    for cls in (
        Dense, Neighborhood, Window, SlidingTile, Halo, Circle, Radial, LengthDecay, PowerStep, Streaming, BlockList,
        PerHead,
    )
}  # fmt: skip

__all__ = ["PATTERNS", "Blocked", "Pattern", "Separable", *(cls.__name__ for cls in PATTERNS.values())]
