"""Softmax attention over all tokens, for the layers that differ from it in what they do before and after."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor


@register_notrace_function
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fused: bool,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of q, k, v `[batch, heads, tokens, head_dim]` (heads first, as in torch).

    Args:
        fused: leave it to `scaled_dot_product_attention`; otherwise the same, step by step.
        dropout: fraction of weights dropped; 0 outside of training.
        mask: broadcasts against `[batch, heads, tokens, tokens]`; bool, True where the key is seen, or added to scores.
        scale: factor on the scores, `head_dim ** -0.5` when None.

    >>> q = torch.randn(1, 2, 5, 8)
    >>> torch.allclose(softmax_attention(q, q, q, True), softmax_attention(q, q, q, False), atol=1e-5)
    True
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if not mask.is_floating_point() else scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ v


def split_heads(x: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """`[batch, tokens, parts * dim]` to `parts` tensors `[batch, heads, tokens, head_dim]`."""
    x = x.unflatten(-1, (parts, num_heads, -1))
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def check_heads(dim: int, num_heads: int) -> None:
    """`num_heads` must divide `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim {dim} cannot be cut into {num_heads} heads of equal size; choose a divisor of it")
