"""Every token sees every token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .base import Axis, Separable, plain_axis


@dataclasses.dataclass(frozen=True)
class Dense(Separable):
    """Full attention: every query sees every key of the grid.

    >>> Dense().mask((2, 2)).all().item()
    True
    """

    name: ClassVar[str] = "dense"

    def axis(self, extent: int, index: int) -> Axis:
        return plain_axis([(0, extent)] * extent)
