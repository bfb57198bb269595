"""VisualHeadMask: heads that hardly look at pictures do not look at them at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import Around, Call
from vision_attn.mllm.methods.neighborvisual import check_masks, seen
from vision_attn.mllm.ranking import rows_where, words_after
from vision_attn.mllm.tokens import take

FIRST = 2  # the layers before it look at pictures with all heads


@dataclasses.dataclass(frozen=True)
class VisualHeadMask(Around):
    """Some heads ignore the picture: what they give to it counts for nothing, and at visual tokens they say nothing.

    What such a head gives to other tokens stays as it is, without making up for what is lost. This shows which heads
    matter; it saves no time, as the weights have to be known for their sum.

    Args:
        heads: for each layer of the text model the heads that ignore the picture; from `VisualHeadMask.calibrate`.

    Raises:
        ValueError: no heads, or heads that the model does not have.

    Paper: Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See.
    """

    heads: tuple[tuple[int, ...], ...] = ()
    name: ClassVar[str] = "visual-heads"
    text: ClassVar[bool] = False

    @classmethod
    def calibrate(
        cls, model: Any, samples: Iterable[dict[str, Any]], threshold: float = 0.1, share: float = 0.4
    ) -> VisualHeadMask:
        """Find the heads of a model that look at its pictures.

        For every sample, what a head gives to visual tokens is divided by what it gives to others, both summed over the
        words after the picture; it looks at pictures if that passes the threshold in more than a share of the samples.
        The heads of the first two layers always do. The paper took thresholds from 0.035 to 0.2, by model and number of
        heads wanted, and 100 samples; which rows it sums is not said.

        Args:
            samples: inputs as for `model(**inputs)`; each row with a picture is a sample.
            threshold: above 0.
            share: of the samples, from 0 to below 1.

        Raises:
            ValueError: no samples with a picture, or arguments out of range.
        """
        from vision_attn.mllm.attachment import attach

        if threshold <= 0 or not 0 <= share < 1:
            raise ValueError(f"threshold above 0 and share from 0 to below 1; got {threshold} and {share}")
        ratios = _Ratios()
        with torch.no_grad(), attach(model, ratios):
            for inputs in samples:
                model(**inputs)
        if not ratios.found.get(0):
            raise ValueError("calibrate needs at least one sample with a picture")
        heads = []
        for layer in range(len(model.get_decoder().layers)):
            looks = (torch.cat(ratios.found[layer]) > threshold).float().mean(0) > share
            heads.append(tuple((~looks).nonzero()[:, 0].tolist()) if layer >= FIRST else ())
        return cls(tuple(heads))

    def check(self, model: Any, family: Any) -> None:
        layers, heads = len(model.get_decoder().layers), model.config.get_text_config().num_attention_heads
        bad = sorted({head for layer in self.heads for head in layer if not 0 <= head < heads})
        if len(self.heads) != layers or bad:
            raise ValueError(
                f"VisualHeadMask(heads=...) has {len(self.heads)} layers{f' and heads {bad}' if bad else ''}; "
                f"{type(model).__name__} has {layers} layers of {heads} heads, from 0. VisualHeadMask.calibrate finds "
                "the heads of a model"
            )

    def where(self, layers: int) -> tuple[int, ...]:
        return tuple(layer for layer, heads in enumerate(self.heads) if heads)

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        blind = torch.tensor(self.heads[call.layer], device=q.device)
        hidden = visual_keys(call)
        # A value of zero takes part in the softmax, and adds nothing.
        made = call.compute(q, k, v.masked_fill(hidden[..., None], 0), call.mask)
        if call.reading:
            made = made.masked_fill(hidden[:, 0, : q.shape[2], None, None], 0)
        if len(blind) == q.shape[1]:
            return made
        return call.compute(q, k, v, call.mask).index_copy(2, blind, made[:, :, blind])


@dataclasses.dataclass(frozen=True)
class _Ratios(Around):
    """Changes nothing, and notes what each head gives to visual tokens, divided by what it gives to others."""

    found: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    text: ClassVar[bool] = False

    def check(self, model: Any, family: Any) -> None:
        check_masks("VisualHeadMask.calibrate", model)

    def where(self, layers: int) -> tuple[int, ...]:
        return tuple(range(layers))

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if call.reading:
            tokens = call.prompt.tokens[call.layer]
            rows, counts = rows_where(words_after(tokens))
            grouped = take(q, rows, 2).float().unflatten(1, (k.shape[1], -1))
            scores = torch.einsum("bkgrd,bknd->bkgrn", grouped, k.float()).flatten(1, 2) * call.scale
            weights = (scores + seen(call, rows, k.shape[2], torch.float32)).softmax(-1) * counts[:, None, :, None]
            given = (weights * visual_keys(call)[:, :, None]).sum((2, 3))
            ratio = given / (weights.sum((2, 3)) - given)
            self.found.setdefault(call.layer, []).append(ratio[tokens.visual.any(1)].cpu())
        return call.compute(q, k, v, call.mask)


def visual_keys(call: Call) -> torch.Tensor:
    """Bool `[batch, 1 or kv_heads, keys]`."""
    asked = call.prompt.asked[:, None].expand(-1, call.columns.shape[1], -1)
    there = (call.columns >= 0) & (call.columns < asked.shape[2])
    return asked.gather(2, call.columns.clamp(0, asked.shape[2] - 1)) & there
