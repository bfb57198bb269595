"""ACT: take attention from sinks in the middle of a prompt, and give it to the other tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import Around, Call, check_layers
from vision_attn.mllm.attachment import attach
from vision_attn.mllm.methods.zerotuning import check_heads
from vision_attn.mllm.rows import row_weights, visible

ROWS = 256  # rows of attention that exist at once


@dataclasses.dataclass(frozen=True)
class ACT(Around):
    """In chosen heads, scale the attention to sinks by `beta`; what is freed goes to the rest, in proportion.

    A sink of a head is a token that receives, on average over the rows that see it, more than `threshold` of their
    attention; the first one of a prompt is left as it is. Sinks are found while the prompt is read and stay the same
    afterwards: the authors' code looks for them again in each generated row, where only the first token would be left.
    All rows of these heads are computed anew, some at a time, so methods that edit rows cannot be attached with it.

    Args:
        heads: (layer, query head) pairs. There is no list that fits all models: `fit_act` finds one. The published
            search looks from layer 2 to the last but one.
        beta: what is left of the attention to sinks, 0 to 1.
        threshold: above 0 and below 1; 0.1 in the authors' code.

    Raises:
        ValueError: a number out of range, no heads, or one that is not there.

    >>> ACT(heads=((2, 0), (2, 5)))
    ACT(heads=((2, 0), (2, 5)), beta=0.4, threshold=0.1)

    Paper: Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
    Attention Calibration.
    """

    heads: tuple[tuple[int, int], ...]
    beta: float = 0.4
    threshold: float = 0.1
    name: ClassVar[str] = "act"
    anew: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"ACT(beta={self.beta!r}): from 0 to 1")
        if not 0 < self.threshold < 1:
            raise ValueError(f"ACT(threshold={self.threshold!r}): above 0 and below 1")
        if not self.heads or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.heads):
            raise ValueError(f"ACT(heads={self.heads!r}): (layer, head) pairs, such as ((2, 0), (2, 5)); see fit_act")

    def check(self, model: Any, family: Any) -> None:
        self.where(len(model.get_decoder().layers))
        check_heads("ACT", [head for _, head in self.heads], model.config.get_text_config().num_attention_heads)

    def where(self, layers: int) -> tuple[int, ...]:
        return check_layers("ACT", tuple(sorted({layer for layer, _ in self.heads})), layers)

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = call.compute(q, k, v, call.mask).clone()
        heads = torch.tensor(sorted({head for layer, head in self.heads if layer == call.layer}), device=q.device)
        group, count = q.shape[1] // k.shape[1], q.shape[2]
        q, own_k, own_v = q[:, heads], k[:, heads // group], v[:, heads // group].float()
        mask = call.mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:  # heads that see different keys
            mask = mask[:, heads]
        cuts = [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
        if call.reading:
            real = call.columns[:, 0] >= 0
            got = sum(row_weights(q, own_k, mask, call.scale, rows, real).sum(2) for rows in cuts)
            seen_by = sum(visible(q, own_k, mask, rows, real).sum(2) for rows in cuts)
            sinks = got / seen_by.clamp(min=1) > self.threshold
            every = got.new_zeros(len(got), out.shape[2], 1, k.shape[2])
            every[:, heads, 0] = (sinks & (sinks.cumsum(-1) > 1)).float()
            call.notes[call.layer] = call.spread(every)
        sinks = call.at_keys(call.notes[call.layer])[:, heads] > 0
        for rows in cuts:
            w = row_weights(q, own_k, mask, call.scale, rows)
            taken, left = ((w * part).sum(-1, keepdim=True) for part in (sinks, ~sinks))
            gain = 1 + (1 - self.beta) * taken / left
            w = torch.where(left > 1e-9, torch.where(sinks, self.beta * w, gain * w), w)
            out[:, rows, heads] = (w @ own_v).transpose(1, 2).to(out.dtype)
        return out


def fit_act(
    model: Any, measure: Callable[[], float], layers: tuple[int, ...] | None = None, beta: float = 0.4,
    threshold: float = 0.1,
) -> ACT:  # fmt: skip
    """ACT in all heads that, each alone, do not hurt.

    Args:
        model: as for `attach`, with nothing attached.
        measure: how good the model is on held-out samples, the larger the better; called once for the plain model and
            once per head. The paper takes the accuracy on 900 samples.
        layers: to search in; None for 2 to the last but one, as published.

    Raises:
        ValueError: every head hurts.
    """
    count = len(model.get_decoder().layers)
    layers = check_layers("fit_act", tuple(range(2, count - 1)) if layers is None else layers, count)
    plain, kept = measure(), []
    for layer in layers:
        for head in range(model.config.get_text_config().num_attention_heads):
            with attach(model, ACT(((layer, head),), beta, threshold)):
                if measure() >= plain:
                    kept.append((layer, head))
    if not kept:
        raise ValueError(f"ACT hurts in every head of layers {list(layers)}; use another beta or threshold, or no ACT")
    return ACT(tuple(kept), beta, threshold)
