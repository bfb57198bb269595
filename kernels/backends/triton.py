"""Fused Triton kernels: boxes of the grid for separable patterns, block lists for the others, forward and backward.

Needs a GPU of compute capability 8.0 or later; with TRITON_INTERPRET=1, set before Python starts, the kernels run on a
CPU in Triton's interpreter, for tests. See `kernels/gpu`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

import torch

from ..patterns import Blocked, Circle, Dense, Separable
from ..problem import Problem

OLDEST_TRITON = (3, 6)  # the oldest that the tests were run with
LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def missing(device: str) -> list[str]:
    reasons = _no_triton()
    if _interpreted():
        return reasons + ([] if device == "cpu" else ["TRITON_INTERPRET=1 is set: kernels run on cpu tensors only"])
    if device != "cuda":
        return reasons
    if not torch.cuda.is_available():
        return [*reasons, "no CUDA device"]
    major, minor = torch.cuda.get_device_capability()
    too_old = [f"needs a GPU of compute capability 8.0 or later; this one has {major}.{minor}"] if major < 8 else []
    return reasons + too_old


@functools.cache
def _no_triton() -> list[str]:
    try:
        version = importlib.metadata.version("triton")  # importing it takes long
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("triton") is None:
            return ["triton is not installed; pip install triton"]
        version = importlib.import_module("triton").__version__  # installed under another name
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON:
        return []
    oldest = ".".join(map(str, OLDEST_TRITON))
    return [f"needs triton {oldest} or later, as newer versions of torch bring it; found {version}"]


def limits(problem: Problem) -> list[str]:
    reasons, pattern = [], problem.pattern
    if problem.device != "cuda" and not _interpreted():
        return ["only cuda devices"]  # ask no further, which would import triton
    if problem.dtype not in DTYPES:
        reasons.append("no float64: the kernels sum in float32")
    if max(problem.head_dim, problem.value_dim) > LARGEST_HEAD:
        reasons.append(f"head dims up to {LARGEST_HEAD}")
    if isinstance(pattern, Separable):
        reasons += _box_limits(problem)
    elif isinstance(pattern, Blocked):
        reasons += [] if _no_triton() else _gpu("lists").limits(problem)
    else:
        reasons.append(f"{type(pattern).__name__} gives neither intervals nor block lists")
    return reasons


def _box_limits(problem: Problem) -> list[str]:
    pattern, reasons = problem.pattern, []
    if problem.bias:
        reasons.append(f"no bias with {type(pattern).__name__}")
    if type(pattern).score_rule is not Separable.score_rule:
        reasons.append(f"no score rule with {type(pattern).__name__}")
    if type(pattern).inside is not Separable.inside and not isinstance(pattern, Circle):
        reasons.append(f"does not know the shape of {type(pattern).__name__}, which is no product over the axes")
    if None in _gpu("tables").steps(pattern, problem.grid):
        reasons.append("the tokens that see each other must be evenly spaced on every axis")
    return reasons


def by_name_only(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return "runs in Triton's interpreter, which is for tests"
    if isinstance(problem.pattern, Dense) and not problem.return_lse and not problem.extra_mask:
        return "tiled calls the ordinary attention, which has nothing to leave out either"
    return None


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    with torch.cuda.device_of(q):  # kernels start on the current device
        if isinstance(problem.pattern, Blocked):
            return _gpu("lists").run(problem, q, k, v, scale, extra_kv, extra_mask, bias)
        out, lse = _Boxes.apply(problem, q, k, v, scale, *(extra_kv or (None, None)), extra_mask)
        return out, lse if problem.return_lse else None


def backward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse):
    """Gradients of q, k, v, the extra keys and values, and the bias, None where there is no such input; without
    autograd, for the operator of compiled graphs."""
    launch, call = _gpu("launch"), (problem, q, k, v, scale, extra_kv, extra_mask)
    with torch.cuda.device_of(q):
        if isinstance(problem.pattern, Blocked):
            return _gpu("lists").backward(*call, bias, out, lse, grad_out, grad_lse)
        if out is None or lse is None:
            out, lse = launch.run(*call)
        return [*launch.backward(*call, out, lse, grad_out, grad_lse if problem.return_lse else None), None]


class _Boxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, q, k, v, scale, extra_key, extra_value, extra_mask):
        extra_kv = None if extra_key is None else (extra_key, extra_value)
        out, lse = _gpu("launch").run(problem, q, k, v, scale, extra_kv, extra_mask)
        ctx.save_for_backward(q, k, v, extra_key, extra_value, extra_mask, out, lse)
        ctx.options = problem, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, extra_key, extra_value, extra_mask, out, lse = ctx.saved_tensors
        problem, scale = ctx.options
        extra_kv = None if extra_key is None else (extra_key, extra_value)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        call = problem, q, k, v, scale, extra_kv, extra_mask, out, lse, grad_out, grad_lse
        by_q, by_k, by_v, *by_extra = _gpu("launch").backward(*call)
        return None, by_q, by_k, by_v, None, *by_extra, None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu(name: str) -> ModuleType:
    """A module of the kernels, imported when it is needed: most of them import triton."""
    return importlib.import_module(f"..gpu.{name}", __package__)
