"""Where the tokens of a sequence lie on the image."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Place:
    """`prefix` tokens that have no place (class token, registers), then those of `grid`, (rows, columns), row-major.

    The grid is None where it cannot be told.
    """

    prefix: int
    grid: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        return self.prefix + (math.prod(self.grid) if self.grid else 0)


def place(tokens: int, image: tuple[int, int] | None, prefix: int | None, grid: tuple[int, int] | None) -> Place:
    """Find the grid of a sequence from the size of the image, in pixels; `prefix` and `grid` where they are known.

    A grid is accepted that is the image divided by one stride along both axes, rounded up or down.

    >>> place(201, (224, 224), None, None)
    Place(prefix=5, grid=(14, 14))
    >>> place(61, (96, 160), 1, None)
    Place(prefix=1, grid=(6, 10))
    """
    if grid is not None and tokens >= math.prod(grid):
        return Place(tokens - math.prod(grid), grid)
    if image is None:
        return Place(0, None)
    for before in dict.fromkeys((0, 1, 2, 5) if prefix is None else (prefix, 0)):
        found = {
            sizes
            for stride in range(1, max(image) + 1)
            for sizes in ((-(-image[0] // stride), -(-image[1] // stride)), (image[0] // stride, image[1] // stride))
            if math.prod(sizes) == tokens - before > 1
        }
        if len(found) == 1:
            return Place(before, found.pop())
    return Place(tokens if tokens == prefix else 0, None)


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a map is cut before attention: `token[w, i]` is the token that is number i of window w, -1 for padding."""

    grid: tuple[int, int]
    token: torch.Tensor

    @property
    def slot(self) -> torch.Tensor:
        """The inverse, `[tokens, 2]`: window, and number within it."""
        flat = self.token.flatten()
        where = torch.empty(math.prod(self.grid), dtype=torch.long)
        where[flat[flat >= 0]] = torch.arange(len(flat))[flat >= 0]
        return torch.stack([where // self.token.shape[1], where % self.token.shape[1]], 1)


def cut(
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    whole: tuple[int, int] = (0, 0),
    pad_first: bool = False,
) -> Windows:
    """Windows of a map that is rolled by `-shift` and padded at the bottom and right, to the size `whole` at least.

    >>> cut((2, 4), (2, 2)).token.tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    number = torch.arange(math.prod(grid)).view(grid)
    below, right = (max(-(-n // w) * w, least) - n for n, w, least in zip(grid, window, whole, strict=True))
    if not pad_first:
        number = number.roll((-shift[0], -shift[1]), (0, 1))
    number = torch.nn.functional.pad(number, (0, right, 0, below), value=-1)
    if pad_first:
        number = number.roll((-shift[0], -shift[1]), (0, 1))
    number = number.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2)
    return Windows(grid, number.flatten(2).flatten(0, 1))


def windows_of(
    modules: list[tuple[Any, tuple[int, ...] | None]],
    windows: int,
    tokens: int,
    grid: tuple[int, ...] = (),
    channels: int = 0,
) -> Windows | None:
    """The windows of an attention layer that gets `windows` times `tokens` tokens of a map, or None if it has none.

    Known are blocks with `window_size` and `shift_size` (Swin), layers with `window` and `shift` or with `regions`
    (bi-level routing), and layers that pad their map.

    Args:
        modules: the layer and those around it, innermost first, each with the shape of its input.
        grid: what `attend` was told.
        channels: of all heads; says which axes of an input are the map.
    """
    for number, (module, shape) in enumerate(modules):
        if shape is None or len(shape) != 4:
            continue
        size, shift = (_pair(getattr(module, name, None)) for name in ("window_size", "shift_size"))
        own, by = (_pair(getattr(module, name, None)) for name in ("window", "shift"))
        regions = getattr(module, "regions", None)
        cuts = []
        if len(grid) == 2:
            if number == 0 and shape[3] == channels and shape[1:3] != grid:
                cuts = [(grid,)]
        elif number == 0 and isinstance(regions, int):  # rounded up or down, which depends on the form
            up = tuple(-(-n // regions) for n in shape[1:3])
            cuts = [(up, (0, 0), tuple(n * regions for n in up)), (tuple(max(n // regions, 1) for n in shape[1:3]),)]
        elif not grid and number == 0 and own is not None and by is not None:
            extents = [min(n, w) if module.shrink else w for n, w in zip(shape[1:3], own, strict=True)]
            shifts = [s if n > w else 0 for n, w, s in zip(shape[1:3], own, by, strict=True)]
            cuts = [(extents, shifts, (0, 0), True)]
        elif not grid and size is not None and shift is not None:
            cuts = [(size, shift)]
        for options in cuts:
            found = cut(shape[1:3], *options).token
            found = found.view(1, -1) if windows == 1 else found
            if found.shape == (windows, tokens):
                return Windows(shape[1:3], found)
    return None


def _pair(value: Any) -> tuple[int, int] | None:
    value = (value, value) if isinstance(value, int) else value
    whole = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value)
    return tuple(value) if whole else None
