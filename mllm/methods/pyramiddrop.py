"""PyramidDrop: fewer visual tokens at each of a few stages of the text model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune, keep_count, top
from vision_attn.mllm.ranking import check_apart, check_stages, counts_of


@dataclasses.dataclass(frozen=True)
class PyramidDrop(LayerPrune):
    """Drop visual tokens in stages, each time those that the last prompt token attends to least, mean over heads.

    Attention is that of the layer where a stage begins, from what enters it. All visual tokens of a row are ranked
    together. The released code numbers positions anew at every stage; here tokens keep theirs.

    Args:
        keep: what stays from each stage on, of the tokens that entered the text model: shares above 0 and up to 1
            (float) or counts (int), none above the one before.
        layers: where the stages begin, at least 1 and ascending; None spreads them evenly, which for three stages is
            the published 8, 16 and 24 of 32.

    Raises:
        ValueError: values out of range, or more stages than the model has room for.

    >>> PyramidDrop().cuts(32)
    (8, 16, 24)

    Paper: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction.
    """

    keep: tuple[float | int, ...] = (0.5, 0.25, 0.125)
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "pyramid-drop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        check_stages("PyramidDrop", self.keep, self.layers)

    def cuts(self, layers: int) -> tuple[int, ...]:
        stages = len(self.keep)
        even = tuple(layers * (i + 1) // (stages + 1) for i in range(stages))
        return check_apart("PyramidDrop", even if self.layers is None else self.layers, layers)

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        entered = notes.setdefault("entered", counts_of(layer.tokens))
        stage = notes["stage"] = notes.get("stage", -1) + 1
        counts = [keep_count("PyramidDrop", self.keep[stage], n) if n else 0 for n in entered]
        return top(layer.attention(layer.last())[:, :, 0].mean(1), layer.tokens.visual, counts)
