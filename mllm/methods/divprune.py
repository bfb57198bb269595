"""DivPrune: keep the tokens that are farthest from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune

ROWS = 512  # tokens whose distances to all others exist at once
FEW = 1024  # up to so many tokens, a map of all pairs is small, and faster than one row at a time


@dataclasses.dataclass(frozen=True)
class DivPrune(InputPrune):
    """Keep visual tokens so that the smallest distance `1 - cosine` between two of them is large, one after the other.

    The first is the one whose nearest neighbour is farthest; each next one is farthest from those kept so far. It looks
    at the features alone, so it serves every model.

    >>> import torch
    >>> features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0]])
    >>> DivPrune().select(Image(features, torch.zeros(2, 2)), 3).tolist()
    [0, 2, 4]

    Paper: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models.
    """

    name: ClassVar[str] = "divprune"

    def select(self, image: Image, keep: int) -> torch.Tensor:
        unit = torch.nn.functional.normalize(image.features.float(), dim=-1)
        nearest = []
        for start in range(0, len(unit), ROWS):
            distance = 1 - unit[start : start + ROWS] @ unit.T
            distance.diagonal(start).fill_(torch.inf)
            nearest.append(distance.amin(1))
        chosen = [torch.cat(nearest).argmax()]
        apart, cosines = torch.full_like(unit[:, 0], torch.inf), products(unit)
        for _ in range(keep - 1):
            apart = torch.minimum(apart, 1 - cosines(chosen[-1]))
            apart[chosen[-1]] = -torch.inf
            chosen.append(apart.argmax())
        return torch.stack(chosen).sort().values


def products(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes `rows @ rows[index]` `[n]` of an index."""
    if len(rows) > FEW:
        return lambda index: rows @ rows[index]
    pairs = rows @ rows.T
    return lambda index: pairs[index]
