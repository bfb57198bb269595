"""The one attention call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .backends import BACKENDS, ready
from .operator import attend_in_graph
from .patterns import Dense, Pattern, PerHead
from .problem import check_heads, describe, resolve_scale

if TYPE_CHECKING:
    from .parallel import Shards


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    extra_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    extra_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    parallel: Shards | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of grid tokens, restricted to the pairs that `pattern` allows.

    Args:
        q: `[batch, *grid, heads, head_dim]`, grid of one to three axes.
        k: `[batch, *grid, kv_heads, head_dim]`; `kv_heads` divides `heads`, query head `h` reads KV head `h // (heads /
            kv_heads)`.
        v: `[batch, *grid, kv_heads, value_dim]`.
        pattern: who sees whom on the grid, for example `Neighborhood(window=7)`.
        scale: factor on the scores, above 0; `head_dim ** -0.5` when None.
        extra_kv: keys `[batch, extra, kv_heads, head_dim]` and values `[batch, extra, kv_heads, value_dim]` of tokens
            off the grid (text, registers) that every query sees.
        extra_mask: bool `[batch, extra]`, True where the extra token is visible; for padded text.
        bias: added to the scaled scores. For Neighborhood and Window relative positions, `[heads, *(2 * window - 1)]`,
            entry `key - query + window - 1` per axis, in steps of the dilation; for BlockList one number per listed
            block, shaped as its `index`.
        return_lse: also return the natural log of the sum of exponentials of the scaled scores.
        backend: a name from `explain`; None picks the fastest that does exactly what is asked.
        parallel: the grid is cut along one axis over the ranks of a process group, and q, k and v are the rows of this
            one, for example `Shards(axis=1)`; rows that the windows of other ranks reach are exchanged.

    Returns:
        `[batch, *grid, heads, value_dim]` in the dtype of q; with `return_lse` also `[batch, *grid, heads]` in float32
        (float64 for float64 input). A query that sees nothing gets 0, and an lse of minus infinity.

    Raises:
        TypeError, ValueError: arguments that do not fit together, a pattern that does not fit the grid, or a backend
            that cannot do it; the message says what is allowed.

    >>> q, k, v = torch.randn(3, 1, 16, 16, 4, 32)
    >>> from vision_attn import Neighborhood
    >>> attend(q, k, v, Neighborhood(window=7)).shape
    torch.Size([1, 16, 16, 4, 32])
    """
    compiling = torch.compiler.is_compiling()
    if isinstance(pattern, PerHead):
        if not compiling:
            describe(q, k, v, Dense(), scale, extra_kv, extra_mask, None, return_lse)
        options = dict(scale=scale, extra_mask=extra_mask, return_lse=return_lse, backend=backend, parallel=parallel)
        return _per_head(q, k, v, pattern, extra_kv, bias, options)
    if parallel is not None:
        if compiling:
            raise ValueError("parallel= cannot be part of a compiled graph; compile what is around it")
        from .parallel import attend_sharded

        return attend_sharded(
            q, k, v, pattern, parallel,
            dict(
                scale=scale, extra_kv=extra_kv, extra_mask=extra_mask, bias=bias, return_lse=return_lse, backend=backend
            ),
        )  # fmt: skip
    if isinstance(pattern, Pattern) and type(pattern).prepare is not Pattern.prepare:
        if not compiling:  # before anything is done to them
            describe(q, k, v, pattern, scale, extra_kv, extra_mask, bias, return_lse)
        k, v, extra_kv, extra_mask = pattern.prepare(k, v, extra_kv, extra_mask)
    if compiling:
        return attend_in_graph(q, k, v, pattern, scale, extra_kv, extra_mask, bias, return_lse, backend)
    problem = describe(q, k, v, pattern, scale, extra_kv, extra_mask, bias, return_lse)
    module = BACKENDS[ready(problem, backend)]
    if not problem.extra:
        extra_kv = extra_mask = None
    if not problem.needs_grad:  # under no_grad: some backends refuse inputs that could have a gradient
        q, k, v = q.detach(), k.detach(), v.detach()
        extra_kv = extra_kv and tuple(t.detach() for t in extra_kv)
        bias = None if bias is None else bias.detach()
    if not problem.batch:
        nothing = q.sum() + k.sum() + v.sum()  # empty, but with a gradient
        out, lse = nothing.expand(*q.shape[:-1], v.shape[-1]).to(q.dtype), nothing.expand(q.shape[:-1])
    else:
        with torch.autocast(q.device.type, enabled=False):  # the dtype of the call is the dtype of the tensors
            out, lse = module.run(problem, q, k, v, resolve_scale(problem, scale), extra_kv, extra_mask, bias)
    return (out, lse) if return_lse else out


def _per_head(q, k, v, pattern: PerHead, extra_kv, bias, options):
    """One call per part, on its share of the heads."""
    check_heads(pattern, q.shape[-2], k.shape[-2], bias is not None)
    group = q.shape[-2] // k.shape[-2]
    results, first = [], 0
    for heads, part in pattern.parts:
        here, there = slice(first, first + heads), slice(first // group, (first + heads) // group)
        keys, values = k[..., there, :], v[..., there, :]
        extra = extra_kv and tuple(t[..., there, :] for t in extra_kv)
        results.append(attend(q[..., here, :], keys, values, part, extra_kv=extra, **options))
        first += heads
    if not options["return_lse"]:
        return torch.cat(results, -2)
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)
