"""Gated scans on the CPU kernel: when they are computed there, and the call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .build import library
from .call import direct, ready

LEAST = 256  # queries in all batch entries and heads: fewer take torch no time


class Scan(ctypes.Structure):
    """As in call.h."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "tokens", "heads", "key", "value", "threads")),
        *((n, ctypes.c_int64 * 4) for n in ("q", "k", "v", "ahead", "back")),
        ("out", ctypes.c_void_p),
        *((n, ctypes.c_float) for n in ("scale", "root")),
    ]


def scan(
    q: Tensor, k: Tensor, v: Tensor, ahead: Tensor | None, back: Tensor | None, scale: float, root: float = 0.0
) -> Tensor | None:
    """Sum of `gated_scan` forwards with the gates `ahead` and backwards with `back`, one of which may be None; float32.

    Gates are given as logarithms, or with a root r as what gives them as `sigmoid(ahead) ** (1 / r)`. None where it is
    not computed here, for reasons that the tensors have, or because there is no kernel (`build.missing` says why).
    """
    inputs = [q, k, v] + [gates for gates in (ahead, back) if gates is not None]
    if q.shape[:-1].numel() < LEAST or not _fit(inputs) or not direct(inputs):
        return None
    inputs = [ready(t.flatten(1, -3)) for t in inputs]
    rows = [(t.data_ptr(), *t.stride()[:3]) for t in inputs]
    if ahead is None or back is None:
        rows.insert(3 if ahead is None else 4, (0, 0, 0, 0))
    out = v.new_empty(v.shape, dtype=torch.float32)
    call = Scan(*inputs[0].shape, v.shape[-1], torch.get_num_threads(), *rows, out.data_ptr(), scale, root)
    if library().vision_attn_scan(ctypes.byref(call)):
        raise MemoryError("the CPU kernel ran out of memory")
    return out


def _fit(tensors: list[Tensor]) -> bool:
    """Whether sizes fit together; where they do not, the form in torch says why."""
    q = tensors[0]
    for i, t in enumerate(tensors):
        if t.shape[:-1] != q.shape[:-1] or (i != 2 and t.shape[-1] != q.shape[-1]):
            return False
    return q.shape[-1] > 0
