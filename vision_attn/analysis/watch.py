"""Seeing every attention of a model while it runs, and changing its output where that is asked for.

Three doors are watched: `scaled_dot_product_attention` and softmax, by a function mode of torch, and `attend`, at its
backends. Hooks on the modules say who is calling; they change nothing and are removed at the end.
"""

from __future__ import annotations

import dataclasses
import threading
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vision_attn.hosts import plain
from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.problem import Problem
from vision_attn.retrofit.interception import state_of

_SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax}
_NOT_OVER_TOKENS = ("channel", "covariance", "xca", "selective", "splitattn")  # in class names, lower case


@dataclasses.dataclass
class Call:
    """A module that is running, and what it was called with."""

    module: nn.Module
    name: str
    shape: tuple[int, ...] | None  # of its first tensor
    guard: Any = None
    parts: Any = None  # a pattern with parts arrives as one call of `attend` for each: what they share, heads so far


class Watch(TorchFunctionMode):
    """While entered, the `saw_*` methods get every attention of `model`; what they return is what it goes on with.

    `stack` holds the running modules, `layer` is the number of the attention layer, in order of execution.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = plain(model)
        if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; allowed: a torch module that is not scripted")
        self.model = model
        self.stack: list[Call] = []
        self.passes = 0
        self.image: tuple[int, ...] | None = None  # shape of the images of this pass
        self._first: nn.Module | None = None
        self._order: dict[str, int] = {}
        self._quiet = False

    def saw_sdpa(self, q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """A call of `scaled_dot_product_attention`."""
        given = dict(attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return F.scaled_dot_product_attention(q, k, v, **given)

    def saw_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """The result of a softmax over the last axis in an attention layer."""
        return weights

    def saw_attend(self, problem: Problem, first_head: int, call: tuple, out: torch.Tensor) -> torch.Tensor:
        """A call of `attend`: q, k, v, scale, extra_kv, extra_mask, bias, and what came out."""
        return out

    def saw_multihead(self, module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> bool:
        """An `nn.MultiheadAttention` starts; True leaves it alone, in its fast path where it can take that."""
        return True

    def saw_multihead_function(self, *args: Any, **kwargs: Any) -> Any:
        """`multi_head_attention_forward`, of modules that were not left alone."""
        return F.multi_head_attention_forward(*args, **kwargs)

    @property
    def layer(self) -> int:
        return self._order.setdefault(self.stack[-1].name, len(self._order))

    def head_axis(self, x: torch.Tensor) -> int | None:
        """Which axis of queries or weights counts heads; -1: none, there is one head; None if that cannot be told.

        Axis 0 of three counts images times heads.
        """
        module = self.stack[-1].module
        heads = getattr(module, "num_heads", getattr(module, "heads", None))
        if x.ndim == 3:
            return 0 if self.image is not None and heads and x.shape[0] == self.image[0] * heads else -1
        if x.ndim == 5:
            return x.shape[1:4].index(heads) + 1 if heads in x.shape[1:4] else None
        return 1 if x.ndim == 4 else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.stack and not self._quiet and not self._over_channels():
            if (
                func is F.scaled_dot_product_attention
                and self.head_axis(args[0] if args else kwargs["query"]) is not None
            ):
                return self.saw_sdpa(*args, **{{"attn_mask": "mask"}.get(key, key): x for key, x in kwargs.items()})
            if func is F.multi_head_attention_forward:
                return self.saw_multihead_function(*args, **kwargs)
            if func in _SOFTMAX and self._over_keys(args, kwargs):
                return self.saw_weights(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _over_channels(self) -> bool:
        return any(word in type(self.stack[-1].module).__name__.lower() for word in _NOT_OVER_TOKENS)

    def _over_keys(self, args: tuple, kwargs: dict) -> bool:
        x = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        kind = type(self.stack[-1].module).__name__.lower()
        return (
            isinstance(x, torch.Tensor)
            and x.ndim >= 3
            and dim in (-1, x.ndim - 1)
            and ("att" in kind or hasattr(self.stack[-1].module, "num_heads"))
            and self.head_axis(x) is not None
        )

    def _attended(self, problem: Problem, call: tuple, out: torch.Tensor) -> torch.Tensor:
        here = self.stack[-1]
        shared = (problem.grid, problem.batch, problem.extra)
        first = here.parts[1] if here.parts and here.parts[0] == shared else 0
        here.parts = (shared, first + problem.heads)
        return self.saw_attend(problem, first, call, out)

    def __enter__(self):
        self._hooks = []
        for name, module in self.model.named_modules():
            if module is self.model or next(module.children(), None) is not None:
                self._hooks.append(module.register_forward_pre_hook(self._starts(name), prepend=True, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._ends, always_call=True))
        _listen(self)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        _stop(self)
        for hook in self._hooks:
            hook.remove()
        self.stack.clear()

    def _starts(self, name: str):
        def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            call = Call(module, name, None if first is None else tuple(first.shape))
            # A pass begins where an image goes into the model, or, where parts of it are called one after the other
            # (forward_features, then forward_head), into the part that was called first.
            if not self.stack and call.shape is not None and len(call.shape) == 4:
                if module is self.model or self._first in (None, self.model, module):
                    self.passes, self._order, self.image, self._first = self.passes + 1, {}, call.shape, module
            self.stack.append(call)
            if isinstance(module, nn.MultiheadAttention) and not getattr(state_of(module), "active", False):
                if self.saw_multihead(module, args, kwargs):  # inside a mode it would leave its fast path and round
                    call.guard = torch._C.DisableTorchFunction()
                    call.guard.__enter__()

        return start

    def _ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self.stack.pop()
        if call.guard is not None:
            call.guard.__exit__(None, None, None)


class _Watched:
    """A backend that shows the watches of its thread what it computes."""

    def __init__(self, backend: ModuleType) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, problem: Problem, *call: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        watches = [watch for watch in getattr(_here, "watches", ()) if watch.stack and not watch._quiet]
        for watch in watches:
            watch._quiet = True
        try:
            out, lse = self._backend.run(problem, *call)
        finally:
            for watch in watches:
                watch._quiet = False
        for watch in watches:
            out = watch._attended(problem, call, out)
        return out, lse


_here = threading.local()
_lock = threading.Lock()
_listening = 0


def _listen(watch: Watch) -> None:
    global _listening
    _here.watches = [*getattr(_here, "watches", ()), watch]
    with _lock:
        _listening += 1
        if _listening == 1:
            BACKENDS.update({name: _Watched(backend) for name, backend in BACKENDS.items()})


def _stop(watch: Watch) -> None:
    global _listening
    _here.watches = [other for other in _here.watches if other is not watch]
    with _lock:
        _listening -= 1
        if _listening == 0:
            BACKENDS.update({name: backend._backend for name, backend in BACKENDS.items()})
