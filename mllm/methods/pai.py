"""PAI: more attention to the image, and less of what the words alone would say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import check_layers
from vision_attn.mllm.contrast import WordContrast
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.steering import RowEdit, Rows


@dataclasses.dataclass(frozen=True)
class PAI(RowEdit, WordContrast):
    """Add `alpha |s|` to the scores `s` of visual tokens where the next token is made, and make that token by
    `gamma (c - u) + u`, of log-probabilities with the image, `c`, and of the words alone, `u`.

    The branch without the image takes its own pass of the text model for every token, and its attention is not edited.

    Args:
        alpha: at least 0; 0 leaves attention as it is.
        gamma: at least 1; 1 makes no second branch.
        layers: of the text model, from 0; None for all but the first two, as published.
        beta: with a second branch, words less probable than this share of the best one are never said, 0 to 1.

    Raises:
        ValueError: a number outside of its range; a layer that is not there.

    >>> PAI(alpha=0.5, gamma=1)
    PAI(alpha=0.5, gamma=1, layers=None, beta=0.1)

    Paper: Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs (ECCV 2024).
    """

    alpha: float = 0.2
    gamma: float = 1.1
    layers: tuple[int, ...] | None = None
    beta: float = 0.1
    name: ClassVar[str] = "pai"

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(0, math.inf), gamma=(1, math.inf), beta=(0, 1))

    def check(self, model: Any, family: Any) -> None:
        self.where(len(model.get_decoder().layers))

    def where(self, layers: int) -> tuple[int, ...]:
        return tuple(range(2, layers)) if self.layers is None else check_layers("PAI", self.layers, layers)

    def scores(self, rows: Rows, s: torch.Tensor) -> torch.Tensor:
        if "alpha" not in rows.notes:
            rows.notes["alpha"] = self.alpha * rows.prompt.asked[:, None].float()
        part = rows.of_prompt(s)
        part.addcmul_(part.abs(), rows.at_prompt(rows.notes["alpha"]))
        return s

    @property
    def least(self) -> float:
        return self.beta
