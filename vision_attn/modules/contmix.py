"""ContMix: a convolution whose kernels are made at each place from the likeness to a pooled context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn
from torch import nn

from vision_attn.kernels.patterns import Neighborhood
from vision_attn.kernels.weights import apply
from vision_attn.modules.neighborhood import spread_bias, weighted_sum, window_keys

__all__ = ["ContMix"]


class ContMix(nn.Module):
    """Context-mixing dynamic convolution: every token weighs the tokens of two windows around it.

    Queries of the tokens meet keys of the context, pooled to 7 x 7; their 49 products become, by one linear layer, a
    kernel of `small_window` and one of `window` for each of `2 * num_heads` groups. Both get a bias of relative
    positions and a softmax; the first half of the channels of the values is summed with the small kernel, the second
    with the large one.

    Takes maps `x` `[batch, height, width, dim]` and `context` `[batch, height, width, context_dim]`, and optionally
    other values of the shape of x; gives a map of the shape of x. A map with fewer than `window` tokens along an axis
    is enlarged bilinearly, and the result averaged back.

    Args:
        dim: channels of x, a multiple of `4 * num_heads`.
        context_dim: channels of the context.
        num_heads: half the number of groups.
        window, small_window: keys per axis, at least 1.

    Raises:
        ValueError: `dim` and `num_heads` that do not fit together, a window below 1 or smaller than the small one.

    >>> ContMix(16, 8, num_heads=2, window=7)(torch.randn(1, 9, 12, 16), torch.randn(1, 9, 12, 8)).shape
    torch.Size([1, 9, 12, 16])

    Paper: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int = 4,
        window: int = 13,
        small_window: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(
                f"dim {dim} must be a multiple of 4 * num_heads, which is {4 * num_heads}: half of the channels are "
                "cut into 2 * num_heads groups"
            )
        if not 1 <= small_window <= window:
            raise ValueError(f"windows must be 1 <= small_window <= window; got {small_window} and {window}")
        dd = {"device": device, "dtype": dtype}
        groups = 2 * num_heads
        self.groups, self.window, self.small_window = groups, window, small_window
        self.scale = (dim // groups) ** -0.5
        self.fused_attn = use_fused_attn()
        self.query = nn.Sequential(nn.Conv2d(dim, dim // 2, 1, bias=False, **dd), nn.BatchNorm2d(dim // 2, **dd))
        self.key = nn.Sequential(nn.Conv2d(context_dim, dim // 2, 1, bias=False, **dd), nn.BatchNorm2d(dim // 2, **dd))
        self.kernels = nn.Linear(49, small_window**2 + window**2, **dd)
        self.rpb1 = nn.Parameter(torch.zeros(groups, 2 * small_window - 1, 2 * small_window - 1, **dd))
        self.rpb2 = nn.Parameter(torch.zeros(groups, 2 * window - 1, 2 * window - 1, **dd))

    def forward(self, x: torch.Tensor, context: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        values = x if values is None else values
        size = values
        x, context, values = (enlarge(t, self.window) for t in (x, context, values))
        query = self.query(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(-1, (self.groups, -1)) * self.scale
        key = self.key(F.adaptive_avg_pool2d(context.permute(0, 3, 1, 2), 7)).flatten(2).unflatten(1, (self.groups, -1))
        likeness = torch.einsum("bhwgc,bgcl->bhwgl", query, key)
        kernels = self.kernels(likeness)
        small, large = kernels[..., : self.small_window * self.small_window], kernels[..., -self.window * self.window :]
        first, second = values.unflatten(-1, (2 * self.groups, -1)).chunk(2, 3)
        if not torch.jit.is_scripting() and self.fused_attn:
            out = [
                mix_fused(small, self.rpb1, first, self.small_window),
                mix_fused(large, self.rpb2, second, self.window),
            ]
        else:
            out = [
                mix(small, self.rpb1, first, self.small_window),
                mix(large, self.rpb2, second, self.window),
            ]
        return average_back(torch.cat(out, 3).flatten(3), size)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, window={self.window}, small_window={self.small_window}"


# Functions that depend on the size of the map are leaves of an fx graph; fx passes over names with an underscore.


@register_notrace_function
def enlarge(x: torch.Tensor, least: int) -> torch.Tensor:
    """Scale the map so that its shorter side has `least` tokens, if it has fewer."""
    height, width = x.shape[1], x.shape[2]
    if min(height, width) >= least:
        return x
    if height < width:
        size = [least, int(least / height * width)]
    else:
        size = [max(least, int(least / width * height)), least]
    return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


@register_notrace_function
def average_back(x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The map averaged down to the height and width of `size`."""
    height, width = size.shape[1], size.shape[2]
    if x.shape[1] == height and x.shape[2] == width:
        return x
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), [height, width]).permute(0, 2, 3, 1)


def _kernels(kernels: torch.Tensor, bias: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights that sum to 1 over each window, and the coordinates of its keys along both axes."""
    rows, row_entry = window_keys(kernels.shape[1], window, 1, 1, kernels.device)
    columns, column_entry = window_keys(kernels.shape[2], window, 1, 1, kernels.device)
    return (kernels + spread_bias(bias, row_entry, column_entry)).softmax(-1), rows, columns


@register_notrace_function
def mix(kernels: torch.Tensor, bias: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    weights, rows, columns = _kernels(kernels, bias, window)
    return weighted_sum(weights, values, rows, columns)


@register_notrace_function
def mix_fused(kernels: torch.Tensor, bias: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    weights, _, _ = _kernels(kernels, bias, window)
    return apply(weights.to(values.dtype), values, Neighborhood(window))
