"""What is measured on a clip of the shapes world. The truth of a caption is known, so all of it is exact arithmetic."""

from __future__ import annotations

import numpy as np

from vision_attn.diffusion.repeats import no_repeat
from vision_attn.shapes import judge, parse, score

# Root mean square distance of two frames, 0 to 255, up to which they count as the same. UltraViCo's 55 is for full
# pictures: of 30 true clips of 37 frames, all of them of one thing that moves, it takes 23 for standing still.
SAME = 10.0


def measure(video: np.ndarray, prompt: str, trained: int) -> dict[str, float]:
    """Scores of one clip.

    Args:
        video: uint8 `[frames, height, width, 3]`.
        prompt: its caption.
        trained: frames of the clips that the model was trained on.

    Returns:
        `agreement`: share of what the caption names (colour, shape, direction) that the judge sees, 0 to 1;
        `count_error`: things too many or too few, mean over the frames; `objects`: things per frame; `motion`: way of
        the longest-lived thing per frame, in shares of the frame's side; `sharpness`: see `sharpness`;
        in clips longer than trained that do not stand still `no_repeat`, UltraViCo's score, 0 to 100.

    >>> from vision_attn.shapes import render, sample_scene
    >>> scene = sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue", "direction": "up"}])
    >>> clip = (render(scene) * 255).round().astype(np.uint8)
    >>> found = measure(clip, "a blue cross moves up", trained=17)
    >>> found["agreement"], found["count_error"], round(found["motion"], 2)
    (1.0, 0.0, 0.02)
    """
    pixels = video.astype(np.float32) / 255
    scores, seen = score(pixels, prompt), judge(pixels)
    counts, wanted = np.array(seen.counts), parse(prompt)
    named = ["color", "shape", *["direction"] * any("direction" in thing for thing in wanted)]
    found = {
        "agreement": float(np.mean([scores[name] for name in named])),
        "count_error": float(np.abs(counts - len(wanted)).mean()),
        "objects": float(counts.mean()),
        "sharpness": sharpness(pixels),
    }
    if len(video) > 1:
        found["motion"] = motion(seen)
    fresh = no_repeat(video, trained, threshold=SAME) if len(video) > trained else None
    return found if fresh is None else found | {"no_repeat": fresh}


def motion(seen) -> float:
    """Way of the longest-lived thing per frame, as a share of the frame's shorter side; 0 where nothing is seen."""
    if not seen.tracks or len(seen.tracks[0].centers) < 2:
        return 0.0
    track = seen.tracks[0]
    way = np.hypot(*np.diff(np.array(track.centers), axis=0).T).sum()
    return float(way / (track.frames[-1] - track.frames[0]) / min(seen.height, seen.width))


def sharpness(pixels: np.ndarray) -> float:
    """Mean step from pixel to pixel, each step weighted by its size: the height of an edge over its width.

    Args:
        pixels: 0 to 1, `[frames, height, width, 3]`.

    >>> edge = np.zeros((1, 8, 8, 3))
    >>> edge[:, :, 4:] = 0.8
    >>> round(sharpness(edge), 3)
    0.8
    """
    step = np.hypot(np.diff(pixels, axis=1)[:, :, :-1], np.diff(pixels, axis=2)[:, :-1]).max(-1)
    return float(np.square(step).sum() / max(step.sum(), 1e-12))


def psnr(clip: np.ndarray, reference: np.ndarray) -> float:
    """Decibels between two uint8 clips of one shape; infinite for equal ones."""
    error = np.square(clip.astype(np.float64) - reference.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
