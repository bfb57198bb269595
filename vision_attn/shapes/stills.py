"""Still images with a class: the colour and shape of the largest thing, which is never a close call."""

import math

import numpy as np

from vision_attn.shapes.scene import COLORS, SHAPES, Scene, Thing, sample_scene

LABELS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
AREAS = {"circle": math.pi, "square": 3.24, "triangle": 2.0, "cross": 2.4624}  # of radius 1
_CLEAR = 1.2  # the largest thing covers at least this many times the area of the next


def largest(scene: Scene) -> Thing:
    """The thing that covers most pixels.

    >>> from vision_attn.shapes.scene import Scene, Thing
    >>> largest(Scene((Thing("cross", "red", 0.2, (0.3, 0.3)), Thing("circle", "blue", 0.19, (0.7, 0.7))))).shape
    'circle'
    """
    return max(scene.things, key=_area)


def label_of(scene: Scene) -> int:
    """Index in `LABELS` of the colour and shape of the largest thing."""
    thing = largest(scene)
    return LABELS.index(f"{thing.color} {thing.shape}")


def sample_still(rng: np.random.Generator, *, height: int = 48, width: int = 48) -> Scene:
    """Draw a scene of one frame with one, two or three things, one of them clearly the largest.

    Every label is as likely as every other. Where there are several things, the largest is a big one in words and the
    others are small ones, and it covers at least 1.2 times the area of each.

    Example:
        >>> scene = sample_still(np.random.default_rng(0))
        >>> LABELS[label_of(scene)]
        'yellow cross'
    """
    main = {"shape": str(rng.choice(SHAPES)), "color": str(rng.choice(list(COLORS)))}
    others = int(rng.integers(3))
    if others:
        main["size"] = "big"
    while True:
        wanted = [main, *({"size": "small"} for _ in range(others))]
        scene = sample_scene(rng, wanted, height=height, width=width, frames=1)
        first, *rest = scene.things
        if all(_area(first) >= _CLEAR * _area(thing) for thing in rest):
            order = rng.permutation(len(scene.things))
            return Scene(tuple(scene.things[i] for i in order), height, width, 1)


def _area(thing: Thing) -> float:
    return AREAS[thing.shape] * thing.radius**2
