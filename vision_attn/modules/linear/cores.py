"""What happens between the projections of an attention layer: a formula, and parameters where a kind has its own.

A core takes q, k, v `[batch, height, width, heads, head_dim]` and the input of the layer `[batch, height, width, dim]`,
and returns what q is shaped as. Tracers do not look into it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import nn

from vision_attn.modules.linear import formulas
from vision_attn.modules.linear.rotary import axial_turns, check_rotary, rotate
from vision_attn.modules.linear.scan import gla_of_logits
from vision_attn.modules.softmax import softmax_attention

__all__ = [
    "Formula",
    "GatedScan",
    "InLine",
    "L2ViT",
    "LightNet",
    "RotaryFormula",
    "Slab",
    "Softmax",
    "local_taps",
    "tap_predictor",
]


@register_notrace_module
class Formula(nn.Module):
    """A formula of q, k and v alone."""

    def __init__(self, formula: Callable):
        super().__init__()
        self.formula = formula

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.formula(q, k, v)


@register_notrace_module
class RotaryFormula(nn.Module):
    """A formula whose features turn with the position."""

    def __init__(self, formula: Callable, head_dim: int):
        super().__init__()
        check_rotary(head_dim)
        self.formula = formula

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.formula(q, k, v, axial_turns(q))


@register_notrace_module
class Softmax(nn.Module):
    """Dense softmax attention with rotary positions, what the late stages of linear backbones use."""

    def __init__(self, head_dim: int):
        super().__init__()
        check_rotary(head_dim)
        self.fused_attn = use_fused_attn()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        turns, shape = axial_turns(q), v.shape
        q, k = rotate(q, turns).to(v.dtype), rotate(k, turns).to(v.dtype)
        q, k, v = q.flatten(1, 2).transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
        out = softmax_attention(q, k, v, self.fused_attn)
        return out.transpose(1, 2).reshape(shape)


def local_taps(v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Depthwise 3 x 3 convolution of v `[batch, height, width, ...]`, taps `[batch, channels * 9, 1]` per image."""
    batch, height, width = v.shape[0], v.shape[1], v.shape[2]
    if batch == 0:
        return v  # a convolution has at least one group
    # the channels of all images side by side, last in memory, which is fastest
    maps = v.flatten(3).permute(1, 2, 0, 3).reshape(1, height, width, -1).permute(0, 3, 1, 2)
    kernels = taps.reshape(maps.shape[1], 1, 3, 3).to(v.dtype)
    out = F.conv2d(maps, kernels, padding=1, groups=kernels.shape[0])
    return out.permute(0, 2, 3, 1).reshape(height, width, batch, -1).permute(2, 0, 1, 3).reshape(v.shape)


class PerHead(nn.Conv1d):
    """A linear layer on `[batch, channels, 1]` whose heads see their own channels only: products of matrices, because a
    convolution of one token takes many times as long to start."""

    def __init__(self, dim: int, out_dim: int, num_heads: int, device=None, dtype=None):
        super().__init__(dim, out_dim, 1, groups=num_heads, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(1, (self.groups, -1)).flatten(2).transpose(0, 1)
        out = heads @ self.weight.view(self.groups, -1, heads.shape[-1]).transpose(1, 2)
        out, bias = out.transpose(0, 1).flatten(1), self.bias
        return (out if bias is None else out + bias).unsqueeze(-1)


def tap_predictor(dim: int, num_heads: int, device=None, dtype=None) -> nn.Sequential:
    """Mean token `[batch, dim, 1]` to the taps of `local_taps`, `[batch, dim * 9, 1]`, each head from its channels."""
    dd = {"device": device, "dtype": dtype}
    return nn.Sequential(PerHead(dim, dim, num_heads, **dd), nn.GELU(), PerHead(dim, 9 * dim, num_heads, **dd))


@register_notrace_module
class InLine(nn.Module):
    """`inline`, and a 3 x 3 convolution of v whose taps are predicted from the mean input token."""

    def __init__(self, dim: int, num_heads: int, feature: str = "identity", device=None, dtype=None):
        super().__init__()
        if feature not in ("identity", "relu", "leaky_relu", "exp"):
            raise ValueError(f"feature {feature!r}; allowed: 'identity', 'relu', 'leaky_relu', 'exp'")
        self.feature = feature
        self.taps = tap_predictor(dim, num_heads, device, dtype)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        taps = self.taps(x.flatten(1, 2).mean(1).unsqueeze(-1))
        return formulas.inline(q, k, v, self.feature).contiguous().add_(local_taps(v, taps))


@register_notrace_module
class L2ViT(nn.Module):
    """`l2vit` with its learned temperature."""

    def __init__(self, num_heads: int, head_dim: int, device=None, dtype=None):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((num_heads,), head_dim**-0.5, device=device, dtype=dtype))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return formulas.l2vit(q, k, v, self.temperature)


@register_notrace_module
class Slab(nn.Module):
    """`relu` on keys with a learned table of positions, and a 5 x 5 convolution of v that all heads share.

    The table has `size` rows and columns; for other maps it is interpolated.
    """

    def __init__(self, dim: int, head_dim: int, size: int | tuple[int, int] = 56, device=None, dtype=None):
        super().__init__()
        rows, columns = (size, size) if isinstance(size, int) else size
        if min(rows, columns) < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        dd = {"device": device, "dtype": dtype}
        self.position = nn.Parameter(torch.zeros(1, rows, columns, dim, **dd))
        self.local = nn.Conv2d(head_dim, head_dim, 5, padding=2, groups=head_dim, **dd)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, heads, dim = v.shape
        table = self.position
        if table.shape[1] != height or table.shape[2] != width:
            table = F.interpolate(table.permute(0, 3, 1, 2), [height, width], mode="bilinear").permute(0, 2, 3, 1)
        out = formulas.relu(q, k + table.unflatten(-1, (heads, dim)), v)
        maps = v.flatten(3).contiguous().permute(0, 3, 1, 2)  # channels last in memory, which is fastest
        bias = self.local.bias
        bias = None if bias is None else bias.repeat(heads)
        maps = F.conv2d(maps, self.local.weight.repeat(heads, 1, 1, 1), bias, padding=2, groups=heads * dim)
        return maps.permute(0, 2, 3, 1).view(batch, height, width, heads, dim) + out  # in memory as the first of them


@register_notrace_module
class LightNet(nn.Module):
    """`lightnet`, then a norm over all channels and a gate of low rank."""

    def __init__(self, dim: int, rank: int = 16, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.RMSNorm(dim, eps=1e-6, **dd)
        self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False, **dd), nn.Linear(rank, dim, bias=False, **dd))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = formulas.lightnet(q, k, v)
        return (self.norm(out.flatten(3)) * F.silu(self.gate(x))).view(v.shape)


@register_notrace_module
class GatedScan(nn.Module):
    """`gla` over the tokens row by row; the gates come from a projection of low rank, those of each direction apart."""

    def __init__(self, dim: int, rank: int = 16, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fused_attn = use_fused_attn()
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False, **dd), nn.Linear(rank, 2 * dim, **dd))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return gla_of_logits(q, k, v, self.decay(x), self.fused_attn)
