"""Watching attention while a pipeline draws: how much of it a pattern would keep, and how it falls off with distance.

Nothing is changed: the calls stay dense. A few query rows are drawn for every call of the denoiser, and only their
weights are computed, so the memory is that of the rows and never that of the whole map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from vision_attn.diffusion.context import Context
from vision_attn.diffusion.families import Grid
from vision_attn.diffusion.hooks import AttentionHook, Interception
from vision_attn.diffusion.run import Run
from vision_attn.hosts import AttachError
from vision_attn.joint import fit
from vision_attn.kernels.patterns import Neighborhood, Pattern, Radial


class Watcher(Context):
    """The sums of one denoiser.

    `kept[layer]` is `[heads, candidates]`, the attention mass that each candidate keeps, and `seen[layer]` the number
    of sampled rows of one head, so that their ratio is the mean recall. `energy[layer]` is `[heads, t, r]`, the mass by
    distance in frames and in tokens within a frame, and `pairs[layer]` `[t, r]` how many pairs there were.
    """

    candidates: tuple[Pattern, ...] = ()
    rows = 64
    generator: torch.Generator | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: dict[int, torch.Tensor] = {}
        self.seen: dict[int, int] = {}
        self.energy: dict[int, torch.Tensor] = {}
        self.pairs: dict[int, torch.Tensor] = {}
        self.layer_grids: dict[int, Grid] = {}
        self.drawn: dict[Grid, tuple[torch.Tensor, ...]] = {}

    def measure(self, call: dict[str, Any]) -> None:
        super().measure(call)
        if torch.compiler.is_compiling():
            raise AttachError("calibrate a model that is not compiled, and compile it afterwards")
        if self.ranks > 1:
            raise AttachError("calibrate in one process: with context parallelism no process sees whole rows")
        self.drawn = {}  # other rows in every call
        if not self.candidates:
            grids = set(self.grids.values())
            self.candidates = default_candidates(max(grids, key=math.prod), levels=len(grids) > 1)

    def sample(self, grid: Grid, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Query rows of this call, what each candidate keeps of them `[candidates, rows * tokens]`, and the distance
        `[rows * tokens]` of every pair as an index into `[t, r]`."""
        if grid not in self.drawn:
            tokens = math.prod(grid)
            few = torch.randperm(tokens, generator=self.generator)[: self.rows].sort().values.to(device)
            query, key = few[:, None], torch.arange(tokens, device=device)[None]
            fitted = [fit(pattern, grid) for pattern in self.candidates]
            masks = [p.predicate(grid, device)(query, key).expand(len(few), tokens).flatten() for p in fitted]
            masks = torch.stack(masks).float() if masks else torch.zeros(0, few.numel() * tokens, device=device)
            self.drawn[grid] = few, masks, distances(query, key, grid).flatten()
        return self.drawn[grid]

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor, mask: Any, place: tuple, scale: float | None) -> None:
        """Add the sampled rows of one call; q and k are `[batch, heads, tokens, head_dim]`."""
        grid, start, _ = place
        few, masks, distance = self.sample(grid, q.device)
        batch, heads, _, head_dim = q.shape
        tokens, bins = math.prod(grid), math.prod(reach(grid))
        if layer not in self.kept:
            self.kept[layer] = q.new_zeros(heads, len(masks), dtype=torch.float64)
            self.energy[layer] = q.new_zeros(heads, bins, dtype=torch.float64)
            self.pairs[layer] = q.new_zeros(bins, dtype=torch.float64)
            self.seen[layer], self.layer_grids[layer] = 0, grid
        self.seen[layer] += batch * len(few)
        self.pairs[layer] += batch * torch.bincount(distance, minlength=bins)
        group = heads // k.shape[1]
        for head in range(heads):  # one at a time: the rows of all heads of a long video are gigabytes
            keys = k[:, head // group].float().transpose(-1, -2)
            scores = q[:, head, start + few].float() @ keys * (head_dim**-0.5 if scale is None else scale)
            if mask is not None:  # hides text only
                scores = scores.masked_fill(~mask[:, 0], -math.inf)
            weights = scores.softmax(-1)
            image = weights[..., start : start + tokens]
            rest = weights.sum() - image.sum()  # text is seen under every pattern
            image = image.sum(0).flatten()
            self.kept[layer][head] += (masks @ image + rest).double()
            self.energy[layer][head].index_add_(0, distance, image.double())


class Watch(Run):
    """Hooks that watch a pipeline or a denoiser; `contexts` are its `Watcher`s, one per denoiser."""

    context_class = Watcher

    class hook_class(AttentionHook):
        def mode(self) -> Interception:
            return _Eye(self.context, self.layer)

    @property
    def contexts(self) -> list[Watcher]:
        return self._contexts


class _Eye(Interception):
    def compute(self, q, k, v, mask, place, scale, enable_gqa):
        with torch.no_grad():
            self.context.add(self.layer, q, k, mask, place, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


def distances(query: torch.Tensor, key: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Distance of tokens in frames and, within a frame, in tokens (Euclidean, rounded), as one index into
    `[frames, longest + 1]`."""
    width, area = grid[-1], math.prod(grid[-2:])
    frames = (query // area - key // area).abs()
    dy = query % area // width - key % area // width
    dx = query % width - key % width
    return frames * reach(grid)[1] + (dy * dy + dx * dx).float().sqrt().round().long()


def reach(grid: Grid) -> tuple[int, int]:
    return (math.prod(grid[:-2]), round(math.hypot(grid[-2] - 1, grid[-1] - 1)) + 1)


def default_candidates(grid: Grid, levels: bool = False) -> tuple[Pattern, ...]:
    """Patterns worth trying on a grid: neighborhoods of many extents, and for video radial attention of three widths.

    With `levels`, where a model has coarser grids too, windows are one number for all axes, which fits those as well.

    >>> len(default_candidates((64, 64))), len(default_candidates((21, 30, 52)))
    (6, 22)
    """
    *frames, height, width = grid
    found: dict[Pattern, None] = {}
    for share in (0, 1 / 4, 1 / 2, 3 / 4, 1) if frames else (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4):
        for part in (0, 1 / 4, 1 / 2, 1) if frames else (None,):
            long = () if part is None else (_odd(part, frames[0], 1),)
            window = (*long, *(_odd(share, n, 3) for n in (height, width)))
            if window != tuple(grid):
                found[Neighborhood(window=max(window) if levels else window)] = None
    if frames and frames[0] > 2:
        # The published constants belong to frames of thousands of tokens; smaller frames get them in proportion.
        tokens = height * width
        block, thin = (max(1, min(128, n)) for n in (tokens // 9, 2 ** tokens.bit_length() // 8))
        found |= {Radial(decay=decay, block=block, thin=thin): None for decay in (0.2, 0.5, 1.0)}
    return tuple(found)


def _odd(share: float, extent: int, least: int) -> int:
    """An odd window, so that it has a middle, or the whole axis."""
    odd = max(2 * int(share * extent / 2) + 1, least)
    return extent if share == 1 else min(odd, extent)
