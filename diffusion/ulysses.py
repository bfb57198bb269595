"""What diffusers' Ulysses sequence parallelism does to tokens and masks, and what puts it right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook
from torch.overrides import TorchFunctionMode


def gathered_order(ranks: int, first: int, second: int) -> list[int]:
    """Positions of `[first part, second part]` in the sequence that Ulysses parallelism gathers.

    Each rank concatenates its slice of both parts before the exchange, so the parts arrive interleaved.

    >>> gathered_order(2, 2, 4)  # gathered as: text 0, image 0 1, text 1, image 2 3
    [0, 3, 1, 2, 4, 5]
    """
    a, b = first // ranks, second // ranks
    parts = [range(r * (a + b), r * (a + b) + a) for r in range(ranks)]
    parts += [range(r * (a + b) + a, (r + 1) * (a + b)) for r in range(ranks)]
    return [position for part in parts for position in part]


def text_masked(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The cross-attention of a denoiser that fails under Ulysses when its text has a mask: LTX's, which repeats the
    mask for every head, while each rank holds only some heads."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    if config is None or type(module).__name__ != "LTXVideoTransformer3DModel":
        return []
    return [block.attn2 for block in module.transformer_blocks]


class OneMaskHook(ModelHook):
    """On cross-attention: one mask for all heads, in place of as many alike as the model has heads."""

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _OneMask():
            return self.fn_ref.original_forward(*args, **kwargs)


class _OneMask(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask") if func is F.scaled_dot_product_attention else None
        return func(*args, **(kwargs if mask is None else {**kwargs, "attn_mask": mask[:, :1]}))
