"""Circular windows, and tokens pooled from the whole image for everyone to see."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from .base import Axis, Predicate, Separable, Tensors, check_grid, is_int, plain_axis
from .dense import Dense


@dataclasses.dataclass(frozen=True)
class Circle(Separable):
    """Every query sees the keys of a disc around it: `dy ** 2 + dx ** 2 < radius ** 2`, clipped at the borders.

    The grid is `(h, w)`. On `(t, h, w)` the disc goes through all frames, wherever the query is.

    Args:
        radius: in tokens, at least 1; the circle itself is outside. CLEAR uses 8, 16 and 32: 193, 793 and 3205 keys.
        pooled: also show every query the means over cells of `pooled` x `pooled` tokens, at least 2, which must divide
            h and w; CLEAR uses 4. They are extra keys and values behind any `extra_kv`, so `density` leaves them out.
            For cells weighted otherwise, give `pool_tokens` a weight and `attend` the result as `extra_kv`.

    Raises:
        ValueError: an option out of range here; in `check` (and so in `attend`) a grid with a single axis, or cells
            that do not fit it.

    >>> Circle(radius=2).mask((3, 4))[5].view(3, 4).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    >>> round(Circle(radius=8).density((128, 128)), 4)
    0.0112

    Paper: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up.
    """

    radius: int
    pooled: int | None = None
    name: ClassVar[str] = "circle"
    weight: ClassVar[torch.Tensor | None] = None  # of the places in a cell; a subclass may bring one

    def __post_init__(self) -> None:
        for name, least in (("radius", 1), ("pooled", 2)):
            value = getattr(self, name)
            if name == "pooled" and value is None:
                continue
            if not is_int(value):
                raise TypeError(f"Circle({name}={value!r}): {name} must be an int of at least {least}")
            if value < least:
                raise ValueError(f"Circle({name}={value!r}): {name} must be at least {least}")

    def check(self, grid: tuple[int, ...]) -> None:
        check_grid(grid)
        if len(grid) == 1:
            raise ValueError(f"Circle needs a grid of (h, w) or (t, h, w); got {grid}")
        if self.pooled is not None:
            _check_cells(self.pooled, grid[-2:])

    def axis(self, extent: int, index: int) -> Axis:
        """The square around the disc."""
        r = self.radius
        return plain_axis([(max(x - r + 1, 0), min(x + r, extent)) for x in range(extent)])

    def axes(self, grid: tuple[int, ...]) -> tuple[Axis, ...]:
        return tuple(Dense().axis(extent, 0) for extent in grid[:-2]) + super().axes(grid)[-2:]

    def inside(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        height, width = grid[-2:]

        def disc(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            dy = query // width % height - key // width % height
            dx = query % width - key % width
            return dy * dy + dx * dx < self.radius**2

        return disc

    def density(self, grid: tuple[int, ...]) -> float:
        self.check(grid)
        height, width = grid[-2:]
        pairs = 0
        for dy in range(-min(self.radius, height) + 1, min(self.radius, height)):
            reach = min(math.isqrt(self.radius**2 - dy * dy - 1), width - 1)  # the largest dx with dy^2 + dx^2 < r^2
            pairs += (height - abs(dy)) * (width * (2 * reach + 1) - reach * (reach + 1))
        return pairs / (height * width) ** 2

    def prepare(
        self, k: torch.Tensor, v: torch.Tensor, extra_kv: Tensors, extra_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors, torch.Tensor | None]:
        if self.pooled is None:
            return k, v, extra_kv, extra_mask
        pooled = pool_tokens(k, self.pooled, self.weight), pool_tokens(v, self.pooled, self.weight)
        if extra_kv is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(extra_kv, pooled, strict=True))
            pooled = key, value
        if extra_mask is not None:
            seen = extra_mask.new_ones(len(extra_mask), pooled[0].shape[1] - extra_mask.shape[1])
            extra_mask = torch.cat([extra_mask, seen], 1)
        return k, v, pooled, extra_mask


def pool_tokens(tensor: torch.Tensor, factor: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Sum tokens over cells of `factor` x `factor`: the pooled keys and values of CLEAR.

    Args:
        tensor: `[batch, h, w, heads, dim]` or `[batch, t, h, w, heads, dim]`.
        factor: side of a cell in tokens; divides h and w.
        weight: `[factor, factor]`, one weight per place in a cell, shared by heads and channels; learnable. The mean
            (`1 / factor ** 2` everywhere) when None.

    Returns:
        `[batch, (t *) h / factor * w / factor, heads, dim]`, in the dtype of `tensor`.

    >>> pool_tokens(torch.arange(8.0).view(1, 2, 4, 1, 1), 2).flatten().tolist()
    [2.5, 4.5]
    """
    if tensor.ndim not in (5, 6):
        raise ValueError(f"pool_tokens needs [batch, h, w, heads, dim], with t before h for video; got {tensor.shape}")
    _check_cells(factor, tuple(tensor.shape[-4:-2]))
    if weight is not None and tuple(weight.shape) != (factor, factor):
        raise ValueError(f"weight must be [{factor}, {factor}], one per place in a cell; got {list(weight.shape)}")
    cells = tensor.unflatten(-3, (-1, factor)).unflatten(-5, (-1, factor))  # [batch, ..., h / f, f, w / f, f, heads, d]
    if weight is None:
        out = cells.mean((-5, -3))
    else:
        out = (cells * weight.to(tensor)[:, None, :, None, None]).sum((-5, -3))
    return out.flatten(1, -3)


def _check_cells(factor: int, sizes: tuple[int, ...]) -> None:
    if any(size % factor for size in sizes):
        raise ValueError(
            f"{sizes[0]} x {sizes[1]} tokens cannot be pooled in cells of {factor} x {factor}; "
            "use a factor that divides both, or pad the map"
        )
