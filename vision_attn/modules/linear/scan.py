"""Gated linear attention: scans over the tokens that forget by gates, forwards and backwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vision_attn.kernels.linear import gated_scan_both

__all__ = ["gla"]

CHUNK = 32  # tokens that are paired directly


@register_notrace_function
def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_decay_back: torch.Tensor,
    fused: bool = True,
) -> torch.Tensor:
    """Mean of `head_dim ** -0.5 q_t h_t` over both directions, with `h_t = exp(log_decay_t) h_(t-1) + k_t v_t^T`.

    All are `[batch, *grid, heads, head_dim]`; the tokens of a grid are scanned row-major, and sums are float32 at
    least. With `fused=False` token by token. Paper: ViG: Linear-complexity Visual Sequence Learning with Gated Linear
    Attention.
    """
    mild = bool(torch.minimum(log_decay.amin(), log_decay_back.amin()) > -2)
    if fused and not mild and not torch.jit.is_scripting():
        return gated_scan_both(q, k, v, log_decay.to(q.dtype), log_decay_back.to(q.dtype))
    ahead = [_flat(x) for x in (q, k, v, log_decay)]
    q2, k2, v2 = ahead[0] * (0.5 * q.shape[-1] ** -0.5), ahead[1], ahead[2]
    q2, k2, v2 = torch.cat([q2, q2.flip(1)]), torch.cat([k2, k2.flip(1)]), torch.cat([v2, v2.flip(1)])
    decay = torch.cat([ahead[3], _flat(log_decay_back).flip(1)])
    if not (fused and mild):
        out = _token_by_token(q2, k2, v2, decay)
    elif torch.jit.is_scripting():
        out = _in_chunks(q2, k2, v2, decay, 32)
    else:
        with torch.autocast(q.device.type, enabled=False):
            out = _in_chunks(q2, k2, v2, decay, CHUNK)
    there, back = out.chunk(2)
    return (there + back.flip(1)).reshape(v.shape).to(v.dtype)


def _flat(x: torch.Tensor) -> torch.Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x.flatten(1, -3)


def _token_by_token(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """One scan, `[batch, tokens, heads, dim]`."""
    state = torch.zeros_like(k[:, 0]).unsqueeze(-1) * v[:, 0].unsqueeze(-2)
    out, gate = torch.empty_like(v), log_decay.exp()
    for t in range(q.shape[1]):
        state = gate[:, t].unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out[:, t] = (q[:, t].unsqueeze(-1) * state).sum(-2)
    return out


def _in_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, size: int) -> torch.Tensor:
    """One scan, `[batch, tokens, heads, dim]`, whose gates are above exp(-2).

    Then what is left of a chunk's first key at its end is at least exp(-2 * size), which float32 can divide by: queries
    times their gates since the start of the chunk meet keys divided by theirs.
    """
    tokens = q.shape[1]
    q, k, v, log_decay = [F.pad(x, [0, 0, 0, 0, 0, -tokens % size]) for x in (q, k, v, log_decay)]
    state = torch.zeros_like(k[:, 0]).unsqueeze(-1) * v[:, 0].unsqueeze(-2)
    outs = []
    step = 32 * size  # few enough to stay in the cache
    for start in range(0, tokens, step):
        parts = [
            x[:, start : start + step].unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous()
            for x in (q, k, v, log_decay)
        ]  # [batch, heads, chunks, size, dim]
        gates = parts[3].cumsum(3).exp()
        query, key, value = parts[0] * gates, parts[1] / gates, parts[2]
        kept = gates[:, :, :, -1:]
        added = (key * kept).transpose(-1, -2) @ value
        kept = kept.transpose(-1, -2)
        states = []
        for t in range(added.shape[2]):
            states.append(state)
            state = torch.addcmul(added[:, :, t], kept[:, :, t], state)
        out = (query @ key.transpose(-1, -2)).tril() @ value + query @ torch.stack(states, 2)
        outs.append(out.permute(0, 2, 3, 1, 4).flatten(1, 2))
    return torch.cat(outs, 1)[:, :tokens]
