"""The native CPU kernel: written for the vector instructions of the processor, compiled on first use. See
`kernels/native`."""

from __future__ import annotations

import torch

from ..native import build, call
from ..patterns import Blocked, Circle, Separable
from ..problem import Problem

LEAST = 4096  # tiled takes a few milliseconds for these

# Have the kernel ready to run, compiling it where need be; False when that failed, and then `missing` says why.
load = build.load


def missing(device: str) -> list[str]:
    return build.missing()


def limits(problem: Problem) -> list[str]:
    pattern, reasons = problem.pattern, []
    if problem.device != "cpu":
        reasons.append("only cpu tensors")
    if problem.dtype == torch.float64:
        reasons.append("no float64: the kernel sums in float32")
    if not isinstance(pattern, (Separable, Blocked)):
        reasons.append(f"{type(pattern).__name__} gives neither intervals nor block lists")
    if not isinstance(pattern, Circle) and getattr(type(pattern), "inside", None) not in (None, Separable.inside):
        reasons.append(f"does not know the shape of {type(pattern).__name__}, which is no product over the axes")
    if type(pattern).score_rule is not Separable.score_rule:
        reasons.append(f"no score rule, which {type(pattern).__name__} has")
    if problem.bias and getattr(type(pattern), "spread_bias", None) is not Separable.spread_bias:
        reasons.append(f"{type(pattern).__name__} has no relative bias, the only kind it takes")
    return reasons


def by_name_only(problem: Problem) -> str | None:
    if build.instruction_set() == "portable":
        return "without AVX2 it is not faster than tiled"
    pattern, plain = problem.pattern, not (problem.return_lse or problem.extra_mask or problem.bias)
    if plain and isinstance(pattern, Separable) and pattern.density(problem.grid) > 0.5:
        return "where most pairs are kept tiled is as fast"
    if problem.batch * problem.heads * problem.tokens < LEAST:
        return f"not worth compiling for less than {LEAST} queries in all batch entries and heads"
    return None


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    if problem.needs_grad and not problem.in_graph:
        out, lse = _Attend.apply(problem, scale, extra_mask, q, k, v, *(extra_kv or (None, None)), bias)
    else:
        out, lse = call.forward(problem, q, k, v, scale, extra_kv, extra_mask, bias, problem.return_lse)
    return out.to(problem.dtype), lse if problem.return_lse else None


def backward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse):
    """Gradients of q, k, v, the extra keys and values, and the bias, without autograd; None where there is no such
    input."""
    if out is None or lse is None or out.dtype != torch.float32:
        out, lse = call.forward(problem, q, k, v, scale, extra_kv, extra_mask, bias, True)
    grad_lse = grad_lse if problem.return_lse else None
    inputs = (q, k, v, *(extra_kv or (None, None)), bias)
    args = (scale, extra_kv, extra_mask, bias, out.contiguous(), lse.contiguous(), grad_out, grad_lse)
    grads = call.backward(problem, q, k, v, *args)
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, scale, extra_mask, q, k, v, extra_key, extra_value, bias):
        extra_kv = None if extra_key is None else (extra_key, extra_value)
        out, lse = call.forward(problem, q, k, v, scale, extra_kv, extra_mask, bias, True)
        ctx.save_for_backward(q, k, v, extra_key, extra_value, bias, extra_mask, out, lse)
        ctx.problem, ctx.scale = problem, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, extra_key, extra_value, bias, extra_mask, out, lse = ctx.saved_tensors
        extra_kv = None if extra_key is None else (extra_key, extra_value)
        grads = backward(ctx.problem, q, k, v, ctx.scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse)
        return None, None, None, *grads
