"""FastV: after a few layers, keep the visual tokens that the last word looks at."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune, check_keep, keep_count, top


@dataclasses.dataclass(frozen=True)
class FastV(LayerPrune):
    """Drop visual tokens at one layer, by the attention of the last prompt token in the layer before, mean over heads.

    All visual tokens of a row are ranked together, also those of several images.

    Args:
        keep: visual tokens of a row that stay: a share above 0 and up to 1 (float), or a count (int).
        layer: the first layer without them, at least 1; 2 in the paper, 3 in the authors' demo.

    Paper: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
    Models.
    """

    keep: float | int = 0.5
    layer: int = 2
    name: ClassVar[str] = "fastv"

    def __post_init__(self) -> None:
        check_keep("FastV", self.keep)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def watches(self, layers: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def observe(self, layer: Layer, notes: dict[str, Any]) -> None:
        notes["scores"] = layer.attention(layer.last())[:, :, 0].mean(1)

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        visual = layer.tokens.visual
        counts = [keep_count("FastV", self.keep, n) if n else 0 for n in visual.sum(1).tolist()]
        return top(notes["scores"], visual, counts)
