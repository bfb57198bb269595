"""DoLa: what the model knew only in its last layers is worth more than what early layers said already."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.contrast import Contrast, Step, cut
from vision_attn.mllm.method import check_numbers


@dataclasses.dataclass(frozen=True)
class DoLa(Contrast):
    """Decoding by contrasting layers: `log p - log p'`, where `p'` is what the model would say after an early layer.

    Of the candidates the one whose distribution is farthest from the last, by Jensen-Shannon divergence, in every row
    for itself; the published code takes one layer for a whole batch, which is the same for a batch of one. Early states
    go through the norm and the output layer of the model. Works on prompts with and without images.

    Args:
        layers: candidates. `n` is what enters layer `n`; 0, the embeddings. "low" is every other one of the first half
            (0, 2, .. 14 of 32; from 2 where embeddings and output are tied, and at most up to 18), "high" of the second
            half (at most the last 20).
        beta: words less probable than this share of the best one are never said, 0 to 1.

    >>> DoLa(layers=(2, 4)).beta
    0.1

    Paper: DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models.
    """

    layers: str | tuple[int, ...] = "low"
    beta: float = 0.1
    name: ClassVar[str] = "dola"
    text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, beta=(0, 1))
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers not in ("low", "high") and (isinstance(self.layers, str) or not self.layers):
            raise ValueError(f"DoLa(layers={self.layers!r}): 'low', 'high', or the numbers of layers")

    def check(self, model: Any, family: Any) -> None:
        self.early(len(model.get_decoder().layers), model)

    def early(self, layers: int, model: Any) -> tuple[int, ...]:
        if self.layers == "low":
            start = 0
            if model.config.get_text_config().tie_word_embeddings:  # tokens would only say themselves
                start = min(2, layers - 1)
            return tuple(range(start, min(layers // 2, 20), 2)) or (start,)
        if self.layers == "high":
            return tuple(range(max(layers // 2, layers - 20), layers, 2))
        bad = [n for n in self.layers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < layers]
        if bad:
            raise ValueError(f"DoLa: layer {bad[0]!r}; the text model has layers 0 to {layers - 1}")
        return self.layers

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        last = z.log_softmax(-1)
        candidates = torch.stack([logits.to(z.device).log_softmax(-1) for logits in step.early.values()])
        farthest = divergence(last, candidates).argmax(0)  # [rows]
        other = candidates[farthest, torch.arange(len(z), device=z.device)]
        return cut(last - other, last, self.beta)


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of log-probabilities that broadcast, over the last dimension.

    >>> round(divergence(torch.tensor([0.0, -100.0]), torch.tensor([-100.0, 0.0])).item(), 4)  # log 2
    0.6931
    """
    middle = torch.logaddexp(a, b) - torch.tensor(2.0).log()
    return ((a.exp() * (a - middle)).sum(-1) + (b.exp() * (b - middle)).sum(-1)) / 2
