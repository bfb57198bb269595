"""Joint attention as one opaque operator, so that `torch.compile` records a single node whatever the pattern and the backend do."""

from __future__ import annotations

import itertools
import weakref

import torch

from vision_attn.diffusion.joint import joint_attention

_CONTEXTS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register(context) -> str:
    """Give an attachment a name that compiled code can hold; it lives as long as the attachment."""
    key = f"attachment-{next(_NUMBERS)}"
    _CONTEXTS[key] = context
    return key


def _run(q, k, v, mask, key, grid, start, scale, enable_gqa):
    context = _CONTEXTS[key]
    return joint_attention(q, k, v, mask, context.pattern, tuple(grid), start, scale, enable_gqa, context.backend)


@torch.library.custom_op("vision_attn::joint_attention", mutates_args=())
def traced_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key: str,
    grid: list[int],
    start: int,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    return _run(q, k, v, mask, key, grid, start, scale, enable_gqa).contiguous()


@traced_attention.register_fake
def _(q, k, v, mask, key, grid, start, scale, enable_gqa):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx, grad):
    # Computed again: the operator hides the graph of whatever backend ran.
    *leaves, mask = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in leaves]
        grads = torch.autograd.grad(_run(*leaves, mask, *ctx.options), leaves, grad)
    return *grads, *(None,) * 6


traced_attention.register_autograd(_backward, setup_context=_setup)
