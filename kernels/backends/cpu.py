"""The native CPU kernel: vector instructions of the processor, compiled on first use. See `kernels/native`."""

from __future__ import annotations

import torch

from ..native import build, call
from ..patterns import Separable
from ..problem import Problem

missing_native = build.missing


def missing(device: str) -> list[str]:
    return build.missing()


def limits(problem: Problem) -> list[str]:
    reasons = []
    if problem.device != "cpu":
        reasons.append("only cpu tensors")
    if problem.dtype == torch.float64:
        reasons.append("no float64: the kernel sums in float32")
    if not isinstance(problem.pattern, Separable):
        reasons.append("only separable patterns")
    elif type(problem.pattern).inside is not Separable.inside:
        reasons.append(f"does not know the shape of {type(problem.pattern).__name__}")
    if type(problem.pattern).score_rule is not Separable.score_rule:
        reasons.append("no score rule")
    if problem.bias:
        reasons.append("no bias")
    if problem.needs_grad:
        reasons.append("no gradients")
    return reasons


def by_name_only(problem: Problem) -> str | None:
    return "being built"


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    return call.forward(problem, q, k, v, scale, extra_kv, extra_mask)
