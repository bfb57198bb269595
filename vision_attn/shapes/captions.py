"""The grammar of captions: `a [small|big] COLOR SHAPE [moves DIRECTION]`, joined by `and`."""

import numpy as np

from vision_attn.shapes.scene import COLORS, CROWD, DIRECTIONS, SHAPES, SIZES, Scene

WORDS = ("a", "and", "moves", *SIZES, *COLORS, *SHAPES, *DIRECTIONS)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Say what a scene shows. Sizes are named only with `rng`, for about half of the small and big things.

    Example:
        >>> from vision_attn.shapes import Scene, Thing, caption
        >>> caption(Scene((Thing("circle", "red", 0.15, (0.3, 0.5), "right"),)))
        'a red circle moves right'
    """
    parts = []
    for thing in scene.things:
        radius = thing.radius / CROWD[len(scene.things) - 1]
        size = next((name for name, (low, high) in SIZES.items() if low <= radius <= high), None)
        named = size and rng is not None and rng.random() < 0.5
        words = ["a", *([size] if named else []), thing.color, thing.shape]
        if thing.direction and scene.frames > 1:
            words += ["moves", thing.direction]
        parts.append(" ".join(words))
    return " and ".join(parts)


def parse(text: str) -> list[dict]:
    """Turn a caption into one dict per thing with the fields that it names (`size color shape direction`).

    Raises:
        ValueError: The text is not of the grammar.

    Example:
        >>> parse("a big red circle moves right")
        [{'size': 'big', 'color': 'red', 'shape': 'circle', 'direction': 'right'}]
    """
    things = []
    for part in text.lower().strip().rstrip(".").split(" and "):
        words = part.split()
        found: dict[str, str] = {}
        for word in words:
            for field, known in (("size", SIZES), ("color", COLORS), ("shape", SHAPES), ("direction", DIRECTIONS)):
                if word in known and field not in found:
                    found[field] = word
        if "color" not in found or "shape" not in found or any(word not in WORDS or word == "and" for word in words):
            raise ValueError(
                f"cannot read {part!r} as 'a [small|big] COLOR SHAPE [moves DIRECTION]'; "
                f"the words are {', '.join(WORDS)}"
            )
        things.append(found)
    return things
