"""VTC-CLS: keep the patches that the class token of the vision tower looks at, over several layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune, largest


@dataclasses.dataclass(frozen=True)
class VTCCLS(InputPrune):
    """Keep the visual tokens with the largest attention of the class token, summed over the later layers of the tower.

    On a tower without a class token: the attention each patch receives, mean over heads and rows.

    Args:
        keep: visual tokens of an image that stay: a share above 0 and up to 1 (float), or a count (int).
        start_layer: first layer of the tower that counts, negative from the end; the last layer never counts. None
            begins after two thirds of them, which is the published 16 of 24.

    Raises:
        ValueError: no layer is left, or none that begins there.

    >>> import torch
    >>> attention = torch.tensor([[0.1, 0.3, 0.2, 0.0], [0.1, 0.2, 0.0, 0.4]])
    >>> VTCCLS(keep=2).select(Image(torch.zeros(4, 8), torch.zeros(2, 8), attention=attention), 2).tolist()
    [1, 3]

    Paper: [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs.
    """

    start_layer: int | None = None
    name: ClassVar[str] = "vtccls"
    looks: ClassVar[tuple[str, ...]] = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_layer is not None and (
            not isinstance(self.start_layer, int) or isinstance(self.start_layer, bool)
        ):
            raise ValueError(f"{type(self).__name__}(start_layer={self.start_layer!r}): number of a layer, or None")

    def tower_layers(self, count: int, cls: bool) -> tuple[int, ...]:
        start = self.start_layer
        if start is None:
            start = min(round(2 / 3 * count), max(count - 2, 0))
        elif start < 0:
            start += count
        layers = tuple(range(start, max(count - 1, 1)))
        if start < 0 or not layers:
            raise ValueError(
                f"{type(self).__name__}(start_layer={self.start_layer}): the vision tower has {count} layers, and the "
                f"last does not count; allowed are 0 to {max(count - 2, 0)}, or from {-count} to -2"
            )
        return layers

    def select(self, image: Image, keep: int) -> torch.Tensor:
        return largest(image.attention.sum(0), keep)
