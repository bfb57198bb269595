"""PAINT: more attention to the patches that the first layer of the vision tower looks at, less to its outliers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import check_layers
from vision_attn.mllm.contrast import WordContrast
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.steering import RowEdit, Rows
from vision_attn.mllm.tokens import runs
from vision_attn.mllm.towers import TowerWatch, attention_modules, has_class_token


@dataclasses.dataclass(frozen=True)
class PAINT(RowEdit, WordContrast):
    """Add `alpha |s|` to the scores `s` of some visual tokens where the next token is made, and `beta |s|` to those of
    others; then the words alone count against a word, as in PAI.

    Of every image, by what the class token of the vision tower looks at: the others are outliers in the layer before
    the last, above the third quartile by 1.5 times the range between the quartiles; the first are the top `ratio` of
    layer 0, less the others. A token made of several patches has their mean. This is what the authors' code does: all
    heads alike, where the paper speaks of single heads, and without its "spatial" tokens, whose score there is the same
    for all and whose share is 0.

    Args:
        alpha: at least 0; published runs use 0.9 for captions and 0.5 for yes-or-no questions.
        beta: at least 0, as published: outliers gain less than the others, and lose by that.
        ratio: share of the tokens of an image, from 0 to 1.
        gamma: at least 1; 1 makes no second branch.
        layers: of the text model, from 0; None for all but the first two, as published.

    Raises:
        ValueError: a number outside of its range; a layer that is not there; a vision tower without a class token.

    >>> PAINT(alpha=0.9).beta
    0.3

    Paper: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model.
    """

    alpha: float = 0.7
    beta: float = 0.3
    ratio: float = 0.25
    gamma: float = 1.1
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "paint"

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(0, math.inf), beta=(0, math.inf), ratio=(0, 1), gamma=(1, math.inf))

    def check(self, model: Any, family: Any) -> None:
        self.where(len(model.get_decoder().layers))
        if not family.prune or not has_class_token(model.base_model, family):
            raise ValueError(
                f"PAINT chooses visual tokens by what the class token looks at, and {family.name} has "
                f"{'none in its vision tower' if family.prune else 'tokens that show no patches'}; PAI takes all alike"
            )

    def where(self, layers: int) -> tuple[int, ...]:
        return tuple(range(2, layers)) if self.layers is None else check_layers("PAINT", self.layers, layers)

    def install(self, engine: Any, undo: list[Callable[[], None]]) -> None:
        count = len(attention_modules(getattr(engine.base, engine.family.tower)))
        watch = TowerWatch(engine.base, engine.family, (0, max(count - 2, 0)))
        watch.install(undo)
        engine.before(engine.model.get_decoder().layers[0], functools.partial(self._read, engine, watch))

    def _read(self, engine: Any, watch: TowerWatch, *_: Any) -> None:
        """Before the text model reads a prompt with images: which columns gain, and by how much."""
        prompt = engine.current
        if prompt is None or not engine.reading or engine.branching or not any(prompt.visual):
            return
        spans = [(row, *span) for row in range(len(prompt.asked)) for span in runs(prompt.asked[row])]
        found = watch.of([(row, "image", stop - start) for row, start, stop in spans])
        gain = torch.zeros(prompt.asked.shape, device=prompt.asked.device)
        for (row, start, _), parts in zip(spans, found, strict=True):
            for part in parts:
                own = part["attention"]
                gain[row, start : start + len(own)] = self.gains(own[:, 0], own[:, -1]).to(gain)
                start += len(own)
        prompt.notes[id(self)] = {"gain": gain[:, None]}

    def gains(self, first: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """`alpha`, `beta` or 0 for each token of an image, by what the class token gives to it in both layers.

        Tokens that show no patch have NaN, and get 0.

        >>> PAINT(ratio=0.5).gains(torch.tensor([4.0, 3, 2, 1]), torch.tensor([99.0, 1, 2, 1])).tolist()
        [0.30000001192092896, 0.699999988079071, 0.0, 0.0]
        """
        patch = ~first.isnan()
        low, high = late[patch].quantile(torch.tensor([0.25, 0.75]).to(late))
        outlier = patch & (late > high + 1.5 * (high - low))
        count = int(self.ratio * int(patch.sum()))
        chosen = first.masked_fill(~patch, -torch.inf).argsort(descending=True, stable=True)[:count]
        gain = torch.zeros_like(first).index_fill(0, chosen, self.alpha)
        return gain.masked_fill(outlier, self.beta)

    def scores(self, rows: Rows, s: torch.Tensor) -> torch.Tensor:
        part = rows.of_prompt(s)
        part.addcmul_(part.abs(), rows.at_prompt(rows.notes["gain"]))
        return s
