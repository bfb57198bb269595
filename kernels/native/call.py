"""Calls of the CPU kernel: from tensors to the structures of call.h."""

from __future__ import annotations

import ctypes
import math
import threading

import torch

from ..patterns import Separable
from ..problem import Problem
from . import blocks, boxes, lines
from .build import library

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
    q = _ready(q)
    out = q.new_empty(*q.shape[:-1], problem.value_dim)
    sums = q.new_empty(q.shape[:-1]) if lse else None
    if lines.chosen(problem, library().vision_attn_lanes()):
        _call("forward", problem, scale, None, q, of_lines=(_ready(k), _ready(v)), out=out, lse=sums, bias=bias)
    else:
        keys, values = _packed(k, v, extra_kv)
        _call("forward", problem, scale, extra_mask, q, keys=keys, values=values, out=out, lse=sums, bias=bias)
    return out, sums


def backward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, d_out, d_lse) -> list:
    """Gradients of q, k, v, the extra keys and values, and the bias (None without), float32.

    `out` and `lse` are those of `forward`; `d_lse` may be None.
    """
    like, keys, values = _ready(q), *_packed(k, v, extra_kv)
    d_q, d_keys, d_values = torch.empty(q.shape), torch.zeros_like(keys), torch.zeros_like(values)
    outer = dict(d_out=d_out.float().contiguous(), d_lse=None if d_lse is None else d_lse.float().contiguous())
    d_bias = None if bias is None else torch.zeros(bias.shape)
    kept = dict(keys=keys, values=values, out=out, lse=lse, bias=bias, d_bias=d_bias)
    _call("backward", problem, scale, extra_mask, like, **kept, **outer, d_q=d_q, d_keys=d_keys, d_values=d_values)
    tokens = problem.tokens
    by_grid = [
        d[:, :, :tokens, : t.shape[-1]].transpose(1, 2).reshape(t.shape) for d, t in ((d_keys, k), (d_values, v))
    ]
    by_extra = [None, None]
    if extra_kv is not None:
        pairs = zip((d_keys, d_values), extra_kv, strict=True)
        by_extra = [d[:, :, tokens:, : t.shape[-1]].transpose(1, 2) for d, t in pairs]
    return [d_q, *by_grid, *by_extra, d_bias]


def _ready(q: torch.Tensor) -> torch.Tensor:
    q = q.float()
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


def _room(count: int) -> torch.Tensor:
    if 4 * count > KEPT_BYTES:
        return torch.empty(count)
    if getattr(_kept, "room", None) is None or len(_kept.room) < count:
        _kept.room = torch.empty(count)
    return _kept.room[:count]


def _call(name: str, problem: Problem, scale: float, extra_mask, q, of_lines=None, **tensors) -> None:
    """`of_lines`: keys and values as they are, for the form that reads them so."""
    lib, lanes = library(), library().vision_attn_lanes()
    tensors["visible"] = None if extra_mask is None else extra_mask.contiguous()
    group, pad = problem.heads // problem.kv_heads, 3 - len(problem.grid)
    relative = {}
    if tensors.get("bias") is not None:
        tensors["bias"] = tensors["bias"].float().contiguous()
        tensors["place"], relative = boxes.places(problem.pattern, problem.grid)
    call = Call(
        problem.batch, problem.kv_heads, group, torch.get_num_threads(), (1,) * pad + problem.grid, problem.extra,
        problem.head_dim, problem.value_dim, *(-(-d // lanes) * lanes for d in (problem.head_dim, problem.value_dim)),
        scale, lines.Rows.of(q), **relative,
        **{n: t.data_ptr() for n, t in tensors.items() if t is not None},
    )  # fmt: skip
    if of_lines:
        kind, plan = "lines", lines.plan(problem.pattern, problem.grid, lanes)
    elif isinstance(problem.pattern, Separable):
        kind, plan = "boxes", boxes.plan(problem.pattern, problem.grid, group, lanes)
    else:
        kind, plan = "blocks", blocks.plan(problem.pattern, problem.grid, lanes)
    structure = plan.structure(*of_lines) if of_lines else plan.structure
    if getattr(lib, f"vision_attn_{name}_{kind}")(ctypes.byref(call), ctypes.byref(structure)):
        raise MemoryError("the CPU kernel ran out of memory")
