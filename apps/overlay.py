"""Maps drawn over a picture, and panels on a sheet; everything is uint8 RGB `[height, width, 3]`."""

import math

import cv2
import numpy as np

FONT = cv2.FONT_HERSHEY_SIMPLEX
LARGEST = 6000  # pixels along a side of a sheet
LINE, GAP = 18, 8  # pixels


def overlay(picture: np.ndarray, values: np.ndarray, mark: tuple[float, float] | None = None) -> np.ndarray:
    """A map `[rows, columns]` as colours over a dimmed picture, from its least (blue) to its greatest value (red).

    Args:
        mark: a place, (down, across) from 0 to 1, that gets a white ring.
    """
    height, width = picture.shape[:2]
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    level = np.rint((values - low) / max(high - low, 1e-30) * 255).astype(np.uint8)
    level = cv2.resize(level, (width, height), interpolation=cv2.INTER_NEAREST)
    colours = cv2.applyColorMap(level, cv2.COLORMAP_TURBO)[..., ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    drawn = np.ascontiguousarray(cv2.addWeighted(grey, 0.3, np.ascontiguousarray(colours), 0.7, 0))
    return drawn if mark is None else ring(drawn, mark)


def ring(picture: np.ndarray, mark: tuple[float, float]) -> np.ndarray:
    """The picture with a white ring, black inside and out, around a place (down, across) from 0 to 1."""
    drawn = picture.copy()
    height, width = drawn.shape[:2]
    centre, radius = (int(mark[1] * width), int(mark[0] * height)), max(3, min(height, width) // 32)
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.circle(drawn, centre, radius, colour, thickness, cv2.LINE_AA)
    return drawn


def panel_size(height: int, width: int, panels: int, per_row: int) -> tuple[int, int]:
    """Height and width to draw pictures at: 224 pixels along the longer side, less where a sheet grows too large."""
    rows = -(-panels // per_row)
    most = min((LARGEST - GAP) // per_row - GAP, (LARGEST - GAP) // rows - GAP - 2 * LINE, 224)
    scale = max(most, 16) / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def columns(panels: int) -> int:
    """Panels per row of a sheet that is somewhat wider than high.

    >>> columns(13)
    5
    """
    return math.ceil(math.sqrt(panels * 1.5))


def sheet(panels: list[tuple[list[str], np.ndarray]], per_row: int, title: list[str]) -> np.ndarray:
    """Panels of one size in rows, each under its lines of text, below a title. Letters beyond ASCII become ?."""
    height, width = panels[0][1].shape[:2]
    lines = max(len(text) for text, _ in panels)
    cell = height + lines * LINE + GAP, width + GAP
    wide = max(min(per_row, len(panels)) * cell[1] + GAP, 480)
    top = GAP + LINE * sum(len(_wrap(line, wide - 2 * GAP, 0.5)) for line in title)
    canvas = np.full((top + -(-len(panels) // per_row) * cell[0] + GAP, wide, 3), 255, np.uint8)
    y = GAP
    for line in title:
        for part in _wrap(line, wide - 2 * GAP, 0.5):
            y += LINE
            _write(canvas, part, (GAP, y - 5), 0.5, (0, 0, 0))
    for number, (text, picture) in enumerate(panels):
        row, column = divmod(number, per_row)
        y, x = top + row * cell[0], GAP + column * cell[1]
        for index, line in enumerate(text):
            scale = 0.4
            while scale > 0.2 and cv2.getTextSize(line, FONT, scale, 1)[0][0] > width:
                scale -= 0.02
            _write(canvas, line, (x, y + (index + 1) * LINE - 5), scale, (60, 60, 60))
        canvas[y + lines * LINE : y + lines * LINE + height, x : x + width] = picture
    return canvas


def _write(canvas: np.ndarray, text: str, at: tuple[int, int], scale: float, colour: tuple[int, int, int]) -> None:
    ascii_only = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, ascii_only, at, FONT, scale, colour, 1, cv2.LINE_AA)


def _wrap(text: str, width: int, scale: float) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        fits = cv2.getTextSize(longer, FONT, scale, 1)[0][0] <= width
        if fits or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
