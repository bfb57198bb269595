"""SparseVLM: a few words of the question rate the visual tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune, top
from vision_attn.mllm.ranking import check_apart, check_stages, counts_of, mean_attention, words_after

# version -> tokens of 576 on average over the layers -> tokens from each of the three stages on.
COUNTS = {
    "1.0": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
PUBLISHED, TOKENS = (2, 6, 15), 576  # stages in a model of 32 layers, tokens of an image there


@dataclasses.dataclass(frozen=True)
class SparseVLM(LayerPrune):
    """Drop visual tokens in three stages, by the attention of the words that the picture is about.

    A word rates if its embedding resembles those of the picture more than the mean word does: softmax over the words
    after the picture of its product with each visual token, mean over visual tokens. The score of a visual token is the
    attention of the raters in the layer where a stage begins, from what enters it, mean over the raters and over the
    heads that give most to the picture. This is version 2.0, which does not recycle what it drops and keeps positions;
    the released code lets the layer of a stage run and drops after it. All visual tokens of a row are ranked together.

    Args:
        keep: the published budget, 192, 128, 96 or 64 tokens of 576 on average, scaled where a row has other than 576;
            or what stays from each stage on, of the tokens that entered the text model, as shares or counts.
        layers: where the stages begin, at least 1 and ascending; None scales the published 2, 6 and 15 of 32.
        heads: how many heads count; None scales the published 14 of 32.
        table: the counts of version "2.0" or "1.0".

    Raises:
        ValueError: values out of range, no such budget, or a model without room for the stages.

    >>> SparseVLM(keep=64).counts([576, 2880])
    [(66, 330), (34, 170), (20, 100)]

    Paper: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference.
    """

    keep: int | tuple[float | int, ...] = 192
    layers: tuple[int, ...] | None = None
    heads: int | None = None
    table: str = "2.0"
    name: ClassVar[str] = "sparsevlm"

    def __post_init__(self) -> None:
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        if self.table not in COUNTS:
            raise ValueError(f"SparseVLM(table={self.table!r}): allowed are {', '.join(map(repr, COUNTS))}")
        if not isinstance(self.keep, tuple) and self.keep not in COUNTS[self.table]:
            raise ValueError(
                f"SparseVLM(keep={self.keep!r}): published budgets are {', '.join(map(str, COUNTS[self.table]))}; give "
                "what stays from each stage on for another, such as (0.5, 0.3, 0.2)"
            )
        check_stages("SparseVLM", self._stages, self.layers)
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"SparseVLM(heads={self.heads}): at least 1")

    @property
    def _stages(self) -> tuple[float | int, ...]:
        return self.keep if isinstance(self.keep, tuple) else COUNTS[self.table][self.keep]

    def counts(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Tokens of each row from each stage on, where rows have `tokens`; counts above that keep all."""
        scaled = isinstance(self.keep, int) or isinstance(self.keep[0], float)
        whole = TOKENS if isinstance(self.keep, int) else 1
        return [
            tuple(min(n, max(1, round(keep * n / whole)) if scaled else keep) if n else 0 for n in tokens)
            for keep in self._stages
        ]

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.layers is None and len(self._stages) != len(PUBLISHED):
            raise ValueError(f"SparseVLM(keep={self.keep}): say layers= where there are other than 3 stages")
        scaled = tuple(max(1, round(n * layers / 32)) for n in PUBLISHED)
        return check_apart("SparseVLM", scaled if self.layers is None else self.layers, layers)

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        tokens = layer.tokens
        if not notes:
            notes |= {"stage": 0, "counts": self.counts(counts_of(tokens)), "raters": self._raters(layer)}
        raters = notes["raters"].gather(1, tokens.column) & tokens.valid & ~tokens.visual
        given = mean_attention(layer, raters)
        heads = self.heads or max(1, round(given.shape[1] * 14 / 32))
        best = (given * tokens.visual[:, None]).sum(2).argsort(dim=1, descending=True, stable=True)[:, :heads]
        scores = given.gather(1, best[..., None].expand(-1, -1, given.shape[2])).mean(1)
        notes["stage"] += 1
        return top(scores, tokens.visual, list(notes["counts"][notes["stage"] - 1]))

    def _raters(self, layer: Layer) -> torch.Tensor:
        """Bool `[batch, length]` over the columns of the prompt."""
        tokens, asked = layer.tokens, words_after(layer.tokens)
        found = asked.new_zeros(len(asked), int(tokens.column.max()) + 1)
        for row, embeds in enumerate(layer.embeddings.float()):
            visual, words = embeds[tokens.visual[row]], embeds[asked[row]]
            if len(visual):
                likeness = (visual @ words.T).softmax(1).mean(0)
                rates = likeness > likeness.mean()
                found[row, tokens.column[row][asked[row]][rates if rates.any() else ~rates]] = True
        return found
