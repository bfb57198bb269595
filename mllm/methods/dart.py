"""DART: keep visual tokens that resemble neither a few pivots nor, through them, each other."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune, check_keep, keep_count, ranked, top
from vision_attn.mllm.ranking import words


@dataclasses.dataclass(frozen=True)
class DART(LayerPrune):
    """Drop at one layer the visual tokens that are like others, whatever they are attended to.

    Pivots are the visual tokens and the words with the largest keys (Euclidean, all heads together). The visual pivots
    stay, and each pivot in turn keeps an equal share of what is left of the budget: the visual tokens least similar to
    it, by the cosine of the states that enter the layer. The authors' code was not at hand: the size of a key, the
    states compared and the order are choices made here. All visual tokens of a row are taken together.

    Args:
        keep: visual tokens of a row that stay: a share above 0 and up to 1 (float), or a count (int).
        layer: the first layer without the others, at least 1.
        pivots: visual pivots, and as many words.

    Raises:
        ValueError: values out of range.

    Paper: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More.
    """

    keep: float | int = 0.25
    layer: int = 2
    pivots: int = 4
    name: ClassVar[str] = "dart"

    def __post_init__(self) -> None:
        check_keep("DART", self.keep)
        if self.pivots < 1:
            raise ValueError(f"DART(pivots={self.pivots}): at least 1")

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        tokens = layer.tokens
        keep, size = torch.zeros_like(tokens.visual), layer.keys().float().square().sum((1, 3))
        states = torch.nn.functional.normalize(layer.hidden.float(), dim=-1)
        for row, text in enumerate(words(tokens)):
            visual = tokens.visual[row]
            count = int(visual.sum())
            if not count:
                continue
            budget = keep_count("DART", self.keep, count)
            first = _largest(size[row], visual, min(self.pivots, budget))
            pivots = torch.cat([first, _largest(size[row], text, self.pivots)])
            keep[row, first] = True
            rest, n = budget - len(first), len(pivots)
            for i, pivot in enumerate(pivots):
                likeness = states[row] @ states[row, pivot]
                share = rest * (i + 1) // n - rest * i // n
                keep[row] |= top(-likeness[None], (visual & ~keep[row])[None], [share])[0]
        return keep


def _largest(scores: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores where `among` is True, from the largest."""
    places = among.nonzero()[:, 0]
    return places[ranked(scores[places])[:count]]
