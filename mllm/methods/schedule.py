"""TokenSchedule: how many visual tokens each layer of the text model gets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune, top
from vision_attn.mllm.ranking import counts_of, mean_attention, words

CUTS = 8  # each cut gathers all hidden states once


@dataclasses.dataclass(frozen=True)
class TokenSchedule(LayerPrune):
    """Drop visual tokens layer by layer: those that the last words attend to least in the layer before.

    Scores are means over heads. All visual tokens of a row are ranked together, and what is dropped stays dropped.
    `search_schedule` finds a schedule for a model.

    Args:
        keep: share of the visual tokens that each layer works on, one number per layer: 1 in the first, never growing,
            0 where the picture is done with.
        rows: words at the end of the prompt whose attention counts.

    Raises:
        ValueError: no such schedule, or none for a model with so many layers.

    >>> TokenSchedule([1, 1, 0.5, 0.5, 0.25, 0]).cuts(6)
    (2, 4, 5)

    Paper: Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction. Its code was not
    at hand; the rows that score are a choice made here.
    """

    keep: tuple[float, ...] = ()
    rows: int = 16
    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(float(share) for share in self.keep))
        falls = all(a >= b for a, b in zip((1.0, *self.keep), (*self.keep, 0.0), strict=True))
        if len(self.keep) < 2 or self.keep[0] != 1 or not falls:  # NaN falls nowhere
            raise ValueError(
                f"TokenSchedule(keep={self.keep}): give a share for every layer, 1 for the first and none above "
                "the one before, such as [1, 1, 0.5, 0.25]; or use TokenSchedule.sigmoid(a, b, layers=...)"
            )
        if self.rows < 1:
            raise ValueError(f"TokenSchedule(rows={self.rows}): at least 1")

    @classmethod
    def sigmoid(
        cls, a: float, b: float, layers: int, least: float = 0.0, cuts: int = CUTS, first: int = 1
    ) -> TokenSchedule:
        """The P-Sigmoid schedule `sigmoid(-a (l / layers - b)) / sigmoid(a b)` for layer `l`, in a few cuts.

        Args:
            a: how suddenly tokens go, above 0.
            b: where, as a share of the depth.
            layers: of the text model.
            least: share that always stays.
            cuts: see `grouped`.
            first: no cut before this layer.

        >>> [round(share, 2) for share in TokenSchedule.sigmoid(10, 0.5, layers=8).keep]
        [1.0, 0.98, 0.93, 0.78, 0.5, 0.22, 0.08, 0.02]
        """
        return cls(sigmoid_shares(a, b, layers, least, first)).grouped(cuts)

    def grouped(self, cuts: int = CUTS) -> TokenSchedule:
        """The schedule with at most so many cuts in which no layer gets fewer tokens, and all get as few as possible.

        >>> TokenSchedule([1, 0.8, 0.4, 0.3, 0.1]).grouped(2).keep
        (1.0, 1.0, 0.4, 0.4, 0.1)
        """
        if cuts < 1:
            raise ValueError(f"at least one cut; got {cuts}")
        count = len(self.keep)
        # best[n]: least sum of shares over the first n layers in so many runs, and where these runs begin
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for _ in range(cuts + 1):
            longer = dict(best)
            for start, (cost, begins) in best.items():
                for stop in range(start + 1, count + 1):
                    total = cost + self.keep[start] * (stop - start)
                    if stop not in longer or total < longer[stop][0] - 1e-12:
                        longer[stop] = total, (*begins, start)
            best = longer
        begins = best[count][1]
        ends = (*begins[1:], count)
        shares = [self.keep[a] for a, b in zip(begins, ends, strict=True) for _ in range(a, b)]
        return dataclasses.replace(self, keep=tuple(shares))

    def counts(self, tokens: int) -> list[int]:
        """How many of `tokens` each layer works on."""
        return [round(share * tokens) for share in self.keep]

    def cuts(self, layers: int) -> tuple[int, ...]:
        if len(self.keep) != layers:
            raise ValueError(f"TokenSchedule has shares for {len(self.keep)} layers, and the text model has {layers}")
        found = tuple(n for n in range(1, layers) if self.keep[n] < self.keep[n - 1])
        if not found:
            raise ValueError("TokenSchedule keeps all tokens in all layers, and so drops nothing; attach no schedule")
        return found

    def watches(self, layers: int) -> tuple[int, ...]:
        return tuple(n - 1 for n in self.cuts(layers))

    def observe(self, layer: Layer, notes: dict[str, Any]) -> None:
        notes["scores"] = mean_attention(layer, words(layer.tokens), self.rows).mean(1)

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        entered = notes.setdefault("entered", counts_of(layer.tokens))
        counts = [round(self.keep[layer.number] * n) for n in entered]
        return top(notes["scores"], layer.tokens.visual, counts)


def sigmoid_shares(a: float, b: float, layers: int, least: float = 0.0, first: int = 1) -> list[float]:
    """The sigmoid of `TokenSchedule.sigmoid` before any grouping."""
    if not (math.isfinite(a) and a > 0 and math.isfinite(b) and 0 <= least <= 1):
        raise ValueError(f"a sigmoid of a={a}, b={b}, least={least}: a above 0, least from 0 to 1")
    whole = _sigmoid(a * b)
    return [max(least, _sigmoid(-a * (n / layers - b)) / whole) if n >= first else 1.0 for n in range(layers)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
