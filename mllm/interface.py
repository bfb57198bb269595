"""One attention function, registered with transformers, that lets us look at or change what an attention module does.

It computes what the attention function chosen before computes. Modules that carry a `Listener` show it queries, keys
and values, and the listener may change rows of the output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "vision_attn_"
LISTENER = "_vision_attn_listener"


class Listener(Protocol):
    """Looks at an attention call; returns the output, changed or not, `[batch, queries, heads, head_dim]`."""

    def __call__(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor: ...


def name_for(base: str) -> str:
    """The name under which an attention function is registered that computes what `base` computes."""
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
            compute: Callable = (
                sys.modules[type(module).__module__].eager_attention_forward
                if base == "eager"
                else ALL_ATTENTION_FUNCTIONS[base]
            )
            given = kwargs if scaling is None else {**kwargs, "scaling": scaling}
            out, weights = compute(module, query, key, value, attention_mask, **given)
            listener = vars(module).get(LISTENER)
            if listener is not None:
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                out = listener(module, query, key, value, attention_mask, scale, out)
            return out, weights

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        # Without a mask function of its own, transformers would pass no mask at all.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def switch(config: Any) -> Callable[[], None]:
    """Make the modules under a config call our function; returns what undoes it."""
    before = config._attn_implementation
    if before.startswith(PREFIX):
        return lambda: None
    config._attn_implementation = name_for(before)

    def undo() -> None:
        config._attn_implementation = before

    return undo
