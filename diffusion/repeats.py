"""NoRepeat: whether a long video shows its beginning again."""

from __future__ import annotations

from typing import Any

import numpy as np

THRESHOLDS = {"ultravico": 55.0, "riflex": 100.0}
SAMPLED = 8  # frames that decide whether a video stands still


def no_repeat(
    videos: Any, period: float, *, variant: str = "ultravico", threshold: float | None = None
) -> float | None:
    """NoRepeat score from 0 to 100, more is better.

    Within a quarter of `period` around it, the frame nearest to the first one is looked for; from there on every frame
    is compared with the beginning of the video. "ultravico": the share of these frames that are farther than
    `threshold` from their counterpart, mean over the videos; those that stand still (mean distance of 8 frames below
    `threshold`) are left out. "riflex": the share of videos whose mean distance is above `threshold`.

    The distance of two frames is the root of the mean squared difference of their values on the scale from 0 to 255.
    The papers give the thresholds but not the scale of their distance, so published scores may not compare; a threshold
    fit for other pictures (a small object on a plain ground) is lower.

    Args:
        videos: `[batch, frames, height, width, 3]`, or one without the batch; 0 to 1, or uint8.
        period: frames after which the model repeats itself, usually the trained length; below the frames of the video.
        variant: "ultravico" or "riflex".
        threshold: distance; None for that of the paper, 55 or 100.

    Returns:
        The score; None where every video stands still.

    Raises:
        TypeError, ValueError: a video of another form, a period outside the video, an unknown variant.

    >>> once = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    >>> no_repeat(once, 8), no_repeat(np.concatenate([once, once]), 16)
    (100.0, 0.0)

    Papers: UltraViCo: Breaking Extrapolation Limits in Video Diffusion Transformers; RIFLEx: A Free Lunch for Length
    Extrapolation in Video Diffusion Transformers.
    """
    if variant not in THRESHOLDS:
        raise ValueError(f"there is no variant {variant!r}; allowed: {', '.join(THRESHOLDS)}")
    threshold = THRESHOLDS[variant] if threshold is None else threshold
    clips = np.asarray(videos)
    clips = clips[None] if clips.ndim == 4 else clips
    if clips.ndim != 5 or clips.shape[-1] != 3 or not (clips.dtype == np.uint8 or clips.dtype.kind == "f"):
        raise TypeError(f"videos must be [batch, frames, height, width, 3]; got {clips.dtype} {list(clips.shape)}")
    if not 1 <= period < clips.shape[1]:
        raise ValueError(f"period must be at least 1 and below the {clips.shape[1]} frames of the video; got {period}")
    scores = []
    for clip in clips:
        frames = clip.astype(np.float64) * (1 if clip.dtype == np.uint8 else 255)
        if variant == "ultravico" and _stands_still(frames, threshold):
            continue
        first = max(round(0.75 * period), 1)
        near = range(first, min(max(round(1.25 * period), first), len(frames) - 1) + 1)
        start = min(near, key=lambda at: distance(frames[at], frames[0]))
        apart = distance(frames[start:], frames[: len(frames) - start])
        scores.append((apart > threshold).mean() if variant == "ultravico" else float(apart.mean() > threshold))
    return 100 * float(np.mean(scores)) if scores else None


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square difference over the last three axes."""
    return np.sqrt(np.square(a - b).mean((-3, -2, -1)))


def _stands_still(frames: np.ndarray, threshold: float) -> bool:
    some = frames[np.linspace(0, len(frames) - 1, SAMPLED).round().astype(int)]
    first, second = np.triu_indices(SAMPLED, 1)
    return bool(distance(some[first], some[second]).mean() < threshold)
