"""VCD: what the model would also say of a noisy image counts against a word."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from vision_attn.mllm.contrast import Contrast, Step, contrast
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.reading import Reading

STEPS = 1000


@dataclasses.dataclass(frozen=True)
class VCD(Contrast):
    """Visual contrastive decoding: `(1 + alpha) z - alpha z'`, where `z'` are the logits for the image in noise.

    The noise is that of a diffusion process, on the pixels as the processor normalised them. A second pass of the
    vision tower, and of the text model for every token.

    Args:
        alpha: weight, at least 0; 0 is the plain model, cut. The paper's scripts use 1.
        steps: of 1000 of the diffusion, 0 to 999; 500 in the paper's scripts.
        beta: words less probable than this share of the best one are never said, 0 to 1.
        seed: of the noise; every image of a batch draws its own.

    >>> VCD(alpha=0.5).steps
    500

    Paper: Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding.
    """

    alpha: float = 1.0
    steps: int = 500
    beta: float = 0.1
    seed: int = 0
    name: ClassVar[str] = "vcd"

    def __post_init__(self) -> None:
        check_numbers(self, beta=(0, 1), alpha=(0, math.inf))
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 0 <= self.steps < STEPS:
            raise ValueError(f"VCD(steps={self.steps!r}): the diffusion has {STEPS} steps, 0 to {STEPS - 1}")

    def other(self, reading: Reading) -> Reading:
        generator = torch.Generator().manual_seed(self.seed)
        return reading.with_pixels(lambda pixels: noisy(pixels, self.steps, generator))

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        return contrast(z, step.other, self.alpha, self.beta)


def noisy(pixels: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Pixels of any shape after some steps of diffusion, `sqrt(a) x + sqrt(1 - a) noise`.

    Tiles that fill up a batch `[batch, tiles, 3, height, width]`, all zero, stay as they are.
    """
    rates = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.005 - 1e-5) + 1e-5
    left = float((1 - rates)[: steps + 1].prod())
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    changed = left**0.5 * pixels + (1 - left) ** 0.5 * noise
    if pixels.ndim != 5:
        return changed
    return torch.where(pixels.flatten(2).any(-1)[..., None, None, None], changed, pixels)
