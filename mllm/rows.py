"""Attention of some rows, recomputed from queries and keys."""

from __future__ import annotations

from typing import Any

import torch

from vision_attn.mllm.tokens import take


def row_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 `[batch, heads, rows, keys]`, without repeating the keys of grouped heads."""
    batch, heads, rows, width = q.shape
    q, k = q.reshape(batch * k.shape[1], -1, width), k.flatten(0, 1)
    if q.dtype != torch.float32:
        q, k = q.float(), k.float()
    return torch.bmm(q * scale, k.mT).view(batch, heads, rows, -1)


def row_values(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, rows, head_dim]` in the type of the values, from float32 weights `[batch, heads, rows, keys]`."""
    batch, heads, rows, keys = w.shape
    w = w.reshape(batch * v.shape[1], -1, keys)
    return torch.bmm(w if w.dtype == v.dtype else w.to(v.dtype), v.flatten(0, 1)).view(batch, heads, rows, -1)


def hide(s: torch.Tensor, mask: Any, queries: int) -> torch.Tensor:
    """Scores `[batch, heads, rows, keys]` of the last rows of so many queries, with the mask that attention gets.

    No mask means causal while a prompt is read, where a static cache has more keys than there are queries, and that all
    is seen by a single query.
    """
    count, keys = s.shape[2:]
    if mask is None or mask.ndim == 2:
        if queries > 1:
            place = torch.arange(keys, device=s.device)
            s = s.masked_fill(place > place[queries - count : queries, None], -torch.inf)
        return s if mask is None else s.masked_fill(~mask[:, None, None, :keys].bool(), -torch.inf)
    mask = mask[:, :, queries - count : queries, :keys]
    return s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask


def row_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    rows: slice | torch.Tensor,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights after the softmax, float32 `[batch, heads, rows, keys]`; rows that see nothing are 0.

    Args:
        q: `[batch, heads, queries, head_dim]`; k: `[batch, kv_heads, keys, head_dim]`, not repeated.
        mask: as an attention function gets it: bool (True is seen) or additive `[batch, 1 or heads, queries, keys]`, or
            None: causal where there are several queries, and all is seen by a single one.
        scale: of the scores.
        rows: which of the queries; long `[batch, rows]` where that differs, and queries and keys are the same tokens.
        real: bool `[batch, queries]` where queries and keys are the same tokens: what is no padding.
    """
    picked = q[:, :, rows] if isinstance(rows, slice) else take(q, rows, 2)
    seen = visible(q, k, mask, rows, real)
    return row_scores(picked, k, scale).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()


def visible(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    rows: slice | torch.Tensor,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys some rows see, bool that broadcasts to `[batch, heads, rows, keys]`; arguments of `row_weights`."""
    queries, keys = q.shape[2], k.shape[2]
    place = torch.arange(keys, device=k.device)
    if isinstance(rows, slice):
        last = (place[:queries] if queries > 1 else place[-1:])[rows][None]
    else:
        last = rows
    if mask is None:
        seen = (place <= last[..., None])[:, None]
    else:
        seen = mask[:, :, rows] if isinstance(rows, slice) else take(mask, rows, 2)
        seen = seen[..., :keys]
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    if real is None:
        return seen
    own = real[:, rows] if isinstance(rows, slice) else real.gather(1, rows)
    return seen & real[:, None, None, :] & own[:, None, :, None]
