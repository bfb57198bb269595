"""Pictures and videos as users give them and as models return them, and the steps that lie between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_FORMS = {"image": "[height, width, 3]", "video": "[frames, height, width, 3]"}


def as_pixels(given: Any, kind: str) -> np.ndarray:
    """Images or videos in any accepted form as float32 from 0 to 1, `[batch, height, width, 3]` for "image" and
    `[batch, frames, height, width, 3]` for "video".

    Raises:
        TypeError: not an array, tensor or list of PIL images of that form.
        ValueError: numbers below 0 or above 1 that are not uint8.

    >>> as_pixels(np.full((4, 6, 3), 255, np.uint8), "image").shape
    (1, 4, 6, 3)
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().numpy()
    try:
        listed = isinstance(given, (list, tuple))
        array = np.stack([np.asarray(each) for each in given]) if listed else np.asarray(given)
    except (ValueError, TypeError):
        array = np.empty(0)
    axes = 1 + _FORMS[kind].count(",") + 1
    array = array[None] if array.ndim == axes - 1 else array
    if array.ndim != axes or array.shape[-1] != 3 or not array.size or array.dtype.kind not in "uif":
        raise TypeError(
            f"{'an image' if kind == 'image' else 'a video'} must be {_FORMS[kind]}, or a batch of those, as array, "
            f"tensor or PIL images in RGB; got {type(given).__name__} of shape {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    array = array.astype(np.float32)
    if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(
            f"{'an image' if kind == 'image' else 'a video'} that is not uint8 must hold numbers from 0 to 1; got "
            f"{array.min():g} to {array.max():g}"
        )
    return array.clip(0, 1)


def finite(pixels: Any, pipe: Any) -> np.ndarray:
    """What a pipeline returned as float32; raises RuntimeError for numbers that are no picture."""
    pixels = np.asarray(pixels, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise RuntimeError(f"the model produced NaN in {pipe.dtype}; use float32 or bfloat16")
    return pixels


@contextlib.contextmanager
def counting(progress: bool | Callable[[int, int], None], total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """What to call with the steps done so far: a function of (done, total), or a bar on stderr, or nothing."""
    if callable(progress):
        yield lambda now: progress(now, total)
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc="upscale", disable=not progress) as bar:
        yield lambda now: bar.update(now - bar.n)
