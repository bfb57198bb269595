"""Attention over a sequence that holds image tokens on a grid and, before or after them, tokens that see everything."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vision_attn.kernels.attend import attend
from vision_attn.kernels.exchange import contact
from vision_attn.kernels.parallel import Shards
from vision_attn.kernels.patterns import BlockList, Halo, Neighborhood, Pattern, PerHead, SlidingTile, Window

# Options that one int sets for every axis, and so mean "at most the whole axis": the first decides, the rest follow.
_PER_AXIS = {Neighborhood: ("window", "stride"), Window: ("size", "shift"), SlidingTile: ("tile",), Halo: ("block",)}


def fit(pattern: Pattern, grid: tuple[int, ...]) -> Pattern:
    """The pattern as it applies to `grid`; whether it can is checked where it is used.

    One int for all axes is a wish for each of them: on an axis that is shorter it becomes the whole axis, so that
    `window=9` also fits the single frame of an image or the coarse level of a U-Net. A tuple is taken at its word.

    >>> fit(Neighborhood(window=9), (1, 30, 52))
    Neighborhood(window=(1, 9, 9), stride=1, dilation=1, causal=False)
    """
    if isinstance(pattern, PerHead):
        return PerHead(tuple((heads, fit(part, grid)) for heads, part in pattern.parts))
    first, *others = _PER_AXIS.get(type(pattern), (None,))
    if first is None or not isinstance(size := getattr(pattern, first), int):
        return pattern

    def along(name: str) -> tuple[int, ...]:
        value = getattr(pattern, name, 1)
        return value if isinstance(value, tuple) else (value,) * len(grid)

    if any(len(along(name)) != len(grid) for name in ("dilation", *others)):
        return pattern  # its check says what does not fit
    sizes = tuple(min(size, max(n // d, 1)) for n, d in zip(grid, along("dilation"), strict=True))
    changed = {first: sizes}
    for name in others:  # a stride is at most the window, a shift is below the size
        most = [n - 1 if name == "shift" else n for n in sizes]
        changed[name] = tuple(map(min, along(name), most))
    changed = {name: value for name, value in changed.items() if value != along(name)}
    return dataclasses.replace(pattern, **changed) if changed else pattern


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    pattern: Pattern,
    grid: tuple[int, ...],
    start: int,
    alone: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
    parallel: Shards | None = None,
) -> torch.Tensor:
    """Image tokens follow the pattern among themselves and see all other tokens; all other tokens see everything.

    Args:
        q: `[batch, heads, tokens, head_dim]`, as in `scaled_dot_product_attention`; k and v with kv_heads.
        mask: bool `[batch or 1, 1, 1, tokens]`, True where the key is visible, all True over the image tokens; or None.
        grid: sizes of the image in tokens, row-major.
        start: where the image begins in the sequence.
        alone: the sequence is the image and nothing else.
        parallel: the image is what this rank has of one that is cut over a process group; all other tokens are on every
            rank. No gradients then, unless `alone`.

    Returns:
        `[batch, heads, tokens, value_dim]`.
    """
    stop = start + math.prod(grid)

    def image(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, start:stop].transpose(1, 2).unflatten(1, grid)

    def rest(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :, :start], x[:, :, stop:]], 2)

    extra_kv = extra_mask = None
    if not alone:
        extra_kv = (rest(k).transpose(1, 2), rest(v).transpose(1, 2))
        if mask is not None:
            extra_mask = rest(mask[:, 0])[:, 0].expand(q.shape[0], -1)
    out = attend(
        image(q),
        image(k),
        image(v),
        pattern,
        scale=scale,
        extra_kv=extra_kv,
        extra_mask=extra_mask,
        backend=backend,
        parallel=parallel,
    )
    out = out.flatten(1, len(grid)).transpose(1, 2)
    if alone:
        return out
    # Few rows, so dense: text and appended tokens look at everything.
    if parallel is None:
        others = F.scaled_dot_product_attention(rest(q), k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    else:
        if dist.get_rank(parallel.group):  # what all have is counted on the first rank
            k, v, mask = k[:, :, start:stop], v[:, :, start:stop], None
        others = _over_ranks(rest(q), k, v, mask, scale, parallel)
    return torch.cat([others[:, :, :start], out, others[:, :, start:]], 2)


def _over_ranks(q, k, v, mask: torch.Tensor | None, scale: float | None, parallel: Shards) -> torch.Tensor:
    """Queries that all ranks have, on keys of which each has some: parts put together by their log-sum-exp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    nothing = BlockList(q.shape[1], torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    blank = [q.new_zeros(*q.shape[:2], *x.shape[2:]) for x in (k, v)]
    seen = None if mask is None else mask[:, 0, 0].expand(len(q), -1)
    out, lse = attend(q, *blank, nothing, scale=scale, extra_kv=(k, v), extra_mask=seen, return_lse=True)
    top = lse.clone()
    ranks = range(dist.get_world_size(parallel.group))
    with contact(ranks, parallel.group):
        dist.all_reduce(top, dist.ReduceOp.MAX, group=parallel.group)
        weight = (lse - top).exp()[..., None]
        parts = torch.cat([out * weight, weight], -1)
        dist.all_reduce(parts, group=parallel.group)
    return (parts[..., :-1] / parts[..., -1:]).to(q.dtype).transpose(1, 2)
