"""Gated linear attention: scans over the tokens that forget by gates, forwards and backwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vision_attn.kernels.linear import gated_scan_both
from vision_attn.kernels.native.scan import scan

__all__ = ["gla", "gla_of_logits"]


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

    All are `[batch, *grid, heads, head_dim]`, the logarithms at most 0; the tokens of a grid are scanned row-major, and
    sums are float32 at least. With `fused=False` token by token. Paper: ViG: Linear-complexity Visual Sequence Learning
    with Gated Linear Attention.
    """
    if fused and not torch.jit.is_scripting():
        found = scan(q, k, v, log_decay, log_decay_back, 0.5 * q.shape[-1] ** -0.5)
        if found is not None:
            return found.to(v.dtype)
    mild = bool((log_decay > -1).all() & (log_decay_back > -1).all())
    if fused and not mild and not torch.jit.is_scripting():
        return gated_scan_both(q, k, v, log_decay.to(q.dtype), log_decay_back.to(q.dtype))
    q2, k2, v2 = _flat(q) * (0.5 * q.shape[-1] ** -0.5), _flat(k), _flat(v)
    ahead, back = _flat(log_decay), _flat(log_decay_back)
    if not (fused and mild):
        q2, k2, v2 = torch.cat([q2, q2.flip(1)]), torch.cat([k2, k2.flip(1)]), torch.cat([v2, v2.flip(1)])
        there, here = _token_by_token(q2, k2, v2, torch.cat([ahead, back.flip(1)])).chunk(2)
        out = there + here.flip(1)
    elif torch.jit.is_scripting():
        out = _in_chunks(q2, k2, v2, ahead, back)
    else:
        with torch.autocast(q.device.type, enabled=False):
            out = _in_chunks(q2, k2, v2, ahead, back)
    return out.reshape(v.shape).to(v.dtype)


@register_notrace_function
def gla_of_logits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: torch.Tensor, fused: bool = True
) -> torch.Tensor:
    """`gla` with gates that are the 16th root of a sigmoid: near 1, so that the scans remember.

    logits: `[batch, *grid, 2 * heads * head_dim]`, those of the scan forwards first.
    """
    ahead, back = logits.chunk(2, -1)
    ahead, back = ahead.reshape(k.shape), back.reshape(k.shape)
    if fused and not torch.jit.is_scripting():
        found = scan(q, k, v, ahead, back, 0.5 * q.shape[-1] ** -0.5, 16.0)
        if found is not None:
            return found.to(v.dtype)
    return gla(q, k, v, F.logsigmoid(ahead) / 16, F.logsigmoid(back) / 16, fused)


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


def _in_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, log_decay_back: torch.Tensor
) -> torch.Tensor:
    """Sum of both scans of `[batch, tokens, heads, dim]`, whose gates are above exp(-1).

    Then all gates between a token and the middle of its chunk of 64 have a product of at least exp(-32), which float32
    can divide by, also squared as gradients do: queries times their gates since the middle meet keys divided by theirs.
    """
    tokens = q.shape[1]
    chunks = -(-tokens // 64)
    size = -(-tokens // chunks)
    if chunks * size > tokens:
        pad = [0, 0, 0, 0, 0, chunks * size - tokens]
        q, k, v, log_decay, log_decay_back = [F.pad(x, pad) for x in (q, k, v, log_decay, log_decay_back)]
    q, k, v = [x.unflatten(1, (chunks, size)).permute(0, 3, 1, 2, 4).contiguous() for x in (q, k, v)]
    # which logarithms make the gates since the middle, and in the last row those of the way to the middle
    token, middle = torch.arange(size, device=q.device), size // 2
    from_start, from_end = (token <= middle).to(q.dtype), (token >= middle).to(q.dtype)
    ahead = torch.ones(size, size, dtype=q.dtype, device=q.device).tril() - from_start
    back = (token < middle).to(q.dtype) - torch.ones_like(ahead).tril(-1)
    q_there, k_there, there = _scan(q, k, v, log_decay, torch.cat([ahead, from_start[None]]), False)
    q_back, k_back, back = _scan(q, k, v, log_decay_back, torch.cat([back, from_end[None]]), True)
    pairs = (q_there @ k_there.transpose(-1, -2)).tril_().add_((q_back @ k_back.transpose(-1, -2)).triu_())
    out = pairs @ v
    out = out.flatten(0, 2).baddbmm_(q_there.flatten(0, 2), there.flatten(0, 2))
    out = out.baddbmm_(q_back.flatten(0, 2), back.flatten(0, 2)).view(v.shape)
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]


def _scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, sums: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries times their gates since the middle of the chunk, keys divided by theirs, and the states that the queries
    read: those of the chunks before, at the middle of this one."""
    heads, chunks, size = q.shape[1], q.shape[2], q.shape[3]
    logs = log_decay.flatten(2)
    logs = logs.reshape(q.shape[0] * chunks, size, logs.shape[-1])
    gates = (sums.expand(logs.shape[0], -1, -1) @ logs).exp_()
    gates = gates.view(q.shape[0], chunks, size + 1, heads, logs.shape[-1] // heads).permute(0, 3, 1, 2, 4)
    gates, middle = gates[..., :size, :], gates[..., size, :].unsqueeze(-1)
    end = gates[..., 0 if back else size - 1, :].unsqueeze(-1)
    q, k = q * gates, k / gates
    added, kept = (k.transpose(-1, -2) @ v) * end, middle * end
    state = torch.zeros_like(added[:, :, 0])
    states = []
    for i in range(chunks):
        at = chunks - 1 - i if back else i
        states.append(state)
        state = torch.addcmul(added[:, :, at], kept[:, :, at], state)
    if back:
        states = states[::-1]
    return q, k, torch.stack(states, 2) * middle
