"""Attention as it happens: chosen rows of chosen layers, reduced at once to what is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from vision_attn.mllm.around import Around, Call, check_layers
from vision_attn.mllm.methods.var import relative
from vision_attn.mllm.rows import row_weights


@dataclasses.dataclass(frozen=True)
class Capture(Around):
    """Keep the attention of the last rows of every call, for prompts and for what is generated after them.

    What is kept is in `steps`, one entry per call of the text model: layer -> float32 `[batch, heads, rows, length]`
    over the columns of the padded prompt and of what follows it, or what `reduce` makes of it. Tokens that were dropped
    get 0. Rows are recomputed from queries and keys, before other methods change them, of the main branch where there
    is a second; no map of all pairs is made.

    Args:
        layers: of the text model, from 0; None for all.
        rows: the last so many of every call, at least 1; fewer where a call has fewer.
        reduce: `(weights, image) -> anything`, with bool `image` `[batch, 1, 1, length]`, the visual tokens that the
            layer has; for example `mass` or `image_entropy`.

    Raises:
        ValueError: a layer that is not there, or no rows.

    >>> from vision_attn.mllm import attach, tiny
    >>> model, look = tiny.model().eval(), Capture(layers=(3,))
    >>> with attach(model, look):
    ...     out = model(input_ids=torch.tensor([[1, 7, 8]]))
    >>> look.steps[0][3].shape
    torch.Size([1, 6, 1, 3])
    """

    layers: tuple[int, ...] | None = None
    rows: int = 1
    reduce: Callable[[torch.Tensor, torch.Tensor], Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"Capture(rows={self.rows!r}): a number of rows, at least 1")
        object.__setattr__(self, "steps", [])

    def check(self, model: Any, family: Any) -> None:
        self.where(len(model.get_decoder().layers))

    def where(self, layers: int) -> tuple[int, ...]:
        return check_layers("Capture", self.layers, layers)

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = slice(max(q.shape[2] - self.rows, 0), None)
        weights = call.spread(row_weights(q, k, call.mask, call.scale, rows))
        if not self.steps or call.layer in self.steps[-1]:
            self.steps.append({})
        self.steps[-1][call.layer] = weights if self.reduce is None else self.reduce(weights, call.image())
        return call.compute(q, k, v, call.mask)


@torch.no_grad()
def sink_tokens(model: Any, inputs: dict[str, Any], dims: tuple[int, ...], tau: float = 20.0) -> list[torch.Tensor]:
    """The sinks of a prompt, per layer of the text model bool `[batch, 1, 1, length]`: `mass(weights, sinks[layer])`.

    As in `VAR`: a token whose residual stream, as it enters the layer, has a value above `tau` times its root mean
    square in one of a few dimensions.

    Args:
        inputs: as for a call of the model.
        dims: the dimensions; `find_sinks` looks for them.
        tau: above 0.

    >>> from vision_attn.mllm import tiny
    >>> [sinks.sum().item() for sinks in sink_tokens(tiny.model().eval(), {"input_ids": torch.tensor([[1, 7]])}, (3,))]
    [0, 0, 0, 0]

    Paper: See What You Are Told: Visual Attention Sink in Large Multimodal Models (ICLR 2025).
    """
    found: list[torch.Tensor] = []
    mask = inputs.get("attention_mask")

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        sinks = relative(args[0] if args else kwargs["hidden_states"])[..., list(dims)].amax(-1) > tau
        found.append((sinks if mask is None else sinks & mask.bool())[:, None, None])

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.get_decoder().layers]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def mass(weights: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The part of attention `[..., n]` that goes to some tokens, bool that broadcasts to it: `[...]`.

    >>> mass(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([False, True, True])).tolist()
    [0.5]
    """
    return (weights * where).sum(-1)


def image_entropy(weights: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """How evenly attention `[..., n]` is spread over the visual tokens, 0 (on one of them) to 1 (the same on all).

    `- sum p log p / log M` of the weights on the M tokens of `image`, bool that broadcasts to them, made to sum to 1;
    NaN where there are less than two, or no weight is on them.

    >>> image_entropy(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([False, True, True])).item()
    1.0
    """
    part = weights.float() * image
    part = part / part.sum(-1, keepdim=True)
    return -torch.xlogy(part, part).sum(-1) / image.sum(-1).float().log()
