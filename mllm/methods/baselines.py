"""The baselines every method has to be compared with: tokens at random, and tokens at equal distances."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune


@dataclasses.dataclass(frozen=True)
class RandomPrune(InputPrune):
    """Keep visual tokens at random.

    Args:
        seed: of the draw; every image of a batch draws its own.

    >>> import torch
    >>> image = Image(torch.zeros(9, 4), torch.zeros(2, 4))
    >>> len(RandomPrune(keep=3).select(image, 3))
    3
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    def select(self, image: Image, keep: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + image.number)
        chosen = torch.randperm(len(image.features), generator=generator)[:keep]
        return chosen.sort().values.to(image.features.device)


@dataclasses.dataclass(frozen=True)
class UniformPrune(InputPrune):
    """Keep visual tokens at equal distances in raster order.

    >>> import torch
    >>> image = Image(torch.zeros(9, 4), torch.zeros(2, 4))
    >>> UniformPrune(keep=3).select(image, 3).tolist()
    [1, 4, 7]
    """

    name: ClassVar[str] = "uniform"

    def select(self, image: Image, keep: int) -> torch.Tensor:
        tokens = len(image.features)
        return ((torch.arange(keep, device=image.features.device) + 0.5) * tokens / keep).long()
