"""The CUDA kernels of the natten package, and its forward-only CPU path.

Import of the package is lazy: it is optional.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from ..patterns import Neighborhood
from ..patterns.base import along
from ..problem import Problem

CPU_HEAD_DIMS = (8, 16, 32, 64, 128, 256)


@functools.cache
def missing(device: str) -> list[str]:
    if importlib.util.find_spec("natten") is None:
        return ["the natten package is not installed; `pip install --no-build-isolation natten`"]
    if device == "cpu":
        return []
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    import natten

    return [] if natten.HAS_LIBNATTEN else ["this natten was built without its CUDA kernels"]


def limits(problem: Problem) -> list[str]:
    pattern, reasons = problem.pattern, []
    if not isinstance(pattern, Neighborhood):
        reasons.append("only Neighborhood patterns")
    elif 1 in along(pattern, "window", len(problem.grid)):
        reasons.append("window 1 on an axis; it wants at least 2")
    if problem.device not in ("cpu", "cuda"):
        reasons.append("only cpu and cuda devices")
    if problem.dtype == torch.float64:
        reasons.append("no float64")
    if problem.value_dim != problem.head_dim:
        reasons.append("value_dim must equal head_dim")
    if problem.bias:
        reasons.append("no bias")
    if problem.extra_mask:
        reasons.append("no mask over extra tokens")
    if problem.device == "cpu":
        if problem.needs_grad:
            reasons.append("no gradients on a CPU")
        if problem.head_dim not in CPU_HEAD_DIMS:
            reasons.append(f"on a CPU head_dim must be one of {', '.join(map(str, CPU_HEAD_DIMS))}")
        whole = isinstance(pattern, Neighborhood) and along(pattern, "window", len(problem.grid)) == problem.grid
        if whole and len(problem.grid) == 1 and along(pattern, "causal", 1)[0] and not problem.extra:
            reasons.append("no causal window as long as the whole axis on a CPU")
    elif problem.head_dim % 8:
        reasons.append("head_dim must be a multiple of 8")
    return reasons


def by_name_only(problem: Problem) -> str | None:
    if problem.device == "cpu":
        return "on a CPU it computes tokens x tokens scores, and is slower than tiled"
    return None


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    from natten.functional import neighborhood_attention_generic

    window, stride, dilation, causal = (
        along(problem.pattern, name, len(problem.grid)) for name in ("window", "stride", "dilation", "causal")
    )
    extra = {} if extra_kv is None else {"additional_keys": extra_kv[0], "additional_values": extra_kv[1]}
    with warnings.catch_warnings():
        # its CPU path calls FlexAttention uncompiled, which warns every time
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return neighborhood_attention_generic(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            window,
            stride,
            dilation,
            causal,
            scale,
            return_lse=True,
            **extra,
        )
