"""VTC-CLS and FasterVLM: keep the patches that the class token of the vision tower looks at."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune


@dataclasses.dataclass(frozen=True)
class FasterVLM(InputPrune):
    """Keep the visual tokens with the largest attention of the class token in the layer before the last.

    On a tower without a class token: the attention each patch receives, mean over heads and rows.

    Paper: [CLS] Attention is All You Need for Training-Free Visual Token Pruning.
    """

    name: ClassVar[str] = "fastervlm"
    tower_layers: ClassVar[tuple[int, ...]] = (-2,)

    def select(self, image: Image, keep: int) -> torch.Tensor:
        order = image.attention[-2].argsort(descending=True, stable=True)
        return order[:keep].sort().values
