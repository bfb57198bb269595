"""Attention weights of a few rows, where attention is computed, without those of the others."""

from __future__ import annotations

from typing import Any

import torch

from vision_attn.mllm.tokens import take


def row_weights(
    module: Any, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, rows: torch.Tensor
) -> torch.Tensor:
    """Weights that some rows of a prompt give, float32 `[batch, heads, rows, n]`.

    Args:
        module: the attention module.
        q, k: `[batch, heads, n, head_dim]` and `[batch, kv_heads, n, head_dim]`, as attention functions get them.
        mask: as attention functions get it.
        rows: long `[batch, rows]`.
    """
    at = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    own = q.gather(2, at).float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgrd,bknd->bkgrn", own, k.float()).flatten(1, 2) * scale
    return scores.masked_fill(~seen(module, mask, rows, k.shape[2]), -torch.inf).softmax(-1).nan_to_num()


def seen(module: Any, mask: torch.Tensor | None, rows: torch.Tensor, n: int) -> torch.Tensor:
    """What rows (long `[batch, rows]`) of a prompt of `n` tokens see, bool `[batch, 1 or heads, rows, n]`."""
    if mask is not None and mask.ndim == 4:
        some = take(mask[..., :n].expand(len(rows), -1, -1, -1), rows, 2)
        return some if some.dtype == torch.bool else some > torch.finfo(some.dtype).min / 2
    place = torch.arange(n, device=rows.device)
    causal = getattr(module, "is_causal", True)
    found = (place <= rows[..., None])[:, None] if causal else rows.new_ones(*rows.shape, n).bool()[:, None]
    return found if mask is None else found & mask[:, None, None, :n].bool()
