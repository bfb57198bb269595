"""Attention of some rows, recomputed from queries and keys."""

from __future__ import annotations

import torch

from vision_attn.mllm.tokens import take


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
    grouped = picked.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgrd,bknd->bkgrn", grouped, k.float()).flatten(1, 2) * scale
    seen = visible(q, k, mask, rows, real)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()


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
