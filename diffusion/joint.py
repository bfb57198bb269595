"""Attention over a sequence that holds image tokens on a grid and, before or after them, tokens that see everything."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns import Neighborhood, Pattern, SlidingTile, Window

# Options that one int sets for every axis, and so mean "at most the whole axis"; the first one decides, the rest follow
# it.
_PER_AXIS = {Neighborhood: ("window", "stride"), Window: ("size", "shift"), SlidingTile: ("tile",)}


def fit(pattern: Pattern, grid: tuple[int, ...]) -> Pattern:
    """The pattern as it applies to `grid`; whether it can is checked where it is used.

    One int for all axes is a wish for each of them: on an axis that is shorter it becomes the whole axis, so that
    `window=9` also fits the single frame of an image or the coarse level of a U-Net. A tuple is taken at its word.

    >>> fit(Neighborhood(window=9), (1, 30, 52))
    Neighborhood(window=(1, 9, 9), stride=1, dilation=1, causal=False)
    """
    names = _PER_AXIS.get(type(pattern), ())
    if names and isinstance(getattr(pattern, names[0]), int):
        values = {name: getattr(pattern, name) for name in names}
        step = getattr(pattern, "dilation", 1)
        steps = step if isinstance(step, tuple) else (step,) * len(grid)
        sizes = tuple(min(values[names[0]], max(n // d, 1)) for n, d in zip(grid, steps, strict=True))
        if len(set(sizes)) > 1 or sizes[0] != values[names[0]]:
            changed = {names[0]: sizes}
            for name in names[1:]:  # a stride is at most the window, a shift is below the size
                below = 1 if name == "shift" else 0
                given = values[name] if isinstance(values[name], tuple) else (values[name],) * len(grid)
                changed[name] = tuple(min(g, s - below) for g, s in zip(given, sizes, strict=True))
            pattern = dataclasses.replace(pattern, **changed)
    return pattern


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
) -> torch.Tensor:
    """Image tokens follow the pattern among themselves and see all other tokens; all other tokens see everything.

    Args:
        q: `[batch, heads, tokens, head_dim]`, as in `scaled_dot_product_attention`; k and v with kv_heads.
        mask: bool `[batch or 1, 1, 1, tokens]`, True where the key is visible, all True over the image tokens; or None.
        grid: sizes of the image in tokens, row-major.
        start: where the image begins in the sequence.
        alone: the sequence is the image and nothing else.

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
    )
    out = out.flatten(1, len(grid)).transpose(1, 2)
    if alone:
        return out
    # Few rows, so dense: text and appended tokens look at everything.
    others = F.scaled_dot_product_attention(rest(q), k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return torch.cat([others[:, :, :start], out, others[:, :, start:]], 2)


def gathered_order(ranks: int, first: int, second: int) -> list[int]:
    """Positions of `[first part, second part]` in the sequence that Ulysses parallelism gathers.

    Each rank concatenates its slice of both parts before the exchange, so the parts arrive interleaved.

    >>> gathered_order(2, 2, 4)  # gathered as: text 0, image 0 1, text 1, image 2 3
    [0, 3, 1, 2, 4, 5]
    """
    a, b = first // ranks, second // ranks
    parts = [range(r * (a + b), r * (a + b) + a) for r in range(ranks)]
    parts += [range(r * (a + b) + a, (r + 1) * (a + b)) for r in range(ranks)]
    return [position for part in parts for position in part]
