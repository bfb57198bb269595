"""Windows whose keys and values are read between the tokens of a map, on the CPU kernel."""

from __future__ import annotations

import ctypes

import torch

from .build import library
from .call import direct, ready
from .lines import Rows

LEAST = 4096  # queries in all heads: for fewer nobody should have to wait for a compiler


class Sampled(ctypes.Structure):
    """As in sampled.h."""

    _fields_ = [
        *((n, Rows) for n in ("q", "key", "value")),
        *((n, ctypes.c_void_p) for n in ("points", "bias")),
        ("biases", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        *(
            (n, ctypes.c_int64)
            for n in ("batch", "heads", "height", "width", "size", "key_dim", "value_dim", "threads")
        ),
        ("scale", ctypes.c_float),
    ]


def sampled_windows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, points: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    """Attention of every window of a map to keys and values at points of its own, bilinear, zero outside of the map.

    None where it is not computed here: off the CPU, in float64, where a gradient is needed, for few queries, where
    sizes do not fit together, where somebody looks on, and without a kernel (`build.missing` says why).

    Args:
        q: `[batch, height, width, heads, head_dim]`, whole windows.
        k: as q. v: as q, of `value_dim`.
        points: `[2, batch, windows, heads, tokens]`: x and y in tokens of the map; windows and tokens row by row.
        bias: `[batch * windows or 1, heads, tokens, tokens]`, added to scaled scores.
        scale: factor on the scores.

    Returns:
        `[batch, height, width, heads, value_dim]` in the dtype of q.
    """
    tensors = [t for t in (q, k, v, points, bias) if t is not None]
    if q.shape[:-1].numel() < LEAST or not _fit(q, k, v, points, bias) or not direct(tensors):
        return None
    maps = [ready(t) for t in (q, k, v)]
    points, bias = points.float().contiguous(), None if bias is None else bias.float().contiguous()
    out = q.new_empty(v.shape, dtype=torch.float32)
    batch, height, width, heads, dim = q.shape
    call = Sampled(
        *map(Rows.of, maps), points.data_ptr(), None if bias is None else bias.data_ptr(),
        bias is not None and len(bias) == 1, out.data_ptr(), batch, heads, height, width,
        round(points.shape[-1] ** 0.5), dim, v.shape[-1], torch.get_num_threads(), scale,
    )  # fmt: skip
    if library().vision_attn_forward_sampled(ctypes.byref(call)):
        raise MemoryError("the CPU kernel ran out of memory")
    return out.to(q.dtype)


def _fit(q, k, v, points, bias) -> bool:
    """Whether sizes fit together; where they do not, the form in torch says why."""
    batch, height, width, heads = q.shape[:-1]
    size = round(points.shape[-1] ** 0.5)
    windows = height // size * (width // size)
    if size**2 != points.shape[-1] or windows * size**2 != height * width:
        return False
    if points.shape[:-1] != (2, batch, windows, heads) or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        return False
    return bias is None or bias.shape in ((n, heads, size**2, size**2) for n in (1, batch * windows))
