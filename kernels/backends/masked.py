"""One call of SDPA under a mask of tokens x tokens: on small grids anything cleverer takes longer."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ..patterns import BlockList, Pattern
from ..problem import Problem

MOST = 256  # tokens


def missing(device: str) -> list[str]:
    return []


def limits(problem: Problem) -> list[str]:
    pattern, reasons = problem.pattern, []
    if problem.device != "cpu":
        reasons.append("only cpu tensors")
    if problem.tokens > MOST:
        reasons.append(f"at most {MOST} tokens: the mask has tokens x tokens")
    if isinstance(pattern, BlockList):
        reasons.append("no BlockList: a mask made of new lists in every call takes longer than the lists")
    if pattern.score_rule(problem.grid) is not None:
        reasons.append(f"no score rule, which {type(pattern).__name__} has")
    if problem.extra:
        reasons.append("no extra tokens")
    if problem.return_lse:
        reasons.append("no log-sum-exp: SDPA does not return it")
    return reasons


def by_name_only(problem: Problem) -> str | None:
    dense = problem.pattern.is_dense(problem.grid) and not problem.bias
    return "nothing to leave out: tiled needs no mask" if dense else None


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    group = problem.heads // problem.kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)  # sums of halves are rounded too early
    query, key, value = (t.flatten(1, -3).transpose(1, 2).to(dtype) for t in (q, k, v))
    mask = _mask(problem.pattern, problem.grid, dtype)
    if bias is not None:
        entries = _entries(problem.pattern, problem.grid, tuple(bias.shape[1:]))
        spread = bias.flatten(1).gather(1, entries.expand(len(bias), -1))
        mask = mask + spread.view(1, -1, *mask.shape)  # of four dimensions: with three SDPA takes a slow path
    # 0 times NaN is NaN: a token that is not finite is taken out, and the queries that see it get NaN
    bad = None
    if not bool((key.sum() + value.sum()).isfinite()):
        bad = ~(key.isfinite().all(-1) & value.isfinite().all(-1))
        key, value = (t.masked_fill(bad[..., None], 0) for t in (key, value))
        bad = (bad[:, :, None] & (_mask(problem.pattern, problem.grid, dtype) == 0)).any(-1)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=group > 1)
    if bad is not None:
        out = out.masked_fill(bad.repeat_interleave(group, 1)[..., None], float("nan"))
    return out.transpose(1, 2).reshape(*q.shape[:-1], -1).to(q.dtype), None


def backward(problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse):
    """Gradients of q, k, v and the bias, None where there is no such input; for the operator of compiled graphs."""
    inputs = [q, k, v] if bias is None else [q, k, v, bias]

    def function(q, k, v, bias=None):
        return run(problem, q, k, v, scale, bias=bias)[0]

    by_query, by_key, by_value, *rest = torch.func.vjp(function, *inputs)[1](grad_out)
    return [by_query, by_key, by_value, None, None, rest[0] if rest else None]


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # kept for calls that have gradients
def _mask(pattern: Pattern, grid: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`[tokens, tokens]`: 0 where the query sees the key, else minus infinity."""
    seen = pattern.mask(grid)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # kept for calls that have gradients
def _entries(pattern: Pattern, grid: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Which entry of the flattened bias each pair of tokens takes, `[tokens * tokens]`."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).view(1, *shape)
    return pattern.spread_bias(numbers, grid)[0].long().flatten()
