"""Patterns: who may look at whom. Adding one is one file here and one line in this table."""

from .base import Pattern, Separable
from .block_list import BlockList
from .blocks import Blocked
from .dense import Dense
from .neighborhood import Neighborhood
from .radial import Radial
from .sliding_tile import SlidingTile
from .window import Window

PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls for cls in (Dense, Neighborhood, Window, SlidingTile, Radial, BlockList)
}

__all__ = ["PATTERNS", "Blocked", "Pattern", "Separable", *(cls.__name__ for cls in PATTERNS.values())]
