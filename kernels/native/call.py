"""Calls of the CPU kernel: from tensors to the structures of call.h."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from ..problem import Problem
from .boxes import plan
from .build import library


class Rows(ctypes.Structure):
    """As in call.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch", "head")] + [("axis", ctypes.c_int64 * 3)]


class Call(ctypes.Structure):
    """As in call.h."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("batch", "kv_heads", "group", "head_dim", "value_dim", "extra", "threads")),
        ("scale", ctypes.c_float),
        *((n, Rows) for n in ("q", "k", "v", "out", "lse", "extra_key", "extra_value")),
        ("visible", ctypes.c_void_p),
    ]


def _rows(tensor: torch.Tensor | None, tail: int = 1) -> Rows:
    """Strides of `[batch, *grid, heads, dim]`; with `tail` 0 of `[batch, *grid, heads]`."""
    if tensor is None:
        return Rows()
    stride = tensor.stride()
    inner = stride[1 : len(stride) - 1 - tail]
    return Rows(tensor.data_ptr(), stride[0], stride[-1 - tail], (0,) * (3 - len(inner)) + inner)


def _ready(tensor: torch.Tensor, multiple: int = 1) -> torch.Tensor:
    """float32, the last dimension contiguous and padded to a multiple."""
    tensor = tensor.float()
    if tensor.shape[-1] % multiple:
        return F.pad(tensor, (0, -tensor.shape[-1] % multiple))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(problem: Problem, q, k, v, scale, extra_kv, extra_mask):
    lib = library()
    lanes = lib.vision_attn_lanes()
    q, k, v = _ready(q), _ready(k), _ready(v, lanes)
    value_dim = v.shape[-1]
    out = q.new_empty(*q.shape[:-1], value_dim)
    lse = q.new_empty(q.shape[:-1]) if problem.return_lse else None
    extra_key = extra_value = None
    if extra_kv is not None:
        extra_key, extra_value = _ready(extra_kv[0]), _ready(extra_kv[1], lanes)
    visible = None if extra_mask is None else extra_mask.contiguous()
    group = problem.heads // problem.kv_heads
    extra_rows = [Rows() if t is None else Rows(t.data_ptr(), t.stride(0), t.stride(2), (t.stride(1), 0, 0))
                  for t in (extra_key, extra_value)]
    args = Call(
        problem.batch, problem.kv_heads, group, problem.head_dim, value_dim, problem.extra, torch.get_num_threads(),
        scale, _rows(q), _rows(k), _rows(v), _rows(out), _rows(lse, 0), *extra_rows,
        None if visible is None else visible.data_ptr(),
    )
    boxes = plan(problem.pattern, problem.grid, group, lanes).boxes
    if lib.vision_attn_forward_boxes(ctypes.byref(args), ctypes.byref(boxes)):
        raise MemoryError("the CPU kernel ran out of memory")
    out = out[..., : problem.value_dim].to(problem.dtype)
    return out, lse
