"""The door from layers to the kernels: one leaf that tracers do not look into."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function

from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns import Pattern

__all__ = ["grid_attention"]


@register_notrace_function
def grid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    extra_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    extra_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` as one node of an fx graph; arguments and result are those of `vision_attn.attend`.

    TorchScript cannot call it: keep it behind `if self.fused_attn and not torch.jit.is_scripting()`.

    >>> from vision_attn import Neighborhood
    >>> q = torch.randn(1, 14, 14, 2, 16)
    >>> grid_attention(q, q, q, Neighborhood(window=7)).shape
    torch.Size([1, 14, 14, 2, 16])
    """
    return attend(q, k, v, pattern, scale=scale, bias=bias, extra_kv=extra_kv, extra_mask=extra_mask)
