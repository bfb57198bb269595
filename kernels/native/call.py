"""Calls of the CPU kernel: from tensors to the structures of call.h."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..patterns import Separable
from ..problem import Problem
from . import blocks, boxes, lines
from .build import library, load

PLAIN = (torch.Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEPT_BYTES = 64 * 2**20  # of packed keys and values, kept per thread: fresh memory costs as much as filling it

_kept = threading.local()


class Call(ctypes.Structure):
    """As in call.h."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("batch", "kv_heads", "group", "threads")),
        ("grid", ctypes.c_int32 * 3),
        *((n, ctypes.c_int32) for n in ("extra", "key", "value", "key_step", "value_step")),
        ("scale", ctypes.c_float),
        ("q", lines.Rows),
        *((n, ctypes.c_void_p) for n in ("keys", "values", "visible", "out", "lse", "bias", "place")),
        *((n, ctypes.c_int64) for n in ("entries", "middle")),
        ("step", ctypes.c_int64 * 2),
        *((n, ctypes.c_void_p) for n in ("d_out", "d_lse", "d_q", "d_keys", "d_values", "d_bias")),
    ]


def forward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, lse: bool):
    """Output and, if asked for, log-sum-exp, both float32. Shapes as in `attend`."""
    q, lanes = ready(q), library().vision_attn_lanes()
    given = dict(out=q.new_empty(*q.shape[:-1], problem.value_dim), lse=q.new_empty(q.shape[:-1]) if lse else None)
    if lines.chosen(problem, lanes):
        k, v = ready(k), ready(v)  # what the form points to stays until the call is over
        form = lines.plan(problem.pattern, problem.grid, lanes).structure(k, v)
        _call("forward_lines", form, problem, scale, q, bias=bias, **given)
        return given["out"], given["lse"]
    kind, plan = _plan(problem, lanes)
    if kind == "blocks" and not problem.extra and plan.few(lanes, problem.value_dim):
        q, k, v = (ready(t.flatten(1, -3)) for t in (q, k, v))
        form = blocks.FewBlocks(plan.structure, lines.Rows.of(k), lines.Rows.of(v))
        _call("forward_few", form, dataclasses.replace(problem, grid=(problem.tokens,)), scale, q, **given)
    else:
        keys, values = _packed(k, v, extra_kv)
        given |= dict(visible=extra_mask, bias=bias, keys=keys, values=values)
        _call(f"forward_{kind}", plan.structure, problem, scale, q, **given)
    return given["out"], given["lse"]


def backward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, d_out, d_lse) -> list:
    """Gradients of q, k, v, the extra keys and values, and the bias (None without), float32.

    `out` and `lse` are those of `forward`; `d_lse` may be None.
    """
    like, keys, values = ready(q), *_packed(k, v, extra_kv)
    d_q, d_keys, d_values = out.new_empty(q.shape), torch.zeros_like(keys), torch.zeros_like(values)
    outer = dict(d_out=d_out.float().contiguous(), d_lse=None if d_lse is None else d_lse.float().contiguous())
    d_bias = None if bias is None else out.new_zeros(bias.shape)
    kept = dict(keys=keys, values=values, out=out, lse=lse, bias=bias, d_bias=d_bias)
    kept |= dict(visible=extra_mask, d_q=d_q, d_keys=d_keys, d_values=d_values)
    kind, plan = _plan(problem, library().vision_attn_lanes())
    _call(f"backward_{kind}", plan.structure, problem, scale, like, **kept, **outer)
    tokens = problem.tokens
    by_grid = [
        d[:, :, :tokens, : t.shape[-1]].transpose(1, 2).reshape(t.shape) for d, t in ((d_keys, k), (d_values, v))
    ]
    by_extra = [None, None]
    if extra_kv is not None:
        pairs = zip((d_keys, d_values), extra_kv, strict=True)
        by_extra = [d[:, :, tokens:, : t.shape[-1]].transpose(1, 2) for d, t in pairs]
    return [d_q, *by_grid, *by_extra, d_bias]


def ready(q: torch.Tensor) -> torch.Tensor:
    q = q.float().resolve_neg()
    return q if q.stride(-1) == 1 else q.contiguous()


def _packed(k, v, extra_kv) -> list[torch.Tensor]:
    """Keys and values as float32 `[batch, heads, tokens + extra, step]`: one head after the other keeps the caches of a
    processor busy with what it needs, and rows are rounded up to whole vectors. Good until the next call."""
    lanes, extra = library().vision_attn_lanes(), 0 if extra_kv is None else extra_kv[0].shape[1]
    k, v = (t.flatten(1, -3).transpose(1, 2) for t in (k, v))
    shapes = [(*t.shape[:2], t.shape[2] + extra, -(-t.shape[3] // lanes) * lanes) for t in (k, v)]
    parts = _room(sum(map(math.prod, shapes))).split(list(map(math.prod, shapes)))
    packed = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    for rows, tensor, more in zip(packed, (k, v), extra_kv or (None, None), strict=True):
        tokens, dim = tensor.shape[2:]
        rows[:, :, :tokens, :dim] = tensor
        if more is not None:
            rows[:, :, tokens:, :dim] = more.transpose(1, 2)
        rows[..., dim:] = 0
    return packed


@torch.inference_mode(False)  # kept for calls that have gradients
def _room(count: int) -> torch.Tensor:
    options = dict(dtype=torch.float32, device="cpu")  # whatever the defaults are
    if 4 * count > KEPT_BYTES:
        return torch.empty(count, **options)
    if getattr(_kept, "room", None) is None or len(_kept.room) < count:
        _kept.room = torch.empty(count, **options)
    return _kept.room[:count]


def direct(tensors: list[torch.Tensor]) -> bool:
    """Whether tensors can go to the kernel past torch: plain ones on the CPU, whose gradients nobody needs, and nobody
    looks on (a compiler, a trace, a transform or a mode would not see what is done); and whether there is a kernel."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not all(type(t) in PLAIN and t.is_cpu and t.dtype in DTYPES for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and load()


def _plan(problem: Problem, lanes: int) -> tuple[str, boxes.Plan | blocks.Plan]:
    """Which of the two forms that can do everything, and the lists it needs."""
    if isinstance(problem.pattern, Separable):
        return "boxes", boxes.plan(problem.pattern, problem.grid, problem.heads // problem.kv_heads, lanes)
    return "blocks", blocks.plan(problem.pattern, problem.grid, lanes)


def _call(name: str, form: ctypes.Structure, problem: Problem, scale: float, q: torch.Tensor, **tensors) -> None:
    """`form`: what the function takes besides the call; `tensors`: fields of the call, None where there are none."""
    lib, lanes = library(), library().vision_attn_lanes()
    if tensors.get("visible") is not None:
        tensors["visible"] = tensors["visible"].contiguous()
    pad, relative = 3 - len(problem.grid), {}
    if tensors.get("bias") is not None:
        tensors["bias"] = tensors["bias"].float().contiguous()
        tensors["place"], relative = boxes.places(problem.pattern, problem.grid)
    call = Call(
        problem.batch, problem.kv_heads, problem.heads // problem.kv_heads, torch.get_num_threads(),
        (1,) * pad + problem.grid, problem.extra, problem.head_dim, problem.value_dim,
        *(-(-d // lanes) * lanes for d in (problem.head_dim, problem.value_dim)), scale, lines.Rows.of(q), **relative,
        **{n: t.data_ptr() for n, t in tensors.items() if t is not None},
    )  # fmt: skip
    if getattr(lib, f"vision_attn_{name}")(ctypes.byref(call), ctypes.byref(form)):
        raise MemoryError("the CPU kernel ran out of memory")
