"""Draw a scene with anti-aliased edges."""

import numpy as np

from vision_attn.shapes.scene import BACKGROUND, COLORS, Scene, Thing

_CROSS_ARM = 0.38  # half width of a cross's arms, as a share of its radius


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far a point lies outside the shape's edge (negative inside); `x` to the right, `y` down, from the centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - 0.9 * radius
    if shape == "cross":
        arm = _CROSS_ARM * radius
        return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))
    if shape == "triangle":  # point up, base down
        return np.maximum((2 * ax - y - radius) / np.sqrt(5.0), y - radius)
    raise ValueError(f"unknown shape {shape!r}; shapes are circle, square, triangle, cross")


def coverage(thing: Thing, center: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share of each pixel that the thing covers, `[frames, height, width]`; `center` is `[frames, 2]` in pixels."""
    x = np.arange(width) + 0.5 - center[:, 0, None, None]
    y = (np.arange(height) + 0.5)[:, None] - center[:, 1, None, None]
    return np.clip(0.5 - distance(thing.shape, x, y, thing.radius * min(height, width)), 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Pixels in 0..1, `[frames, height, width, 3]`, float32.

    Example:
        >>> import numpy as np
        >>> from vision_attn.shapes import render, sample_scene
        >>> render(sample_scene(np.random.default_rng(0))).shape
        (17, 48, 48, 3)
    """
    video = np.empty((scene.frames, scene.height, scene.width, 3), dtype=np.float64)
    video[:] = np.asarray(BACKGROUND) / 255
    for thing, center in zip(scene.things, scene.paths(), strict=True):
        alpha = coverage(thing, center, scene.height, scene.width)[..., None]
        video += alpha * (np.asarray(COLORS[thing.color]) / 255 - video)
    return video.astype(np.float32)
