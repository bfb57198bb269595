"""A grid of tokens as a picture, and the token under a pixel of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

FRAMES = 24  # of a (t, h, w) grid that are drawn
SIDE = 960  # pixels that a picture may be wide
STRIP = 128  # tokens per row of a 1-D grid
BAND = 18  # pixels above a frame, for its label
RING = "#e0532f"


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Where the tokens are in a picture: frames of `shape` (rows, columns) in `columns`, `cell` pixels a token."""

    shape: tuple[int, int]
    frames: tuple[int, ...]
    columns: int
    cell: int
    band: int

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a frame with its label and the gap beside it, in pixels."""
        gap = 6 if len(self.frames) > 1 else 0
        return self.shape[0] * self.cell + self.band + gap, self.shape[1] * self.cell + gap


def sheet(grid: tuple[int, ...], frame: int) -> Sheet:
    """How a grid is laid out; of many frames evenly spaced ones are shown, `frame` always."""
    if len(grid) == 1:
        shape, frames = (-(-grid[0] // STRIP), min(grid[0], STRIP)), (0,)
    elif len(grid) == 2:
        shape, frames = grid, (0,)
    else:
        shape, count = grid[1:], min(FRAMES, grid[0])
        shown = {round(i * (grid[0] - 1) / max(1, count - 1)) for i in range(count)}
        if frame not in shown:
            shown.remove(min(shown, key=lambda t: abs(t - frame)))
        frames = tuple(sorted({*shown, frame}))
    columns = min(len(frames), max(1, math.ceil(math.sqrt(len(frames) * shape[0] / shape[1]))))
    cell = max(1, min(28, SIDE // (columns * shape[1]), SIDE // shape[0]))
    return Sheet(shape, frames, columns, cell, BAND if len(grid) == 3 else 0)


def token_at(grid: tuple[int, ...], frame: int, x: float, y: float) -> tuple[int, ...] | None:
    """The token under a pixel of the picture that shows `frame`; None between frames and where there is no token."""
    laid = sheet(grid, frame)
    height, width = laid.tile
    index = int(y // height) * laid.columns + int(x // width)
    row, column = int((y % height - laid.band) // laid.cell), int(x % width // laid.cell)
    if not (0 <= index < len(laid.frames) and 0 <= row < laid.shape[0] and 0 <= column < laid.shape[1]):
        return None
    if len(grid) == 1:
        token = row * STRIP + column
        return (token,) if token < grid[0] else None
    return (row, column) if len(grid) == 2 else (laid.frames[index], row, column)


def paint(colors: np.ndarray, grid: tuple[int, ...], frame: int, mark: tuple[int, ...] | None = None) -> np.ndarray:
    """A picture from one colour per token, `[*grid, 3]`."""
    from PIL import Image, ImageDraw

    laid = sheet(grid, frame)
    height, width = laid.tile
    rows = -(-len(laid.frames) // laid.columns)
    canvas = np.full((rows * height, laid.columns * width, 3), 255, np.uint8)
    if len(grid) == 1:
        padded = np.full((math.prod(laid.shape), 3), 255, np.uint8)
        padded[: grid[0]] = colors
        colors = padded
    colors = colors.reshape(-1, *laid.shape, 3)
    for index, t in enumerate(laid.frames):
        top, left = index // laid.columns * height + laid.band, index % laid.columns * width
        cells = colors[t].repeat(laid.cell, 0).repeat(laid.cell, 1)
        if laid.cell >= 8:
            cells[laid.cell - 1 :: laid.cell] = cells[:, laid.cell - 1 :: laid.cell] = 255
        canvas[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for index, t in enumerate(laid.frames if laid.band else ()):
        top, left = index // laid.columns * height, index % laid.columns * width
        pen.text((left + 1, top + 2), f"t = {t}", "#334155", font_size=13)
    if mark is not None and laid.cell < 6:  # a single cell is hard to find
        row, column = divmod(mark[0], STRIP) if len(grid) == 1 else mark[-2:]
        index = laid.frames.index(frame)
        y = index // laid.columns * height + laid.band + (row + 0.5) * laid.cell
        x = index % laid.columns * width + (column + 0.5) * laid.cell
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), outline=RING, width=2)
    return np.asarray(image)
