"""AGLA: what the model says of the parts of the image that the question is about counts for a word."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch

from vision_attn.mllm.contrast import Contrast, Step, cut
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.reading import Reading

Matcher = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class AGLA(Contrast):
    """Assembly of global and local attention: `z + alpha z'`, where `z'` are the logits for a masked image.

    What to mask is for a matcher of image and question to say, in the paper the gradients of BLIP's matching head; this
    package has none. `masked_image` makes the masked image of a map as the paper does. A second pass of the vision
    tower, and of the text model for every token.

    Args:
        matcher: `(pixels) -> pixels of the same shape`, of all images of the batch, as the processor made them.
        alpha: weight, at least 0; 0 is the plain model, cut.
        beta: words less probable than this share of the best one are never said, 0 to 1.

    >>> import torch
    >>> from vision_attn.mllm.methods.agla import masked_image
    >>> relevance = torch.zeros(1, 4, 4)
    >>> relevance[:, :2] = 1  # the upper half
    >>> method = AGLA(matcher=lambda pixels: masked_image(pixels, relevance, score=torch.ones(1)))
    >>> method.matcher(torch.ones(1, 3, 4, 4))[0, 0].tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

    Paper: AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
    Attention.
    """

    matcher: Matcher
    alpha: float = 2.0
    beta: float = 0.5
    name: ClassVar[str] = "agla"

    def __post_init__(self) -> None:
        if not callable(self.matcher):
            raise TypeError(f"AGLA(matcher={self.matcher!r}): give a function that masks pixels")
        check_numbers(self, beta=(0, 1), alpha=(0, math.inf))

    def other(self, reading: Reading) -> Reading:
        def masked(pixels: torch.Tensor) -> torch.Tensor:
            found = self.matcher(pixels)
            if not torch.is_tensor(found) or found.shape != pixels.shape:
                got = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
                raise ValueError(f"AGLA: the matcher made {got} of pixels {tuple(pixels.shape)}; the shape must stay")
            return found.to(pixels)

        return reading.with_pixels(masked)

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        return cut(z + self.alpha * step.other, z, self.beta)


def masked_image(pixels: torch.Tensor, relevance: torch.Tensor, score: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Only the most relevant pixels of each image: a share of `1 - score / 2` of them, the rest is `fill`.

    Args:
        pixels: `[images, channels, height, width]`.
        relevance: `[images, height, width]`, of each pixel for the question.
        score: `[images]`, probability that image and question match, 0 to 1; the better, the less is kept.
        fill: in the processor's units; 0 is its mean colour.

    Raises:
        ValueError: shapes that do not fit, a score outside of 0 to 1.
    """
    if pixels.ndim != 4 or relevance.shape != (len(pixels), *pixels.shape[2:]) or score.shape != (len(pixels),):
        raise ValueError(
            f"pixels {tuple(pixels.shape)}, relevance {tuple(relevance.shape)}, score {tuple(score.shape)}; give "
            "[images, channels, height, width], [images, height, width] and [images]"
        )
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError(f"scores are probabilities, 0 to 1; got {score.tolist()}")
    dropped = zip(relevance.float().flatten(1), score.float() / 2, strict=True)
    least = torch.stack([values.quantile(share) for values, share in dropped])
    return torch.where((relevance >= least[:, None, None])[:, None], pixels, fill)
