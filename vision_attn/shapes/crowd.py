"""Crowded pictures in which some things usually come together, so that a model can learn to expect what is not there.

24 kinds of things, a colour and a shape each, form six contexts of one anchor and three partners. A picture of a
context always shows its anchor, and each partner with some probability; a model trained where partners are frequent
names them where they are absent. Everything is known exactly.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vision_attn.shapes.render import distance
from vision_attn.shapes.scene import COLORS

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
KINDS = tuple(f"{color} {shape}" for color in ("red", "green", "blue", "yellow") for shape in SHAPES)
# The first of each row is the anchor.
CONTEXTS = np.random.default_rng(7).permutation(len(KINDS)).reshape(6, 4)
CELLS, CELL = 4, 8  # cells a side, pixels a cell
MOST = 7  # things in a picture
TRAINED = 0.8  # probability of a partner in the pictures that models learn from
GREY, NOISE = 0.35, 0.15


@dataclasses.dataclass(frozen=True)
class Crowd:
    """What is in a picture.

    Args:
        places: cell, counted in raster order -> kind, an index into `KINDS`.
        strength: cell -> how far its thing stands out from the grey, 0 to 1.
        context: row of `CONTEXTS`, or None for things drawn without one.
    """

    places: dict[int, int]
    strength: dict[int, float]
    context: int | None

    @property
    def kinds(self) -> list[int]:
        """The kinds that are there: the anchor first, then by number."""
        anchor = None if self.context is None else int(CONTEXTS[self.context, 0])
        return sorted(self.places.values(), key=lambda kind: (kind != anchor, kind))

    @property
    def absent_partners(self) -> list[int]:
        """Partners of the anchor that are not there."""
        if self.context is None:
            return []
        return [int(kind) for kind in CONTEXTS[self.context, 1:] if kind not in self.places.values()]


def sample_crowd(rng: np.random.Generator, partners: float | None = TRAINED) -> Crowd:
    """Draw what is in a picture.

    Args:
        partners: probability of each partner of the anchor; None for 2 to 6 kinds without a context, all clear.

    >>> crowd = sample_crowd(np.random.default_rng(0))
    >>> [KINDS[kind] for kind in crowd.kinds][:2]
    ['red triangle', 'green cross']
    """
    context = None
    if partners is None:
        kinds = [int(kind) for kind in rng.permutation(len(KINDS))[: rng.integers(2, 7)]]
    else:
        context = int(rng.integers(len(CONTEXTS)))
        anchor, *rest = (int(kind) for kind in CONTEXTS[context])
        kinds = [anchor, *(kind for kind in rest if rng.random() < partners)]
        others = [int(kind) for kind in rng.permutation(len(KINDS)) if kind not in CONTEXTS[context]]
        while others and len(kinds) < MOST and rng.random() < 0.35:
            kinds.append(others.pop())
    cells = [int(cell) for cell in rng.permutation(CELLS**2)[: len(kinds)]]
    strength = {}
    for cell, kind in zip(cells, kinds, strict=True):
        faint = context is not None and kind != CONTEXTS[context, 0]
        least, most = (0.25, 1.0) if context is None else (0.25, 0.6) if faint else (0.7, 1.0)
        strength[cell] = float(rng.uniform(least, most))
    return Crowd(dict(zip(cells, kinds, strict=True)), strength, context)


@functools.cache
def stencils(cell: int = CELL) -> np.ndarray:
    """Share of each pixel of a cell that each shape covers, `[shapes, cell, cell]`."""
    y, x = np.mgrid[:cell, :cell] + 0.5 - cell / 2
    radius, found = 0.44 * cell, []
    for shape in SHAPES:
        if shape == "ring":
            away = np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
        elif shape == "bar":
            away = np.maximum(np.abs(x) - radius, np.abs(y) - 0.35 * radius)
        else:
            away = distance(shape, x, y, radius)
        found.append(np.clip(0.5 - away, 0, 1))
    return np.stack(found)


def draw_crowd(crowd: Crowd, rng: np.random.Generator, cell: int = CELL) -> np.ndarray:
    """The picture, uint8 `[4 * cell, 4 * cell, 3]`, with noise.

    >>> draw_crowd(sample_crowd(np.random.default_rng(0)), np.random.default_rng(1)).shape
    (32, 32, 3)
    """
    picture = np.full((CELLS * cell, CELLS * cell, 3), GREY)
    for place, kind in crowd.places.items():
        color, shape = KINDS[kind].split()
        row, column = divmod(place, CELLS)
        area = picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        alpha = crowd.strength[place] * stencils(cell)[SHAPES.index(shape)][..., None]
        area += alpha * (np.asarray(COLORS[color]) / 255 - area)
    picture += rng.normal(0, NOISE, picture.shape)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def describe(crowd: Crowd) -> str:
    """The caption: the anchor first, then by number.

    >>> describe(Crowd({3: 0, 5: 7}, {3: 1.0, 5: 1.0}, None))
    'there is a red circle and a green square .'
    """
    names = [f"a {KINDS[kind]}" for kind in crowd.kinds]
    listed = names[0] if len(names) == 1 else " , ".join(names[:-1]) + " and " + names[-1]
    return f"there is {listed} ."


def mentioned(text: str) -> list[int]:
    """The kinds that a caption names, in order, repeats included.

    >>> [KINDS[kind] for kind in mentioned("there is a red circle and a red circle and a bar .")]
    ['red circle', 'red circle']
    """
    words = text.split()
    pairs = (f"{a} {b}" for a, b in zip(words, words[1:], strict=False))
    return [KINDS.index(pair) for pair in pairs if pair in KINDS]


WORDS = (
    *(
        "user",
        "assistant",
        ":",
        ".",
        ",",
        "?",
        "describe",
        "the",
        "image",
        "is",
        "there",
        "a",
        "in",
        "and",
        "yes",
        "no",
    ),
    *("red", "green", "blue", "yellow"),
    *SHAPES,
)
