"""GIFT: what the gaze turns to while the question is read, is looked at more while it is answered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import check_layers
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.steering import RowEdit, Rows, by_column, question

Words = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class GIFT(RowEdit):
    """Multiply the attention to visual tokens by a map of where it rises from one word of the question to the next.

    The map comes from the prompt: rises of attention in the saliency layers, over the half of the heads in which they
    are largest, scaled to factors from 1 to `exp(alpha)`. Where the next token is made, the half of the heads that look
    most at the image get their image weights multiplied by it, and the half that look most at the question get their
    question weights multiplied by what all image weights of the former grew by; then rows sum to 1 again.

    Where a saliency layer is not below all the others, the text model reads the prompt up to that layer once more,
    beforehand, without what a method that drops tokens inside the text model would drop.

    Args:
        alpha: at least 0; 0 changes nothing.
        saliency: layers of the text model, from 0; None for layer 11 of 32, or so of another depth.
        layers: where attention is changed; None for 12 to 22 of 32.
        question: long ids `[batch, length]` of the prompt -> bool, its words without those of the chat template; None
            for all words after the last image.
        content: the same for words that carry meaning, the rows that count; the paper takes nouns, verbs, adjectives,
            adverbs and numbers from a tagger. None for all of the question.

    Published: `alpha=5, saliency=(11,), layers=range(12, 23)` for LLaVA-1.5-7B; `alpha=5, saliency=(10,),
    layers=range(14, 21)` for LLaVA-1.5-13B; `alpha=4, saliency=(14,), layers=range(5, 19)` for Qwen2-VL-7B.

    Raises:
        ValueError: an alpha that is negative or no number; a layer that is not there.

    >>> GIFT(alpha=4, saliency=(14,), layers=range(5, 19)).where(28)[-1]
    18

    Paper: Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation (2026).
    """

    alpha: float = 5.0
    saliency: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    question: Words | None = None
    content: Words | None = None
    name: ClassVar[str] = "gift"

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(0, math.inf))
        for field in ("saliency", "layers"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(getattr(self, field)))

    def check(self, model: Any, family: Any) -> None:
        self.where(len(model.get_decoder().layers))

    def _layers(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Saliency layers, and those where attention is changed."""
        saliency = (round(11 / 32 * count),) if self.saliency is None else self.saliency
        first, last = round(12 / 32 * count), round(22 / 32 * count)
        layers = range(first, min(last + 1, count)) if self.layers is None else self.layers
        return check_layers("GIFT", saliency, count), check_layers("GIFT", tuple(layers), count)

    def where(self, layers: int) -> tuple[int, ...]:
        return self._layers(layers)[1] if self.ahead(layers) else tuple(sorted(sum(self._layers(layers), ())))

    def whole(self, layer: int, layers: int) -> bool:
        return not self.ahead(layers) and layer in self._layers(layers)[0]

    def acts(self, layer: int, layers: int, notes: dict[str, Any]) -> bool:
        return layer in self._layers(layers)[1]

    def ahead(self, layers: int) -> tuple[int, ...]:
        saliency, edited = self._layers(layers)
        return saliency if max(saliency) >= min(edited) else ()

    def foresee(self, rows: Rows, w: torch.Tensor) -> None:
        """Add the rises of attention in a layer to the map."""
        notes, prompt = rows.notes, rows.prompt
        if "question" not in notes:
            asked, ids = question(prompt), prompt.ids
            notes["question"] = asked if self.question is None else asked & self.question(ids).to(asked)
            asked = notes["question"]
            notes["rows"] = asked if self.content is None else asked & self.content(ids).to(asked)
        tokens = prompt.tokens[rows.layer]
        count, image = w.shape[2], rows.image[:, :, None]
        w = rows.of_prompt(w).unflatten(1, (rows.heads, count))
        counted = notes["rows"].gather(1, tokens.column[:, -count:]) & tokens.valid[:, -count:]
        rises = (w[:, :, 1:] - w[:, :, :-1]).relu() * image * counted[:, None, 1:, None]
        rises = rises.sum(2)  # [batch, heads, keys]
        half = _most(rises.sum(-1))[..., None]
        shape = half.sum(1) * counted.sum(1, keepdim=True).clamp(min=1)
        mean = (rises * half).sum(1) / shape
        maps = notes.setdefault("maps", [])
        maps.append(by_column(mean, tokens, prompt.length))
        there = by_column(tokens.visual, tokens, prompt.length)
        more = _gain(sum(maps) / len(maps), there, self.alpha) - 1
        image, words = prompt.asked.float(), notes["question"].float()
        notes["looks"] = torch.stack([image, words, more], 1)
        notes["changes"] = torch.stack([more, words, torch.zeros_like(more)], 1)
        notes["least"] = more.new_tensor([1e-30, 0, 0])[None, None]

    def weights(self, rows: Rows, w: torch.Tensor) -> torch.Tensor:
        if not self.acts(rows.layer, rows.layers, rows.notes):
            self.foresee(rows, w)
            return w
        notes, part = rows.notes, rows.of_prompt(w)
        sums = torch.baddbmm(notes["least"], part, rows.at_prompt(notes["looks"], flip=True))
        sums = sums.view(len(w), rows.heads, -1, 3)  # of the image, the question, and what the image gains
        half = max(1, rows.heads // 2)
        gains = (sums >= sums.topk(half, dim=1).values.narrow(1, half - 1, 1)).float()  # 1 in the half that looks most
        mass = (sums * gains.narrow(-1, 0, 1)).sum(1, keepdim=True)
        gains.narrow(-1, 1, 1).mul_(mass.narrow(-1, 2, 1) / mass.narrow(-1, 0, 1))  # by as much as image weights grew
        part.addcmul_(part, torch.bmm(gains.view(len(part), -1, 3), rows.at_prompt(notes["changes"])))
        return w.div_(w.sum(-1, keepdim=True))


def _most(mass: torch.Tensor) -> torch.Tensor:
    """Bool `[batch, heads, ...]`: the half of the heads with the largest values, at least one."""
    half = max(1, mass.shape[1] // 2)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, mass.topk(half, dim=1).indices, True)


def _gain(m: torch.Tensor, there: torch.Tensor, alpha: float) -> torch.Tensor:
    """Factors from 1 to `exp(alpha)` of a map `[batch, length]` where `there`; 1 elsewhere, and if it is constant."""
    count = there.sum(1, keepdim=True)
    mean = (m * there).sum(1, keepdim=True) / count.clamp(min=1)
    std = (((m - mean) * there).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    m = m.clamp(mean - 3 * std, mean + 3 * std)
    low = m.masked_fill(~there, torch.inf).amin(1, keepdim=True)
    high = m.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    share = (m - low) / (high - low)
    return torch.where(there & (high > low), (alpha * share).exp(), 1.0)
