"""A judge that looks at pixels only: which shapes, which colours, how many, and which way they move."""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations

import numpy as np

from vision_attn.shapes.captions import parse
from vision_attn.shapes.render import distance
from vision_attn.shapes.scene import BACKGROUND, COLORS, DIRECTIONS, SHAPES

_CONTRAST = 0.22  # a pixel belongs to a thing when a channel differs this much from the background
_SMALLEST = 0.006  # share of the frame's pixels below which a blob counts as dirt
_TEMPLATE = 24  # side of the boxes in which outlines are compared


@dataclass
class Track:
    """One thing followed through the frames: what it looked like in each, and where it was."""

    shapes: list[str] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    centers: list[tuple[float, float]] = field(default_factory=list)

    @property
    def shape(self) -> str:
        return Counter(self.shapes).most_common(1)[0][0]

    @property
    def color(self) -> str:
        return Counter(self.colors).most_common(1)[0][0]

    def direction(self, least: float) -> str | None:
        """The way it moves, or None if it moves less than `least` pixels from its first to its last frame."""
        move = np.subtract(self.centers[-1], self.centers[0])
        if np.abs(move).max() < least:
            return None
        return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], move)))


@dataclass
class Verdict:
    """What the judge saw: the number of things in each frame, and the tracks, longest first."""

    counts: list[int]
    tracks: list[Track]
    height: int
    width: int


def _boxed(solidity: np.ndarray) -> np.ndarray:
    """Solidity in 0..1, cut to the box of what is more than half solid, at one size for all."""
    import cv2

    front = solidity > 0.5
    rows, columns = np.flatnonzero(front.any(1)), np.flatnonzero(front.any(0))
    box = solidity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cv2.resize(box.astype(np.float32), (_TEMPLATE, _TEMPLATE), interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=1)
def _templates() -> list[tuple[str, np.ndarray]]:
    """Every shape, sharp and at three degrees of blur."""
    import cv2

    x, y = np.meshgrid(np.arange(-80, 80) + 0.5, np.arange(-80, 80) + 0.5)
    found = []
    for shape in SHAPES:
        sharp = (distance(shape, x, y, 50) < 0).astype(np.float32)
        found += [(shape, _boxed(sharp))]
        found += [(shape, _boxed(cv2.GaussianBlur(sharp, (0, 0), blur))) for blur in (4, 8, 12)]
    return found


def _name_shape(solidity: np.ndarray) -> str:
    seen = _boxed(solidity)
    return min(_templates(), key=lambda named: float(np.square(named[1] - seen).sum()))[0]


def _name_color(pixels: np.ndarray) -> str:
    seen = np.median(pixels, axis=0)
    return min(COLORS, key=lambda name: float(np.abs(seen - np.asarray(COLORS[name]) / 255).sum()))


def judge(video: np.ndarray) -> Verdict:
    """Find and follow the things in a video.

    Args:
        video: Pixels in 0..1, `[frames, height, width, 3]`; one frame for an image.

    Example:
        >>> import numpy as np
        >>> from vision_attn.shapes import judge, render, sample_scene
        >>> scene = sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue", "direction": "up"}])
        >>> track = judge(render(scene)).tracks[0]
        >>> track.shape, track.color, track.direction(least=4)
        ('cross', 'blue', 'up')
    """
    import cv2

    video = np.asarray(video, dtype=np.float32)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a video is [frames, height, width, 3] with values in 0..1, got shape {video.shape}")
    frames, height, width, _ = video.shape
    least = _SMALLEST * height * width
    reach = 0.2 * min(height, width)
    counts: list[int] = []
    tracks: list[Track] = []
    for number, frame in enumerate(video):
        contrast = np.abs(frame - np.asarray(BACKGROUND) / 255).max(axis=-1)
        front = (contrast > _CONTRAST).astype(np.uint8)
        found, labels, stats, centers = cv2.connectedComponentsWithStats(front, connectivity=8)
        blobs = [b for b in range(1, found) if stats[b, cv2.CC_STAT_AREA] >= least]
        counts.append(len(blobs))
        free = [track for track in tracks if number - track.frames[-1] <= 3]
        for blob in sorted(blobs, key=lambda b: -stats[b, cv2.CC_STAT_AREA]):
            x, y, w, h = stats[blob, :4]
            mask = labels[y : y + h, x : x + w] == blob
            inside = contrast[y : y + h, x : x + w] * mask
            # A soft edge lies where the contrast is half of what it is inside.
            solidity = np.clip(inside / np.quantile(inside[mask], 0.8), 0, 1)
            center = (float(centers[blob][0]), float(centers[blob][1]))
            near = [(np.hypot(*np.subtract(t.centers[-1], center)), i) for i, t in enumerate(free)]
            gap, nearest = min(near, default=(np.inf, -1))
            if gap <= reach:
                track = free.pop(nearest)
            else:
                track = Track()
                tracks.append(track)
            track.frames.append(number)
            track.centers.append(center)
            track.shapes.append(_name_shape(solidity))
            track.colors.append(_name_color(frame[y : y + h, x : x + w][solidity > 0.5]))
    return Verdict(counts, sorted(tracks, key=lambda t: -len(t.frames)), height, width)


def score(video: np.ndarray, text: str) -> dict[str, float]:
    """Compare a video with its caption; every value is a share in 0..1.

    Returns:
        `color`, `shape`, `both`: share of the named things seen with the right colour, shape, both (majority over
        the frames); `count`: share of frames with exactly the right number of things; `direction`: share of the
        named movements seen (1.0 where none is named).

    Example:
        >>> import numpy as np
        >>> from vision_attn.shapes import render, sample_scene, score
        >>> scene = sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue", "direction": "up"}])
        >>> score(render(scene), "a blue cross moves up")
        {'color': 1.0, 'shape': 1.0, 'both': 1.0, 'count': 1.0, 'direction': 1.0}
    """
    wanted = parse(text)
    seen = judge(video)
    moves = sum("direction" in thing for thing in wanted)
    least = 0.06 * min(seen.height, seen.width)
    best = (-1.0, {})
    candidates: list[Track | None] = [*seen.tracks[: len(wanted) + 2], *[None] * len(wanted)]
    for order in permutations(candidates, len(wanted)):
        pairs = [(thing, track) for thing, track in zip(wanted, order, strict=True) if track]
        color = sum(track.color == thing["color"] for thing, track in pairs) / len(wanted)
        shape = sum(track.shape == thing["shape"] for thing, track in pairs) / len(wanted)
        both = sum((track.color, track.shape) == (thing["color"], thing["shape"]) for thing, track in pairs)
        right = sum("direction" in thing and track.direction(least) == thing["direction"] for thing, track in pairs)
        result = {
            "color": color,
            "shape": shape,
            "both": both / len(wanted),
            "count": float(np.mean([count == len(wanted) for count in seen.counts])),
            "direction": right / moves if moves else 1.0,
        }
        best = max(best, (sum(result.values()), result), key=lambda pair: pair[0])
    return best[1]
