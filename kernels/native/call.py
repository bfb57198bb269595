"""Calls of the CPU kernel: from tensors to the structures of call.h."""

from __future__ import annotations

import ctypes

import torch

from ..problem import Problem
from .boxes import plan
from .build import library


class Call(ctypes.Structure):
    """As in call.h."""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("batch", "kv_heads", "group", "threads")),
        ("grid", ctypes.c_int32 * 3),
        *((n, ctypes.c_int32) for n in ("extra", "key", "value", "key_step", "value_step")),
        ("scale", ctypes.c_float),
        ("q", ctypes.c_void_p),
        ("q_batch", ctypes.c_int64),
        ("q_axis", ctypes.c_int64 * 3),
        ("q_head", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("keys", "values", "visible", "out", "lse")),
    ]


def _pack(tensor: torch.Tensor, extra: torch.Tensor | None, lanes: int) -> torch.Tensor:
    """`[batch, *grid, heads, dim]` and `[batch, extra, heads, dim]` to float32 `[batch, heads, tokens + extra, step]`."""
    tensor, dim = tensor.flatten(1, -3), tensor.shape[-1]
    tokens, more = tensor.shape[1], 0 if extra is None else extra.shape[1]
    step = -(-dim // lanes) * lanes
    make = torch.empty if step == dim else torch.zeros
    packed = make(tensor.shape[0], tensor.shape[2], tokens + more, step)
    packed[:, :, :tokens, :dim] = tensor.transpose(1, 2)
    if extra is not None:
        packed[:, :, tokens:, :dim] = extra.transpose(1, 2)
    return packed


def forward(problem: Problem, q, k, v, scale, extra_kv, extra_mask):
    lib = library()
    lanes = lib.vision_attn_lanes()
    q = q.float()
    q = q if q.stride(-1) == 1 else q.contiguous()
    extra_key, extra_value = extra_kv or (None, None)
    key, value = _pack(k, extra_key, lanes), _pack(v, extra_value, lanes)
    out = q.new_empty(*q.shape[:-1], problem.value_dim)
    lse = q.new_empty(q.shape[:-1]) if problem.return_lse else None
    visible = None if extra_mask is None else extra_mask.contiguous()
    group = problem.heads // problem.kv_heads
    pad = (0,) * (3 - len(problem.grid))
    stride = q.stride()
    args = Call(
        problem.batch, problem.kv_heads, group, torch.get_num_threads(),
        (*(1 for _ in pad), *problem.grid), problem.extra,
        problem.head_dim, problem.value_dim, key.shape[-1], value.shape[-1], scale,
        q.data_ptr(), stride[0], pad + stride[1:-2], stride[-2],
        *(None if t is None else t.data_ptr() for t in (key, value, visible, out, lse)),
    )  # fmt: skip
    boxes = plan(problem.pattern, problem.grid, group, lanes).boxes
    if lib.vision_attn_forward_boxes(ctypes.byref(args), ctypes.byref(boxes)):
        raise MemoryError("the CPU kernel ran out of memory")
    return out.to(problem.dtype), lse
