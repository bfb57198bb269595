"""Pictures of the shapes world as tensors: what the built-in models are trained and measured on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from vision_attn.shapes import render
from vision_attn.shapes.scene import Scene
from vision_attn.shapes.stills import label_of, sample_still

SIDE = 48  # pixels along an axis of the pictures that the built-in models read
_SIDES = (28, 36, 48, 48, 48, 72, 96)  # they are drawn at one of these


def draw(scenes: Sequence[Scene], rng: np.random.Generator | None = None) -> torch.Tensor:
    """Pictures `[n, 3, 48, 48]` in -1..1.

    With `rng` all of them are drawn at a size between 28 and 96 pixels and then resized, and get some noise: edges are
    soft, sharp or grainy, as in pictures that come from elsewhere.

    >>> draw([sample_still(np.random.default_rng(0))]).shape
    torch.Size([1, 3, 48, 48])
    """
    side = int(rng.choice(_SIDES)) if rng else SIDE
    pictures = np.concatenate([render(Scene(scene.things, side, side, 1)) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    if side != SIDE:
        images = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)
    if rng:
        noise = rng.uniform(0, 0.06) * rng.standard_normal(images.shape, dtype=np.float32)
        images = (images + torch.from_numpy(noise)).clamp(0, 1)
    return images * 2 - 1


def classified(rng: np.random.Generator, count: int, vary: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of random scenes and their classes, `[count]`; with `vary` as `draw` does with a generator.

    >>> images, labels = classified(np.random.default_rng(0), 2)
    >>> images.shape, labels.shape
    (torch.Size([2, 3, 48, 48]), torch.Size([2]))
    """
    scenes = [sample_still(rng) for _ in range(count)]
    return draw(scenes, rng if vary else None), torch.tensor([label_of(scene) for scene in scenes])
