"""One attention function, registered with transformers, that lets us look at or change what an attention module does.

It computes what the attention function chosen before computes. Listeners put around a module see its queries, keys and
values, and may change rows of the output or compute it in another way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "vision_attn_"
LISTENERS = "_vision_attn_listeners"
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class Listener(Protocol):
    """Stands around an attention call: returns the output `[batch, queries, heads, head_dim]`.

    Queries are `[batch, heads, queries, head_dim]`, keys and values `[batch, kv_heads, keys, head_dim]`, positions
    applied and the cache included. `compute(q, k, v, mask)` is what the module would do without this listener.
    """

    def __call__(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        compute: Compute,
    ) -> torch.Tensor: ...


def name_for(base: str) -> str:
    """The name under which an attention function is registered that computes what `base` computes."""
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
            plain: Callable = (
                sys.modules[type(module).__module__].eager_attention_forward
                if base == "eager"
                else ALL_ATTENTION_FUNCTIONS[base]
            )
            given = kwargs if scaling is None else {**kwargs, "scaling": scaling}
            around = listeners(module)
            if not around:
                return plain(module, query, key, value, attention_mask, **given)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            weights = None

            def compute(q, k, v, mask):
                nonlocal weights
                out, weights = plain(module, q, k, v, mask, **given)
                return out

            for listener in around:
                compute = functools.partial(_around, listener, module, scale, compute)
            return compute(query, key, value, attention_mask), weights

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        # Without a mask function of its own, transformers would pass no mask at all.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _around(listener: Listener, module: Any, scale: float, compute: Compute, q, k, v, mask) -> torch.Tensor:
    return listener(module, q, k, v, mask, scale, compute)


def listeners(module: Any) -> tuple[Listener, ...]:
    """What stands around the attention of a module, inside first."""
    return vars(module).get(LISTENERS, ())


def listen(module: Any, listener: Listener) -> Callable[[], None]:
    """Put a listener around the attention of a module, outside of those that are there; returns what takes it out."""
    vars(module)[LISTENERS] = (*listeners(module), listener)

    def undo() -> None:
        rest = tuple(other for other in listeners(module) if other is not listener)
        if rest:
            vars(module)[LISTENERS] = rest
        else:
            del vars(module)[LISTENERS]

    return undo


def switch(config: Any) -> Callable[[], None]:
    """Make the modules under a config call our function; returns what undoes it."""
    before = config._attn_implementation
    if before.startswith(PREFIX):
        return lambda: None
    config._attn_implementation = ours = name_for(before)

    def undo() -> None:
        if config._attn_implementation == ours:  # else somebody chose another since
            config._attn_implementation = before

    return undo
