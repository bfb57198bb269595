"""Neighborhood attention as a layer, with the relative position bias and the small-map rules of NAT and DiNAT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_, use_fused_attn
from torch import nn

from vision_attn.kernels.patterns import Neighborhood
from vision_attn.modules.fused import grid_attention

__all__ = ["NeighborhoodAttention"]

SMALL_MAPS = ("pad", "error", "shrink")
# Functions that depend on the size of the map are leaves of an fx graph; fx passes over names with an underscore.


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every token with the `window` x `window` tokens around it, moved inward at borders.

    Input and output are maps `[batch, height, width, dim]`; `head_dim = dim / num_heads`.

    Args:
        dim: channels, a multiple of `num_heads`.
        window: keys per axis, at least 1.
        dilation: step between the keys, at least 1.
        stride: neighbouring queries per axis that share one window, 1 to `window`.
        rel_pos_bias: learn one number per head and relative position, `rpb` `[heads, 2 * window - 1, 2 * window - 1]`,
            entry `(key - query) / dilation + window - 1`, rows first.
        small_map: what to do with a map that has fewer than `window * dilation` tokens along an axis. "pad" adds zeros
            at the bottom and right before the projection, which take part as keys and values, as the layer of the NAT
            and DiNAT weights did; "error" raises; "shrink" lowers the dilation, then the window, until they fit.
        attn_drop, proj_drop: dropout rates of the weights and of the output, 0 to 1.

    Raises:
        ValueError: an option out of range; a map that is too small with `small_map="error"`.

    >>> NeighborhoodAttention(32, num_heads=4, window=7, dilation=2)(torch.randn(1, 20, 15, 32)).shape
    torch.Size([1, 20, 15, 32])

    Papers: Neighborhood Attention Transformer; Dilated Neighborhood Attention Transformer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 7,
        dilation: int = 1,
        stride: int = 1,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        small_map: str = "pad",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} must be a multiple of num_heads, which is {num_heads}")
        if small_map not in SMALL_MAPS:
            raise ValueError(f"small_map={small_map!r}; allowed: {', '.join(map(repr, SMALL_MAPS))}")
        Neighborhood(window, stride, dilation)  # raises what is wrong with them
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.window, self.dilation, self.stride = num_heads, window, dilation, stride
        self.scale = (dim // num_heads) ** -0.5
        self.small_map = small_map
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1, **dd)) if rel_pos_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        x = fit_map(x, self.window * self.dilation, self.small_map)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, dim // self.num_heads))
        q, k, v = qkv.unbind(3)
        if not torch.jit.is_scripting() and self.fused_attn and not (self.training and self.attn_drop.p > 0):
            out = fused_attention(q, k, v, self.rpb, self.scale, self.window, self.dilation, self.stride)
        else:
            scores, rows, columns = window_scores(q, k, self.rpb, self.scale, self.window, self.dilation, self.stride)
            out = weighted_sum(self.attn_drop(scores.softmax(-1)), v, rows, columns)
        return self.proj_drop(self.proj(out.flatten(3)[:, :height, :width]))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, window={self.window}, dilation={self.dilation}, stride={self.stride}"


@register_notrace_function
def fit_map(x: torch.Tensor, need: int, small_map: str) -> torch.Tensor:
    """Apply the rule for maps with fewer than `need` tokens along an axis."""
    height, width = x.shape[1], x.shape[2]
    if (height >= need and width >= need) or small_map == "shrink":
        return x
    if small_map == "error":
        raise ValueError(
            f"the map has {height} x {width} tokens but window times dilation is {need}; "
            "use a smaller window, or small_map='pad' or 'shrink'"
        )
    return F.pad(x, [0, 0, 0, max(0, need - width), 0, max(0, need - height)])


def _options(extent: int, window: int, dilation: int, stride: int) -> tuple[int, int, int]:
    """Window, dilation and stride on an axis; a short axis lowers the dilation first, then the window."""
    if window * dilation > extent:  # only then do they depend on the map, which torch.compile may not know
        dilation = max(1, extent // window)
        window = min(window, extent)
        stride = min(stride, window)
    return window, dilation, stride


def _centre(bias: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The relative positions of a smaller window, `[heads, 2 * rows - 1, 2 * columns - 1]`."""
    window = (bias.shape[1] + 1) // 2
    return bias[:, window - rows : window + rows - 1, window - columns : window + columns - 1]


@register_notrace_function
def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    window: int,
    dilation: int,
    stride: int,
) -> torch.Tensor:
    windows, dilations, strides = zip(*(_options(n, window, dilation, stride) for n in q.shape[1:3]), strict=True)
    if bias is not None:
        bias = _centre(bias, windows[0], windows[1]).to(q.dtype)
    return grid_attention(q, k, v, Neighborhood(windows, strides, dilations), scale=scale, bias=bias)


def window_keys(
    extent: int, window: int, dilation: int, stride: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of the keys of every query along an axis, and their entries in the bias: both `[extent, window]`."""
    query = torch.arange(extent, device=device)
    group = query % dilation
    place = query // dilation
    members = (extent - group + dilation - 1) // dilation
    leader = torch.minimum(place // stride * stride + stride // 2, members - 1)
    start = torch.minimum((leader - window // 2).clamp(min=0), members - window)
    slots = start[:, None] + torch.arange(window, device=device)
    return group[:, None] + dilation * slots, slots - place[:, None] + window - 1


@register_notrace_function
def window_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    window: int,
    dilation: int,
    stride: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[batch, height, width, heads, keys]`, and the coordinates of the keys along both axes."""
    tall, vertical, by_row = _options(q.shape[1], window, dilation, stride)
    wide, horizontal, by_column = _options(q.shape[2], window, dilation, stride)
    rows, row_entry = window_keys(q.shape[1], tall, vertical, by_row, q.device)
    columns, column_entry = window_keys(q.shape[2], wide, horizontal, by_column, q.device)
    scores = torch.einsum("bhwmd,bhrwcmd->bhwmrc", q * scale, _gather(k, rows, columns)).flatten(4)
    if bias is not None:
        scores = scores + spread_bias(_centre(bias, tall, wide), row_entry, column_entry).to(scores.dtype)
    return scores, rows, columns


def spread_bias(bias: torch.Tensor, row_entry: torch.Tensor, column_entry: torch.Tensor) -> torch.Tensor:
    """What the table of relative positions adds to each score: `[height, width, heads, keys]`."""
    table = bias[:, row_entry[:, None, :, None], column_entry[None, :, None, :]]
    return table.permute(1, 2, 0, 3, 4).flatten(3)


@register_notrace_function
def weighted_sum(weights: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    weights = weights.unflatten(-1, (rows.shape[1], columns.shape[1])).to(v.dtype)
    return torch.einsum("bhwmrc,bhrwcmd->bhwmd", weights, _gather(v, rows, columns))


def _gather(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Every query's window of x: `[batch, height, window, width, window, heads, head_dim]`."""
    x = x.index_select(1, rows.flatten()).unflatten(1, rows.shape)
    return x.index_select(3, columns.flatten()).unflatten(3, columns.shape)
