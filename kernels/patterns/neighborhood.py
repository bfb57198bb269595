"""Generalized neighborhood attention: sliding, strided, dilated and causal windows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .base import Axis, Ints, Separable, along, set_ints


@dataclasses.dataclass(frozen=True)
class Neighborhood(Separable):
    """Each query sees the `window` nearest keys along every axis; near a border the window moves inward and keeps its
    size.

    Every option is one value for all axes or a tuple with one value per axis of the grid.

    Args:
        window: keys seen per axis, at least 1. An even window reaches one key further to the left than to the right.
        stride: queries that share one window, 1 to `window`. With `stride == window` this is blocked attention.
        dilation: step between the keys, at least 1; `window * dilation` must fit the grid. Tokens whose coordinates
            differ modulo `dilation` do not see each other.
        causal: on such an axis a query sees itself and keys before it only, at most `window`.

    Raises:
        ValueError: an option out of range here, or one that does not fit the grid in `check`, `mask` and `attend`.

    >>> Neighborhood(window=3).mask((5,)).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    >>> Neighborhood(window=(1, 5, 5)).density((4, 10, 10))
    0.0625

    Papers: Neighborhood Attention Transformer; Dilated Neighborhood Attention Transformer; Generalized Neighborhood
    Attention: Multi-dimensional Sparse Attention at the Speed of Light.
    """

    window: Ints
    stride: Ints = 1
    dilation: Ints = 1
    causal: bool | tuple[bool, ...] = False
    name: ClassVar[str] = "neighborhood"

    def __post_init__(self) -> None:
        set_ints(self, 1, "window", "stride", "dilation")
        causal = tuple(self.causal) if isinstance(self.causal, list) else self.causal
        entries = causal if isinstance(causal, tuple) else (causal,)
        if not entries or not all(isinstance(c, bool) for c in entries):
            raise TypeError(
                f"Neighborhood(causal={causal!r}): causal must be a bool, or a tuple with one bool per axis"
            )
        object.__setattr__(self, "causal", causal)
        ranks = {len(v) for v in (self.window, self.stride, self.dilation, causal) if isinstance(v, tuple)}
        if len(ranks) > 1:
            raise ValueError(f"{self}: the options are for different numbers of axes; give one value, or one per axis")
        for axis in range(max(ranks, default=1)):
            window, stride = (along(self, n, max(ranks, default=1))[axis] for n in ("window", "stride"))
            if stride > window:
                raise ValueError(
                    f"{self}: stride {stride} is larger than window {window} on axis {axis}; use stride <= window"
                )

    def check(self, grid: tuple[int, ...]) -> None:
        super().check(grid)
        options = [along(self, n, len(grid)) for n in ("window", "stride", "dilation", "causal")]
        for axis, (extent, window, _, dilation, _) in enumerate(zip(grid, *options, strict=False)):
            if window * dilation > extent:
                times = f" times dilation {dilation}" if dilation > 1 else ""
                raise ValueError(
                    f"{self}: window {window}{times} is larger than the grid, which has {extent} tokens on axis {axis} "
                    f"of {grid}; use a window of at most {extent // dilation} there"
                )

    def reach(self, rank: int) -> tuple[int, ...]:
        return along(self, "window", rank)

    def axis(self, extent: int, index: int) -> Axis:
        window, stride, dilation, causal = (
            value[index] if isinstance(value, tuple) else value
            for value in (self.window, self.stride, self.dilation, self.causal)
        )
        order, lo, hi, groups = [], [], [], [0]
        for group in range(dilation):
            offset, length = groups[-1], -(-(extent - group) // dilation)
            for i in range(length):
                run = i // stride * stride
                if causal:
                    leader = min(run + stride - 1, length - 1)
                    first, last = max(0, leader - window + 1), i
                else:
                    leader = min(run + stride // 2, length - 1)
                    first = min(max(leader - window // 2, 0), length - window)
                    last = first + window - 1
                order.append(group + dilation * i)
                lo.append(offset + first)
                hi.append(offset + last + 1)
            groups.append(offset + length)
        return Axis(tuple(order), tuple(lo), tuple(hi), tuple(groups))
