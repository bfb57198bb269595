"""VisPruner: one half are tokens that the class token looks at, the other is what stays when duplicates go."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune, ranked

ROWS = 512  # tokens whose likeness to the others exists at once


@dataclasses.dataclass(frozen=True)
class VisPruner(InputPrune):
    """Keep the visual tokens with the largest attention of the class token, and others that are unlike each other.

    On a tower without a class token: the attention each patch receives, mean over heads and rows. Likeness is the
    cosine of the features of the tower, before the projector.

    Args:
        keep: visual tokens of an image that stay: a share above 0 and up to 1 (float), or a count (int).
        important: share of them that goes by attention, between 0 and 1.

    Raises:
        ValueError: `important` outside of 0 to 1.

    >>> import torch
    >>> vision = torch.tensor([[1.0, 0], [0, 1], [0, 2], [1, 0.1], [-1, 0]])
    >>> attention = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.0]])
    >>> image = Image(torch.zeros(5, 2), torch.zeros(2, 2), attention=attention, vision=vision)
    >>> VisPruner().select(image, 3).tolist()
    [0, 2, 4]

    Paper: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs.
    """

    important: float = 0.5
    name: ClassVar[str] = "vispruner"
    looks: ClassVar[tuple[str, ...]] = ("attention", "vision")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"VisPruner(important={self.important}): a share from 0 to 1")

    def select(self, image: Image, keep: int) -> torch.Tensor:
        order, n = ranked(image.attention[-1]), int(keep * self.important)
        unit = torch.nn.functional.normalize(image.vision.float(), dim=-1)
        return torch.cat([order[:n], unlike(order[n:], unit, keep - n)]).sort().values


def unlike(rest: torch.Tensor, unit: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of `rest`, indices of `unit` `[tokens, channels]`; up to eight duplicates are removed at a time."""
    while len(rest) > count > 0:
        even, odd = rest[::2], rest[1::2]
        drop = min(8, len(rest) - count, len(even))
        likeness = torch.cat([(rows @ unit[odd].T).amax(1) for rows in unit[even].split(ROWS)])
        stay = likeness.argsort(stable=True)[: len(even) - drop]
        rest = torch.cat([even[stay], odd])
    return rest[:count]
