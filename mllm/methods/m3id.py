"""M3ID: the longer the answer, the more a word has to owe to the image."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from vision_attn.mllm.contrast import Contrast, Step, cut
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.reading import Reading


@dataclasses.dataclass(frozen=True)
class M3ID(Contrast):
    """`c + (1 - g) / g (c - u)` with `g = exp(-decay t)`: log-probabilities with the image, `c`, and without, `u`.

    `t` is 1 for the first generated token. The weight grows without bound with `t`, so the cut stays on: the paper's
    own gate, on the largest log-probability, has a threshold that is not published, and this is what others build. The
    branch without image takes its own pass of the text model for every token.

    Args:
        decay: lambda in the paper, at least 0; 0 is the plain model, cut.
        beta: words less probable than this share of the best one are never said, 0 to 1.

    >>> M3ID().decay
    0.02

    Paper: Multi-Modal Hallucination Control by Visual Information Grounding.
    """

    decay: float = 0.02
    beta: float = 0.1
    name: ClassVar[str] = "m3id"

    def __post_init__(self) -> None:
        check_numbers(self, beta=(0, 1), decay=(0, math.inf))

    def other(self, reading: Reading) -> Reading:
        return reading.without_images()

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        with_image, without = z.log_softmax(-1), step.other.log_softmax(-1)
        weight = math.expm1(self.decay * step.number)  # (1 - g) / g
        return cut(with_image + weight * (with_image - without), with_image, self.beta)
