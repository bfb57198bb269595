"""ZeroTuning: turn the attention that every token pays to the first one up or down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from vision_attn.mllm.around import Around, Call, check_layers
from vision_attn.mllm.attachment import attach

PAD = 8  # kernels want head sizes that this divides


@dataclasses.dataclass(frozen=True)
class ZeroTuning(Around):
    """Multiply the attention of all rows to the first token by `gamma`, and let the rows sum to 1 again.

    Above 1 the rest of the attention flattens, below 1 it sharpens. Computed exactly for every row without its weights:
    the weight of the first token comes out of the kernel as one more channel of the values. The first token is that of
    each row of the batch, not its padding; where it has left a sliding window or the cache, nothing changes.

    Args:
        gamma: above 0; 1 changes nothing. There is no good value for all tasks: see `search_gamma`.
        layers: of the text model, from 0; None for all.
        heads: query heads, the same in all these layers; None for all.

    Raises:
        ValueError: a gamma that is not above 0; a layer or head that is not there.

    >>> ZeroTuning(gamma=1.5, heads=(0, 3))
    ZeroTuning(gamma=1.5, layers=None, heads=(0, 3))

    Paper: ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training.
    """

    gamma: float = 1.0
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    name: ClassVar[str] = "zerotuning"

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 < self.gamma < math.inf:
            raise ValueError(f"ZeroTuning(gamma={self.gamma!r}): gamma is a finite number above 0")

    def check(self, model: Any, family: Any) -> None:
        config = model.config.get_text_config()
        self.where(len(model.get_decoder().layers))
        check_heads("ZeroTuning", self.heads, config.num_attention_heads)

    def where(self, layers: int) -> tuple[int, ...]:
        return check_layers("ZeroTuning", self.layers, layers)

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if call.reading:
            columns = call.columns[:, 0]
            last = torch.iinfo(columns.dtype).max
            call.notes[call.layer] = columns.masked_fill(columns < 0, last).amin(1)
        first = (call.columns == call.notes[call.layer][:, None, None]).expand(-1, k.shape[1], -1)[..., None]
        channel = F.pad(first.to(v), (0, PAD - 1))
        wide = call.compute(F.pad(q, (0, PAD)), F.pad(k, (0, PAD)), torch.cat([v, channel], -1), call.mask)
        out, weight = wide[..., :-PAD].float(), wide[..., -PAD, None].float()
        value = (v * first).sum(2).float().repeat_interleave(q.shape[1] // v.shape[1], 1)[:, None]
        gain = out.new_zeros(q.shape[1], 1)
        gain[slice(None) if self.heads is None else list(self.heads)] = self.gamma - 1
        return ((out + gain * weight * value) / (1 + gain * weight)).to(v.dtype)


def check_heads(name: str, heads: Any, count: int) -> None:
    """Raise ValueError for a head that is not there."""
    bad = [head for head in heads or () if not isinstance(head, int) or not 0 <= head < count]
    if bad:
        raise ValueError(f"{name}: head {bad[0]!r}; the text model has heads 0 to {count - 1}")


def search_gamma(
    model: Any, measure: Callable[[], float], gammas: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    layers: tuple[int, ...] | None = None, probe: float | None = None,
) -> ZeroTuning:  # fmt: skip
    """ZeroTuning with the gamma that is best on some samples; the first of those that are equally good.

    Args:
        model: as for `attach`, with nothing attached.
        measure: how good the model is, the larger the better: accuracy on a few labelled samples, or without labels
            `lambda: -answer_entropy(model, inputs)`.
        gammas: to try; 1 is the plain model.
        layers: of the text model, from 0; None for all.
        probe: a gamma, tried first for each head alone in all these layers; only heads that it helps are tuned
            together, or those that it hurts, if they are more. None for all heads.

    Raises:
        ValueError: no gammas, or the probe changes nothing in any head.

    Paper: ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training.
    """

    def tried(gamma: float, heads: tuple[int, ...] | None) -> float:
        with attach(model, ZeroTuning(gamma, layers, heads)):
            return measure()

    if not gammas:
        raise ValueError("search_gamma needs gammas to try, such as (0.5, 1.0, 2.0)")
    heads = None
    if probe is not None:
        plain, count = measure(), model.config.get_text_config().num_attention_heads
        effects = [tried(probe, (head,)) - plain for head in range(count)]
        groups = [tuple(h for h, effect in enumerate(effects) if sign * effect > 0) for sign in (1, -1)]
        heads = max(groups, key=len)
        if not heads:
            raise ValueError(f"a gamma of {probe} in any single head leaves the measure at {plain}; try a stronger one")
    found = [tried(gamma, heads) for gamma in gammas]
    return ZeroTuning(gammas[found.index(max(found))], layers, heads)


@torch.no_grad()
def answer_entropy(model: Any, inputs: dict[str, Any]) -> float:
    """Entropy of the distribution of the next token, in nats, mean over the rows of a batch of prompts.

    Args:
        inputs: as for a call of the model, padded on the left.
    """
    log = model(**inputs).logits[:, -1].float().log_softmax(-1)
    return float(-(log.exp() * log).nan_to_num().sum(-1).mean())
