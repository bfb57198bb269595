"""The definition: a dense mask and one softmax. Every other backend is tested against this one."""

from __future__ import annotations

import torch

from ..problem import Problem


def missing(device: str) -> list[str]:
    return []


def limits(problem: Problem) -> list[str]:
    """It can do everything, given the memory for tokens x tokens scores."""
    return []


def by_name_only(problem: Problem) -> str | None:
    return "builds tokens x tokens scores; it is the definition, for tests and small grids"


def run(problem, q, k, v, scale, extra_kv=None, extra_mask=None):
    """Attention by a dense mask, at least in float32.

    Shapes as in `attend`. Returns `(out, lse)`, out in the dtype of q; lse in float32, or float64 for float64 input.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, group = problem.batch, problem.heads // problem.kv_heads
    # [batch, heads, tokens, dim]; query head h reads KV head h // group
    query, key, value = (t.to(dtype).flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    mask = problem.pattern.mask(problem.grid, q.device)
    mask = mask.expand(batch, problem.heads, *mask.shape[-2:])
    if extra_kv is not None:
        extra_key, extra_value = (t.to(dtype).transpose(1, 2) for t in extra_kv)
        key, value = torch.cat([key, extra_key], 2), torch.cat([value, extra_value], 2)
        visible = mask.new_ones(batch, problem.extra) if extra_mask is None else extra_mask
        mask = torch.cat([mask, visible[:, None, None].expand(*mask.shape[:-1], -1)], -1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    # A row that sees nothing has no maximum and no sum: it gets out 0 and lse -inf, with finite gradients.
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    some = torch.where(total > 0, total, 1)
    out = weights @ value / some
    lse = torch.where(total > 0, some.log() + top, float("-inf")).squeeze(-1)
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    return out.reshape(*q.shape[:-1], -1).to(q.dtype), lse.reshape(q.shape[:-1])


def backward(problem, q, k, v, scale, extra_kv, extra_mask, grad_out, grad_lse) -> list[torch.Tensor]:
    """Gradients of q, k, v and the extra keys and values; for the operator of compiled graphs."""

    def out(q, k, v, *extra):
        return run(problem, q, k, v, scale, extra or None, extra_mask)

    pull = torch.func.vjp(out, q, k, v, *(extra_kv or ()))[1]
    return list(pull((grad_out, grad_lse if problem.return_lse else torch.zeros(q.shape[:-1]).to(q.device))))
