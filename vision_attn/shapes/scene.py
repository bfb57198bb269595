"""Scenes of the shapes world: what is there, and where it is in every frame."""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (230, 60, 60),
    "green": (60, 200, 90),
    "blue": (70, 120, 250),
    "yellow": (250, 210, 60),
    "white": (245, 245, 245),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = {"small": (0.18, 0.195), "big": (0.235, 0.255)}  # radius as a share of the frame's shorter side, when alone
CROWD = (1.0, 0.8, 0.6)  # lengths are times this in scenes of one, two, three things
BACKGROUND = (20, 22, 30)


@dataclass(frozen=True)
class Thing:
    """One coloured shape and its path.

    Lengths are shares of the frame's shorter side, so that one scene can be drawn at any size.

    Args:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        radius: Half the extent of the shape, 0 to 0.5.
        start: Centre `(x, y)` in the first frame.
        direction: One of `DIRECTIONS`, or None to stay.
        speed: Distance per frame at the start.
        room: Distance to where the shape comes to rest: it slows down smoothly, never turns back, never repeats.
        sway: Amplitude, angular frequency per frame and phase of a slight drift across the path.
    """

    shape: str
    color: str
    radius: float
    start: tuple[float, float]
    direction: str | None = None
    speed: float = 0.025
    room: float = 0.5
    sway: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def path(self, frames: int) -> np.ndarray:
        """Centres in every frame, `[frames, 2]` as `(x, y)`."""
        at = np.tile(np.asarray(self.start, dtype=np.float64), (frames, 1))
        if self.direction is None:
            return at
        along = np.asarray(DIRECTIONS[self.direction], dtype=np.float64)
        t = np.arange(frames)
        amplitude, frequency, phase = self.sway
        drift = amplitude * (np.sin(frequency * t + phase) - np.sin(phase))
        return at + np.outer(self.room * np.tanh(self.speed * t / self.room), along) + np.outer(drift, along[::-1])


@dataclass(frozen=True)
class Scene:
    """One to three things in a frame of `height` x `width` pixels over `frames` frames; later things lie on top."""

    things: tuple[Thing, ...]
    height: int = 48
    width: int = 48
    frames: int = 17

    def paths(self) -> np.ndarray:
        """Centres in pixels, `[things, frames, 2]` as `(x, y)`."""
        return np.stack([thing.path(self.frames) for thing in self.things]) * min(self.height, self.width)


def sample_thing(
    rng: np.random.Generator,
    *,
    shape: str | None = None,
    color: str | None = None,
    size: str | None = None,
    direction: str | None = None,
    extent: tuple[float, float] = (1.0, 1.0),
    scale: float = 1.0,
) -> Thing:
    """Draw what is not given, with all lengths times `scale`.

    Lengths are shares of the frame's shorter side; `extent` is its `(width, height)` in these shares.
    """
    shape = shape or str(rng.choice(SHAPES))
    color = color or str(rng.choice(list(COLORS)))
    low, high = SIZES[size] if size else (SIZES["small"][0], SIZES["big"][1])
    radius = float(rng.uniform(low, high)) * scale
    margin = radius + 0.03
    start = [float(rng.uniform(margin, side - margin)) for side in extent]
    if direction is None:
        return Thing(shape, color, radius, (start[0], start[1]))
    along = DIRECTIONS[direction]
    axis = 0 if along[0] else 1
    least = 0.33 * scale
    room = float(rng.uniform(least, max(extent[axis] - 2 * margin, least)))
    slack = float(rng.uniform(0, max(extent[axis] - 2 * margin - room, 0)))
    start[axis] = margin + slack if along[axis] > 0 else extent[axis] - margin - slack
    # Faster than the eye needs at the start, so that even the shortest room is crossed visibly within 17 frames.
    speed = float(rng.uniform(0.024, 0.034))
    sway = (float(rng.uniform(0, 0.02)), float(rng.uniform(0.1, 0.3)), float(rng.uniform(0, 2 * np.pi)))
    return Thing(shape, color, radius, (start[0], start[1]), direction, speed, room, sway)


def sample_scene(
    rng: np.random.Generator,
    wanted: list[dict] | int = 1,
    *,
    height: int = 48,
    width: int = 48,
    frames: int = 17,
    moving: bool = True,
) -> Scene:
    """Draw a scene whose things never touch.

    Args:
        rng: Source of randomness.
        wanted: How many things (1 to 3), or one dict of fixed fields (`shape color size direction`) for each thing.
        height: Frame height in pixels.
        width: Frame width in pixels.
        frames: Number of frames; 1 gives a still image.
        moving: Draw a direction for each thing that has none given.

    Raises:
        ValueError: Not 1 to 3 things, or they do not fit side by side.

    Example:
        >>> import numpy as np
        >>> sample_scene(np.random.default_rng(0), [{"shape": "circle", "color": "red"}]).things[0].shape
        'circle'
    """
    things = [{} for _ in range(wanted)] if isinstance(wanted, int) else list(wanted)
    if not 1 <= len(things) <= 3:
        raise ValueError(f"a scene holds 1 to 3 things, got {len(things)}; draw several scenes for more")
    side = min(height, width)
    extent = (width / side, height / side)
    for _ in range(60):
        drawn: list[Thing] = []
        for fixed in things:
            fixed = dict(fixed)
            if moving and frames > 1 and not fixed.get("direction"):
                fixed["direction"] = str(rng.choice(list(DIRECTIONS)))
            for _ in range(40):
                thing = sample_thing(rng, **fixed, extent=extent, scale=CROWD[len(things) - 1])
                if all(_apart(thing, other, frames) for other in drawn):
                    drawn.append(thing)
                    break
            else:
                break
        if len(drawn) == len(things):
            return Scene(tuple(drawn), height, width, frames)
    raise ValueError(f"no room for {things} in {height}x{width} pixels; ask for fewer or smaller things")


def _apart(one: Thing, other: Thing, frames: int) -> bool:
    gap = np.abs(one.path(frames) - other.path(frames)).max(axis=-1).min()
    return bool(gap >= one.radius + other.radius + 0.03)
