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


def run(problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    """Attention by a dense mask, at least in float32.

    Shapes as in `attend`. Returns `(out, lse)`, out in the dtype of q; lse in float32, or float64 for float64 input.
    """
    pattern, grid, device = problem.pattern, problem.grid, q.device
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, group, tokens = problem.batch, problem.heads // problem.kv_heads, problem.tokens
    # [batch, heads, tokens, dim]; query head h reads KV head h // group
    query, key, value = (t.to(dtype).flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    mask = pattern.mask(grid, device)
    mask = mask.expand(batch, problem.heads, *mask.shape[-2:])
    if extra_kv is not None:
        extra_key, extra_value = (t.to(dtype).transpose(1, 2) for t in extra_kv)
        key, value = torch.cat([key, extra_key], 2), torch.cat([value, extra_value], 2)
        visible = mask.new_ones(batch, problem.extra) if extra_mask is None else extra_mask
        mask = torch.cat([mask, visible[:, None, None].expand(*mask.shape[:-1], -1)], -1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    # 0 times NaN is NaN: a token that is not finite is taken out, and the queries that see it get NaN
    bad = ~(key.isfinite().all(-1) & value.isfinite().all(-1))
    key, value = (t.masked_fill(bad[..., None], 0) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    rule, token = pattern.score_rule(grid, device), torch.arange(tokens, device=device)
    on_grid, off_grid = scores.split([tokens, scores.shape[-1] - tokens], -1)
    on_grid = on_grid if rule is None else rule(on_grid, token[:, None], token)
    on_grid = on_grid if bias is None else on_grid + pattern.spread_bias(bias.to(dtype), grid)
    scores = torch.cat([on_grid, off_grid], -1).masked_fill(~mask, float("-inf"))
    # A row that sees nothing has no maximum and no sum: it gets out 0 and lse -inf, with finite gradients.
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    some = torch.where(total > 0, total, 1)
    blind = (mask & bad[:, :, None]).any(-1, keepdim=True)
    out = (weights @ value / some).masked_fill(blind, float("nan"))
    lse = torch.where(total > 0, some.log() + top, float("-inf")).masked_fill(blind, float("nan")).squeeze(-1)
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    return out.reshape(*q.shape[:-1], -1).to(q.dtype), lse.reshape(q.shape[:-1])


def backward(problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse):
    """Gradients of q, k, v, the extra keys and values, and the bias, None where there is no such input; for the
    operator of compiled graphs."""
    inputs = [q, k, v, *(extra_kv or (None, None)), bias]
    given = [i for i, t in enumerate(inputs) if t is not None]

    def function(*tensors):
        q, k, v, extra_k, extra_v, bias = (dict(zip(given, tensors, strict=True)).get(i) for i in range(6))
        return run(problem, q, k, v, scale, None if extra_k is None else (extra_k, extra_v), extra_mask, bias)

    outer = grad_lse if problem.return_lse else torch.zeros(q.shape[:-1], dtype=grad_lse.dtype, device=q.device)
    grads = torch.func.vjp(function, *(inputs[i] for i in given))[1]((grad_out, outer))
    return [dict(zip(given, grads, strict=True)).get(i) for i in range(6)]
