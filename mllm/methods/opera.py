"""OPERA's penalty: a word that hangs on what one word before it summed up is less welcome."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from vision_attn.mllm.around import key_columns
from vision_attn.mllm.contrast import OUT_OF_REACH, Contrast, Step
from vision_attn.mllm.interface import Compute, listen, switch
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.reading import Reading
from vision_attn.mllm.rows import hide, row_scores

EARLY = 10  # response positions up to which attention to the image counts instead
MOST = 1000.0  # a penalty above it would be as good, and the product of many columns is endless


@dataclasses.dataclass(frozen=True)
class OperaPenalty(Contrast):
    """Chooses among the likeliest words by `log p - weight * penalty`, the over-trust penalty of OPERA.

    This is not OPERA in full: there, beams are also rolled back when the same word has won too often. Every candidate
    is read, and what the last layer looks at from it, head by head the most, is divided by its sum; with the rows of
    the words before it these make a triangle over the response. The penalty is the largest of its columns' products,
    diagonal included, of `scale` times the weights, times 1e-7; as long as the triangle has at most 10 rows it is
    instead minus what the candidate gives to the image. Reading goes through a second cache, in which attention is not
    edited: for every token `candidates` + 1 passes of the text model.

    Args:
        weight: of the penalty, at least 0.
        scale: of the weights, above 0.
        candidates: words that are compared, at least 1.

    >>> OperaPenalty(candidates=3).scale
    50.0

    Paper: OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
    Retrospection-Allocation.
    """

    weight: float = 1.0
    scale: float = 50.0
    candidates: int = 5
    name: ClassVar[str] = "opera-penalty"

    def __post_init__(self) -> None:
        check_numbers(self, weight=(0, math.inf), scale=(0, math.inf))
        if self.scale == 0:
            raise ValueError("OperaPenalty(scale=0): scale is above 0")
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"OperaPenalty(candidates={self.candidates!r}): a count of at least 1")

    def other(self, reading: Reading) -> Reading:
        return reading

    def watch(self, engine: Any, undo: list[Callable[[], None]]) -> None:
        undo.append(switch(engine.config))
        undo.append(listen(engine.model.get_decoder().layers[-1].self_attn, functools.partial(_look, engine)))

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        log_p, branch, said = z.log_softmax(-1), step.branch, step.number - 1
        notes = branch.prompt.notes
        past = notes["opera"] if said else z.new_zeros(len(z), 0, 0)  # rows of the words so far, [rows, said, said]
        if said:
            past = past if branch.order is None else past[branch.order]
            past = torch.cat([F.pad(past, (0, 1)), last_of(notes["opera row"], said)[:, None]], 1)
        notes["opera"] = past
        count = min(self.candidates, z.shape[-1])
        values, tokens = log_p.topk(count, dim=-1)
        scores = []
        for candidate, value in zip(tokens.T, values.T, strict=True):
            branch.peek(candidate)
            row = notes["opera row"]
            local = last_of(row, said + 1)[:, None]
            if said + 1 <= EARLY:
                penalty = -(row * notes["opera image"]).sum(-1)
            else:
                penalty = over_trust(torch.cat([F.pad(past, (0, 1)), local], 1), self.scale)
            scores.append(value - self.weight * penalty)
        return (log_p - OUT_OF_REACH).scatter(1, tokens, torch.stack(scores, 1))


def last_of(row: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` entries of `[rows, keys]`; 0 for those that left a sliding window."""
    row = row[:, -count:]
    return F.pad(row, (count - row.shape[1], 0))


def over_trust(weights: torch.Tensor, scale: float) -> torch.Tensor:
    """`[rows]`, the largest product of a column of a triangle `[rows, n, n]`, on and below the diagonal.

    >>> over_trust(torch.tensor([[[0.5, 0.0], [0.2, 0.4]]]), scale=10)  # columns 5 * 2 and 4, times 1e-7
    tensor([1.0000e-06])
    """
    n = weights.shape[-1]
    below = torch.ones(n, n, dtype=torch.bool, device=weights.device).tril()
    logs = (weights.double() * scale).log().masked_fill(~below, 0)
    return (1e-7 * logs.sum(1).exp()).amax(-1).clamp(max=MOST).float()


def _look(engine: Any, module: Any, q, k, v, mask, scale: float, compute: Compute) -> torch.Tensor:
    """Around the last layer: in a branch, keep what the last row looks at, and which keys are visual."""
    prompt = engine.current
    if engine.branching and prompt is not None:
        w = hide(row_scores(q[:, :, -1:], k, scale), mask, q.shape[2]).softmax(-1).amax(1)[:, 0]
        columns = key_columns(prompt, len(prompt.tokens) - 1, k.shape[2], engine.reading)[:, 0]
        visual = prompt.asked.gather(1, columns.clamp(min=0, max=prompt.length - 1)) & (columns >= 0)
        prompt.notes["opera row"], prompt.notes["opera image"] = w / w.sum(-1, keepdim=True), visual
    return compute(q, k, v, mask)
