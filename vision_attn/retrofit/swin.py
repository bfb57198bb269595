"""Swin blocks of timm whose attention follows a pattern on the whole map instead of their shifted windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from vision_attn.hosts import AttachError
from vision_attn.joint import fit
from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns import Pattern
from vision_attn.kernels.patterns.base import Separable


class SwinBlock:
    """In front of a Swin block, version 1 or 2."""

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        state = self._vision_attn
        if not state.active:
            return super()._attn(x)
        if self.attn.attn_drop.p > 0 and self.training:
            state.left("it drops attention weights in training")
            return super()._attn(x)
        return state.attention_map(self, x)


def map_attention(attn: nn.Module, x: torch.Tensor, pattern: Pattern, backend: str | None) -> torch.Tensor:
    """Attention of a Swin layer over the whole map `x`, `[batch, height, width, channels]`, with its relative
    positions."""
    grid = (int(x.shape[1]), int(x.shape[2]))
    cosine = hasattr(attn, "logit_scale")
    if cosine:
        qkv = attn.qkv(x)
        if attn.q_bias is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    else:
        qkv = attn.qkv(x)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    scale = None if cosine else attn.scale
    if cosine:  # version 2: a learned temperature per head
        factor = attn.logit_scale.clamp(max=math.log(100.0)).exp().reshape(attn.num_heads, 1)
        q, k, scale = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0
    bias = relative_bias(attn, pattern, grid).to(q.dtype)
    out = attend(q.type_as(v), k.type_as(v), v, pattern, scale=scale, bias=bias, backend=backend)
    return attn.proj_drop(attn.proj(out.flatten(3)))


def relative_bias(attn: nn.Module, pattern: Pattern, grid: tuple[int, int]) -> torch.Tensor:
    """What a Swin layer adds to scores, as `attend` takes it: `[heads, *(2 * reach - 1)]`, by key minus query.

    Version 1 has a table as large as its window; version 2 has a function of the distance, for any distance. Steps of a
    dilated pattern count as steps of one.

    Raises:
        AttachError: the pattern has no fixed reach, or one beyond the table.
    """
    reach = pattern.reach(len(grid)) if isinstance(pattern, Separable) else None
    if reach is None:
        raise AttachError(
            f"Swin adds relative positions, which {type(pattern).__name__} cannot take; use Neighborhood or Window"
        )
    if hasattr(attn, "cpb_mlp"):
        return _continuous(attn, reach)
    height, width = attn.window_size
    if reach[0] > height or reach[1] > width:
        raise AttachError(
            f"{pattern} reaches {reach[0]} x {reach[1]} tokens, and this Swin layer has relative positions within its "
            f"window of {height} x {width}; use a window of at most that, or model.set_input_size(window_size=...)"
        )
    # The table is by query minus key.
    table = attn.relative_position_bias_table.view(2 * height - 1, 2 * width - 1, attn.num_heads).flip(0, 1)
    rows, columns = (slice(w - r, w + r - 1) for w, r in zip((height, width), reach, strict=True))
    return table[rows, columns].permute(2, 0, 1)


def _continuous(attn: nn.Module, reach: tuple[int, ...]) -> torch.Tensor:
    weight = attn.cpb_mlp[0].weight
    axes = []
    trained = attn.pretrained_window_size if attn.pretrained_window_size[0] > 0 else attn.window_size
    for r, window in zip(reach, trained, strict=True):
        offset = torch.arange(r - 1, -r, -1, device=weight.device, dtype=torch.float32)  # query minus key
        offset = offset * 8 / max(window - 1, 1)
        axes.append(offset.sign() * (offset.abs() + 1).log2() / math.log2(8))
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).to(weight.dtype)
    return 16 * attn.cpb_mlp(coordinates).sigmoid().permute(2, 0, 1)


def check(block: nn.Module, pattern: Pattern) -> None:
    """Raise what a call would raise about relative positions, at the size of map that the block was built for."""
    grid = tuple(int(n) for n in block.input_resolution)
    relative_bias(block.attn, fit(pattern, grid), grid)
