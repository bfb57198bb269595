"""One recorded attention call, of three kinds, each able to give its weights row by row.

All tensors here are `[batch, heads, tokens, channels]`; weights are in float32, or float64 for float64 models.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns import BlockList, Dense, Pattern
from vision_attn.kernels.patterns.base import Separable
from vision_attn.kernels.patterns.blocks import map_from_lists


@dataclasses.dataclass
class DenseCall:
    """`scaled_dot_product_attention`; the mask is as there, bool or added."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    mask: torch.Tensor | None = None
    causal: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, queries, keys."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def device(self) -> torch.device:
        return self.q.device

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """Scaled and masked, `[batch, heads, len(queries), keys]`."""
        q, k = _wide(self.q[:, :, queries]), _wide(self.k)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * self.scale
        mask = self.mask
        if mask is not None:
            mask = mask if mask.shape[-2] == 1 else mask[..., queries, :]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        if self.causal:
            later = torch.arange(k.shape[2], device=k.device) > queries[:, None].to(k.device)
            scores = scores.masked_fill(later, -math.inf)
        return scores

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        return _softmax(self.scores(queries))

    def entropy(self) -> torch.Tensor | None:
        """`[batch, heads, queries]` without forming weights; None where that is not possible."""
        if self.mask is not None or self.causal or self.q.shape[2] != self.k.shape[2]:
            return None
        q, k = _wide(self.q).transpose(1, 2), _wide(self.k).transpose(1, 2)
        return _fused_entropy(q, k, Dense(), self.scale, None, None).transpose(1, 2)


@dataclasses.dataclass
class PatternCall:
    """`attend` on a grid; extra keys come before those of the grid."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    pattern: Pattern
    grid: tuple[int, ...]
    extra: torch.Tensor | None = None
    extra_mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        extra = 0 if self.extra is None else self.extra.shape[2]
        return (*self.q.shape[:3], extra + self.k.shape[2])

    @property
    def device(self) -> torch.device:
        return self.q.device

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        q, k = _wide(self.q[:, :, queries]), _wide(self.k)
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * self.scale
        row = queries.to(k.device)[:, None]
        column = torch.arange(k.shape[2], device=k.device)[None]
        rule = self.pattern.score_rule(self.grid, k.device)
        if rule is not None:
            scores = rule(scores, row, column)
        if self.bias is not None:
            scores = scores + _bias_rows(self.pattern, _wide(self.bias), self.grid, row)
        scores = scores.masked_fill(~_allowed(self.pattern, self.grid, row, column), -math.inf)
        if self.extra is None:
            return scores
        beside = q @ _wide(self.extra).repeat_interleave(group, 1).mT * self.scale
        if self.extra_mask is not None:
            beside = beside.masked_fill(~self.extra_mask[:, None, None], -math.inf)
        return torch.cat([beside, scores], -1)

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        return _softmax(self.scores(queries))

    def entropy(self) -> torch.Tensor | None:
        linear = self.pattern.score_rule(self.grid) is None and self.bias is None
        if not linear or type(self.pattern).prepare is not Pattern.prepare:
            return None

        def on_grid(x: torch.Tensor) -> torch.Tensor:
            return _wide(x).transpose(1, 2).unflatten(1, self.grid)

        extra = None if self.extra is None else _wide(self.extra).transpose(1, 2)
        found = _fused_entropy(on_grid(self.q), on_grid(self.k), self.pattern, self.scale, extra, self.extra_mask)
        return found.flatten(1, len(self.grid)).transpose(1, 2)


@dataclasses.dataclass
class WeightsCall:
    """Weights that the model spelled out itself, `[batch, heads, queries, keys]`."""

    weights: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return tuple(self.weights.shape)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        return _wide(self.weights[:, :, queries])

    def entropy(self) -> torch.Tensor | None:
        return None


def attention_entropy(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern | None = None,
    *,
    scale: float | None = None,
    extra_k: torch.Tensor | None = None,
    extra_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Entropy of every query's attention in nats, `[batch, *grid, heads]`, from 0 to `log(keys)`.

    As `lse - sum(weights * scores)`, where the sum is `scale * <q, attend(q, k, k)>`: one call of `attend`, so no
    weight is ever stored, and the cost is that of the attention itself. A query that sees nothing gets 0.

    Args:
        q, k: as in `attend`, `[batch, *grid, heads, head_dim]`; computed in float32 at least.
        pattern: who sees whom, without changes to the scores; everyone when None.
        scale: factor on the scores, `head_dim ** -0.5` when None.
        extra_k, extra_mask: keys off the grid that every query sees, and which of them are visible, as in `attend`.

    Raises:
        ValueError: the pattern changes scores or keys (LengthDecay, Circle with pooled tokens).

    >>> from vision_attn import Neighborhood
    >>> q = torch.zeros(1, 8, 8, 1, 16)
    >>> attention_entropy(q, q, Neighborhood(3)).unique().exp()
    tensor([9.])
    """
    pattern = pattern or Dense()
    grid = tuple(q.shape[1:-2])
    if pattern.score_rule(grid) is not None or type(pattern).prepare is not Pattern.prepare:
        raise ValueError(f"{pattern} changes scores or keys; record a model with it and ask the layer for its entropy")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    extra = None if extra_k is None else _wide(extra_k)
    return _fused_entropy(_wide(q), _wide(k), pattern, scale, extra, extra_mask)


def _fused_entropy(q, k, pattern: Pattern, scale: float, extra, extra_mask) -> torch.Tensor:
    options = dict(scale=scale, return_lse=True, extra_mask=extra_mask)
    mean_key, lse = attend(q, k, k, pattern, extra_kv=None if extra is None else (extra, extra), **options)
    entropy = lse - scale * (q * mean_key).sum(-1)
    return torch.where(lse == -math.inf, 0.0, entropy).clamp(min=0)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    nothing = scores.isneginf().all(-1, keepdim=True)  # a query that sees nothing
    return scores.softmax(-1).masked_fill(nothing, 0)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _allowed(pattern: Pattern, grid: tuple[int, ...], row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Rows of `pattern.mask`, without forming all of it."""
    inside = pattern.predicate(grid, row.device)(row, column)
    if not isinstance(pattern, BlockList):
        return inside
    blocks = -(-column.shape[1] // pattern.block[1])

    def listed(count: torch.Tensor) -> torch.Tensor:
        seen = map_from_lists(pattern.index, count, blocks).to(row.device)
        return seen[..., row[:, 0] // pattern.block[0], :].repeat_interleave(pattern.block[1], -1)[
            ..., : column.shape[1]
        ]

    allowed = listed(pattern.count) & inside
    return allowed if pattern.full_count is None else allowed | listed(pattern.full_count)


def _bias_rows(pattern: Pattern, bias: torch.Tensor, grid: tuple[int, ...], row: torch.Tensor) -> torch.Tensor:
    """Rows of `pattern.spread_bias`, without forming all of it where the pattern is a product over axes."""
    if not isinstance(pattern, Separable):
        return pattern.spread_bias(bias, grid)[..., row[:, 0], :]
    index = torch.zeros(len(row), 1, dtype=torch.long, device=bias.device)
    below = math.prod(grid)
    for axis, extent, reach in zip(pattern.axes(grid), grid, pattern.reach(len(grid)), strict=True):
        below //= extent
        place = torch.tensor(axis.places, device=bias.device)
        offset = (place - place[row // below % extent] + reach - 1).clamp(0, 2 * reach - 2)
        index = (index[:, :, None] * (2 * reach - 1) + offset[:, None]).flatten(1)
    return bias.flatten(1)[:, index]
