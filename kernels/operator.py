"""`attend` as one registered operator, which is how it appears in graphs of torch.compile.

A graph would otherwise unroll every chunk of every layer. The operator holds the pattern as text (`Pattern.spell`),
checks and dispatches when it runs, exactly as the plain call does, and has a backward of its own.
"""

from __future__ import annotations

import ast
import functools
from typing import List  # noqa: UP035 - torch 2.6 knows this spelling only

import torch
from torch import Tensor

from .backends import BACKENDS, ready
from .patterns import PATTERNS, BlockList, Pattern
from .problem import Problem, describe, resolve_scale


def attend_in_graph(q, k, v, pattern, scale, extra_kv, extra_mask, bias, return_lse, backend):
    extra_key, extra_value = (None, None) if extra_kv is None else extra_kv
    inputs = (q, k, v, extra_key, extra_value, bias)
    needs_grad = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    options = (pattern.spell(), scale, bool(return_lse), backend, needs_grad)
    out, lse = torch.ops.vision_attn.attend(*inputs, extra_mask, pattern.tensors(), *options)
    return (out, lse) if return_lse else out


@functools.lru_cache(maxsize=256)
def _read(text: str) -> Pattern:
    name, options = ast.literal_eval(text)
    return PATTERNS[name](**options)


def _pattern(text: str, tensors: list[Tensor]) -> Pattern:
    if not tensors:
        return _read(text)
    options = ast.literal_eval(text)[1]
    within = None if options["within"] is None else _read(repr(options["within"]))
    return BlockList(options["block"], *tensors, within=within)


def _problem(
    q, k, v, extra_key, extra_value, bias, extra_mask, tensors, pattern, scale, return_lse, backend, needs_grad
):
    extra_kv = None if extra_key is None else (extra_key, extra_value)
    known = describe(q, k, v, _pattern(pattern, tensors), scale, extra_kv, extra_mask, bias, return_lse)
    problem = Problem(**(known.__dict__ | {"needs_grad": needs_grad, "in_graph": True}))
    if not problem.extra:
        extra_kv = extra_mask = None
    call = q, k, v, resolve_scale(problem, scale), extra_kv, extra_mask, bias
    return problem, BACKENDS[ready(problem, backend)], call


@torch.library.custom_op("vision_attn::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    bias: Tensor | None,
    extra_mask: Tensor | None,
    tensors: List[Tensor],  # noqa: UP006
    pattern: str,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    problem, module, call = _problem(
        q, k, v, extra_key, extra_value, bias, extra_mask, tensors, pattern, scale, return_lse, backend, needs_grad
    )
    out, lse = module.run(problem, *call)
    return out.contiguous(), _empty_lse(q, return_lse) if lse is None or not return_lse else lse.contiguous()


def _empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    shape = q.shape[:-1] if return_lse else (0,)
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@_attend.register_fake
def _(q, k, v, extra_key, extra_value, bias, extra_mask, tensors, pattern, scale, return_lse, backend, needs_grad):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), _empty_lse(q, return_lse)


@torch.library.custom_op("vision_attn::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    bias: Tensor | None,
    extra_mask: Tensor | None,
    tensors: List[Tensor],  # noqa: UP006
    pattern: str,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
) -> List[Tensor]:  # noqa: UP006
    problem, module, call = _problem(
        q, k, v, extra_key, extra_value, bias, extra_mask, tensors, pattern, scale, return_lse, backend, True
    )
    inputs = (q, k, v, extra_key, extra_value, bias)
    if not q.numel():
        return [torch.zeros_like(t) for t in inputs if t is not None]
    grads = module.backward(problem, *call, out, lse if return_lse else None, grad_out, grad_lse)
    zeros = (None if t is None else torch.zeros_like(t) for t in inputs)  # of extra tokens that are none
    return _apart([(z if g is None else g).contiguous() for g, z in zip(grads, zeros, strict=True) if z is not None])


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Copies those that share memory with one before them, which an operator may not return."""
    seen: set[int] = set()
    out = []
    for tensor in tensors:
        at = tensor.untyped_storage().data_ptr()
        out.append(tensor.clone() if at in seen else tensor)
        seen.add(at)
    return out


@_attend_backward.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, extra_key, extra_value, bias, *rest):
    return [t.new_empty(t.shape) for t in (q, k, v, extra_key, extra_value, bias) if t is not None]


def _save(ctx, inputs, output):
    *head, tensors, pattern, scale, return_lse, backend, _ = inputs
    ctx.save_for_backward(*output, *head, *tensors)
    ctx.options = (pattern, scale, return_lse, backend)


def _backward(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors
    result, head, tensors = saved[:2], saved[2:9], list(saved[9:])
    grads = iter(torch.ops.vision_attn.attend_backward(grad_out, grad_lse, *result, *head, tensors, *ctx.options))
    grads = [None if t is None else next(grads) for t in head[:6]]
    return *grads, None, [None] * len(tensors), None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_save)
