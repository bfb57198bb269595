"""How a model is changed from outside and given back: its modules answer with another class for a while.

A module's class is replaced by a subclass of itself that holds what is attached. Nothing is wrapped, so names, the
state dict, hooks, copies (`copy.deepcopy`) and `torch.compile` work as before, and putting the class back leaves no
trace. What is attached has state of the call that is running, so one thread may call a model at a time. Inside,
`scaled_dot_product_attention` is taken over for the length of one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

KEY = "_vision_attn"  # where an attached module keeps its state


def put_on(module: nn.Module, behaviour: type, state: Any) -> None:
    """Put `behaviour` in front of the class of `module`; `state` is what it reads as `self._vision_attn`."""
    if KEY in vars(module):
        raise ValueError(f"{own_class(module).__name__} is attached already; detach() that run first")
    vars(module)[KEY] = state
    module.__class__ = _in_front(behaviour, type(module))


def take_off(module: nn.Module) -> None:
    """Undo `put_on`; a module that has nothing on stays as it is."""
    module.__class__ = own_class(module)
    vars(module).pop(KEY, None)


def own_class(module: nn.Module) -> type:
    """The class of a module without what is attached to it."""
    return type(module).__bases__[1] if KEY in vars(module) else type(module)


def state_of(module: nn.Module) -> Any | None:
    return vars(module).get(KEY)


@functools.cache
def _in_front(behaviour: type, cls: type) -> type:
    return type(f"Attached{cls.__name__}", (behaviour, cls), {"__module__": cls.__module__})


class Interception(TorchFunctionMode):
    """Gives every `scaled_dot_product_attention` inside it to `attention`; every other function runs as it is."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attention(*args, **(kwargs or {}))


def is_attention(module: nn.Module) -> bool:
    """Whether a module is known to call `scaled_dot_product_attention`, or to be `nn.MultiheadAttention`."""
    marks = ("fused_attn", "use_fsdpa", "is_causal")  # of timm, open_clip, transformers
    return isinstance(module, nn.MultiheadAttention) or any(hasattr(module, mark) for mark in marks)


class SelfAttention:
    """In front of a layer that calls `scaled_dot_product_attention`. Its state has `active` and `attention`, and gets
    the number of such calls as `times`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._vision_attn
        if not state.active:
            return super().forward(*args, **kwargs)
        mode = Interception(state.attention)
        unfused = getattr(self, "fused_attn", True) is False
        if unfused:  # built to spell attention out
            self.fused_attn = True
        try:
            with mode:
                out = super().forward(*args, **kwargs)
        finally:
            if unfused:
                self.fused_attn = False
        state.times = mode.calls
        if not mode.calls:
            state.left("it ran without calling scaled_dot_product_attention")
        return out


class MultiheadAttention:
    """In front of `nn.MultiheadAttention`, whose fast path for inference cannot be intercepted."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
        state = self._vision_attn
        trouble = None
        if not state.active:
            trouble = ""
        elif query is not key or key is not value or query.ndim != 3:
            trouble = "it was called as cross-attention or without a batch"
        elif key_padding_mask is not None or need_weights or options.get("is_causal"):
            trouble = "it was called with key_padding_mask, need_weights or is_causal"
        elif self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
            trouble = "it has separate projections or extra keys"
        if trouble is not None:
            if trouble:
                state.left(trouble)
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask  # True means hidden here
            if attn_mask.ndim == 3 and attn_mask.shape[0] > 1:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        dropout = self.dropout if self.training else 0.0
        out = state.attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=attn_mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None


def behaviour_of(module: nn.Module) -> type:
    """The class to put in front of an attention module."""
    return MultiheadAttention if isinstance(module, nn.MultiheadAttention) else SelfAttention
