"""One attention call described without its data: what backends are asked about."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from .patterns import BlockList, Pattern, PerHead

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options of a call to `attend`.

    `device` is a device type such as "cpu"; `extra` counts extra KV tokens; `in_graph` says that it is part of a
    compiled graph.
    """

    pattern: Pattern
    grid: tuple[int, ...]
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    extra: int = 0
    extra_mask: bool = False
    bias: bool = False
    return_lse: bool = False
    needs_grad: bool = False
    in_graph: bool = False

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None,
    extra_kv: tuple[torch.Tensor, torch.Tensor] | None,
    extra_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    return_lse: bool,
) -> Problem:
    """Check the arguments of `attend` and describe them. Raises TypeError and ValueError with what was got and what is
    allowed."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as Neighborhood(window=7) or Dense(); got {pattern!r}")
    tensors = {"q": q, "k": k, "v": v}
    if extra_kv is not None:
        if not isinstance(extra_kv, (tuple, list)) or len(extra_kv) != 2:
            raise TypeError("extra_kv must be a pair (keys, values); give both, or None")
        tensors |= {"extra keys": extra_kv[0], "extra values": extra_kv[1]}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {_short(tensor.dtype)}; allowed: {', '.join(map(_short, DTYPES))}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {_short(tensor.dtype)} but q is {_short(q.dtype)}; cast them to one dtype")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}; move them to one device")
    if not 4 <= q.ndim <= 6:
        raise ValueError(
            f"q must be [batch, *grid, heads, head_dim] with 1 to 3 grid axes; got {q.ndim} dimensions, {_shape(q)}"
        )
    batch, grid, heads, head_dim = q.shape[0], tuple(q.shape[1:-2]), q.shape[-2], q.shape[-1]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != q.ndim:
            raise ValueError(
                f"{name} has {tensor.ndim} dimensions but q has {q.ndim}: q is {_shape(q)}, {name} is {_shape(tensor)}"
            )
        if tensor.shape[0] != batch:
            raise ValueError(f"batch differs: q has {batch}, {name} has {tensor.shape[0]}")
        if tuple(tensor.shape[1:-2]) != grid:
            raise ValueError(f"{name} must lie on the grid of q, {grid}; got {tuple(tensor.shape[1:-2])}")
    kv_heads, value_dim = k.shape[-2], v.shape[-1]
    if v.shape[-2] != kv_heads:
        raise ValueError(f"k has {kv_heads} heads but v has {v.shape[-2]}; they must be equal")
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; the heads of q must be a multiple of those of k")
    if k.shape[-1] != head_dim:
        raise ValueError(f"head_dim differs: q has {head_dim}, k has {k.shape[-1]}")
    if not head_dim or not value_dim:
        raise ValueError(f"head_dim must be at least 1; q has {head_dim}, v has {value_dim}")
    extra = 0
    if extra_kv is not None:
        extra = extra_kv[0].shape[1] if extra_kv[0].ndim > 1 else 0
        for name, tensor, dim in (("keys", extra_kv[0], head_dim), ("values", extra_kv[1], value_dim)):
            if tuple(tensor.shape) != (batch, extra, kv_heads, dim):
                want = f"[{batch}, extra, {kv_heads}, {dim}]"
                raise ValueError(
                    f"extra {name} must be {want}, the same number of extra tokens in both; got {_shape(tensor)}"
                )
    if extra_mask is not None:
        if extra_kv is None:
            raise ValueError("extra_mask without extra_kv; give the extra keys and values it masks")
        if not isinstance(extra_mask, torch.Tensor) or extra_mask.dtype != torch.bool:
            raise TypeError("extra_mask must be a bool tensor, True where the extra token is visible")
        if tuple(extra_mask.shape) != (batch, extra):
            raise ValueError(f"extra_mask must be [batch, extra] = {[batch, extra]}; got {_shape(extra_mask)}")
        if extra_mask.device != q.device:
            raise ValueError(f"extra_mask is on {extra_mask.device} but q is on {q.device}; move it there")
    check_scale(scale)
    pattern.check(grid)
    check_lead(pattern, batch, heads)
    if bias is not None:
        check_bias(pattern, grid, heads, tuple(bias.shape))
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    return Problem(
        pattern, grid, batch, heads, kv_heads, head_dim, value_dim, q.dtype, q.device.type,
        extra, extra_mask is not None, bias is not None, bool(return_lse), needs_grad,
    )  # fmt: skip


def check_lead(pattern: Pattern, batch: int, heads: int) -> None:
    lead = tuple(pattern.index.shape[:-2]) if isinstance(pattern, BlockList) else ()
    for have, want, what in zip(reversed(lead), (heads, batch), ("heads of q", "batch"), strict=False):
        if have not in (1, want):
            raise ValueError(f"BlockList has lists for {have} {what}, but there are {want}; allowed: 1 or {want}")


def check_bias(pattern: Pattern, grid: tuple[int, ...], heads: int, shape: tuple[int, ...] | None = None) -> None:
    want = pattern.bias_shape(grid, heads)
    if want is None:
        raise ValueError(f"{type(pattern).__name__} takes no bias; Neighborhood, Window and BlockList do")
    if shape not in (None, want):
        raise ValueError(f"bias must be {list(want)} for {type(pattern).__name__} on this grid; got {list(shape)}")


def check_heads(pattern: PerHead, heads: int, kv_heads: int, bias: bool) -> None:
    if heads != pattern.heads:
        raise ValueError(f"PerHead has patterns for {pattern.heads} heads, but q has {heads}")
    if any(count % (heads // kv_heads) for count, _ in pattern.parts):
        raise ValueError(
            f"PerHead counts {[count for count, _ in pattern.parts]} must be multiples of the {heads // kv_heads} "
            "query heads that share a KV head; repeat the KV heads to split finer"
        )
    if bias:
        raise ValueError("PerHead takes no bias; call attend for each part")


def resolve_scale(problem: Problem, scale: float | None) -> float:
    return problem.head_dim**-0.5 if scale is None else float(scale)


def check_scale(scale: Any) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number above 0, or None for head_dim ** -0.5; got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, or None for head_dim ** -0.5; got {scale!r}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
