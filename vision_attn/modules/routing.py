"""Bi-level routing attention: every region of a map attends to the regions that match it best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn
from torch import nn

from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns import BlockList, Dense

__all__ = ["BiLevelRoutingAttention", "routed_attention"]

FORMS = ("legacy", "nchw")
SMALL = 256  # tokens up to which lists of tiny blocks take longer on a CPU than one masked call,
MANY = 1024  # and tokens in all images from which copies take less time than that,
FEW = 8  # if no more than one region of that many is seen
AT_ONCE = 2**20  # numbers copied at a time


class BiLevelRoutingAttention(nn.Module):
    """Attention of each region of a map to the tokens of the `topk` regions whose mean key fits its mean query.

    Takes and returns maps `[batch, height, width, dim]`. The choice of regions is shared by all heads and gets no
    gradient. A 5 x 5 depthwise convolution of the values is added before the output projection. Scores are scaled by
    `dim ** -0.5`, the whole width, as in all released weights.

    Args:
        dim: channels.
        num_heads: divides `dim`.
        regions: regions per side. No parameter depends on it: set the attribute to change it later.
        topk: regions seen by each region, at least 1; all of them where the map has fewer.
        qkv_bias: bias of the first projection.
        form: "legacy" cuts the map into `regions` regions per side and pads the input, so that padded tokens have keys
            and count in the means. "nchw" makes regions of `height // regions` tokens, at least 1, and pads queries,
            keys and values with zeros, which do not count in the means.
        auto_pad: pad at the bottom and right where a map is not divisible into regions; if False that is an error.
        mask_padding: padded keys are not seen; only for "nchw". The original sees them, with score 0.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: sizes that do not fit together.

    From BiFormer: Vision Transformer with Bi-Level Routing Attention.

    >>> layer = BiLevelRoutingAttention(64, num_heads=2, topk=4)
    >>> layer(torch.randn(1, 28, 28, 64)).shape
    torch.Size([1, 28, 28, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        regions: int = 7,
        topk: int = 4,
        qkv_bias: bool = True,
        form: str = "legacy",
        auto_pad: bool = True,
        mask_padding: bool = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if regions < 1 or topk < 1:
            raise ValueError(f"regions and topk must be at least 1; got regions={regions}, topk={topk}")
        if form not in FORMS:
            raise ValueError(f"form {form!r}; allowed: {', '.join(map(repr, FORMS))}")
        if mask_padding and form == "legacy":
            raise ValueError("mask_padding needs form='nchw': padded tokens of the legacy form take part")
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.regions = regions
        self.topk = topk
        self.form = form
        self.auto_pad = auto_pad
        self.mask_padding = mask_padding
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1], x.shape[2]
        x = fitting(x, self.dim, self.regions, self.form == "legacy", self.auto_pad)
        qkv = self.qkv(x)
        out = routed_attention(qkv, self.num_heads, self.regions, self.topk, self.mask_padding, self.fused_attn)
        local = self.lepe(qkv[..., 2 * self.dim :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj((out + local)[:, :height, :width]))


@register_notrace_function
def fitting(x: torch.Tensor, dim: int, regions: int, divisible: bool, auto_pad: bool) -> torch.Tensor:
    """The map, checked, and with `divisible` padded at the bottom and right to whole regions.

    fx only takes functions for leaves whose names begin without an underscore.
    """
    if x.ndim != 4 or x.shape[-1] != dim:
        raise ValueError(f"the map must be [batch, height, width, {dim}]; got {x.shape}")
    below, right = -x.shape[1] % regions, -x.shape[2] % regions
    if below + right == 0:
        return x
    if not auto_pad:
        raise ValueError(
            f"a map of {x.shape[1]} x {x.shape[2]} cannot be cut into {regions} x {regions} equal regions; "
            "change regions, or set auto_pad=True"
        )
    return F.pad(x, (0, 0, 0, right, 0, below)) if divisible else x


@register_notrace_function
def routed_attention(
    qkv: torch.Tensor, num_heads: int, regions: int, topk: int, mask_padding: bool = False, fused: bool = True
) -> torch.Tensor:
    """The attention of `BiLevelRoutingAttention` without its projections.

    Args:
        qkv: map `[batch, height, width, 3 * dim]`: queries, keys, values, each of them head by head.
        regions: regions have `height // regions` x `width // regions` tokens, at least 1; the last ones are padded with
            zeros, which the means of regions do not count.
        topk: regions seen by each region.
        mask_padding: keys of padding are not seen.
        fused: run the block-list kernels; otherwise copy the chosen keys and values and attend with plain torch.

    Returns:
        Map `[batch, height, width, dim]`.

    >>> routed_attention(torch.randn(1, 14, 14, 3 * 64), num_heads=2, regions=7, topk=4).shape
    torch.Size([1, 14, 14, 64])
    """
    batch, height, width, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    h, w = max(height // regions, 1), max(width // regions, 1)
    down, across = -(-height // h), -(-width // w)
    tokens = _by_region(qkv, h, w)
    index = _choose(tokens, height, width, h, w, topk)
    q, k, v = tokens.view(batch, down * across * h * w, 3, num_heads, dim // num_heads).unbind(2)
    if mask_padding and (down * h > height or across * w > width):
        q, k = _hide_padding(q, k, height, width, h, w)
    scale = dim**-0.5
    if fused and not torch.jit.is_scripting():
        out = _by_blocks(q, k, v, index, h * w, scale)
    else:
        out = _by_copies(q, k, v, index, h * w, scale)
    out = out.reshape(batch, down, across, h, w, dim).transpose(2, 3)
    return out.reshape(batch, down * h, across * w, dim)[:, :height, :width]


def _by_region(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Map `[batch, height, width, channels]` to `[batch, regions, h * w, channels]`, padded with zeros."""
    batch, height, width, channels = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    below, right = -height % h, -width % w
    if below + right > 0:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    x = x.view(batch, (height + below) // h, h, (width + right) // w, w, channels)
    return x.transpose(2, 3).reshape(batch, -1, h * w, channels)


def _choose(tokens: torch.Tensor, height: int, width: int, h: int, w: int, topk: int) -> torch.Tensor:
    """The regions that each region sees, `[batch, regions, topk]`; `tokens` are those of `_by_region`."""
    means = tokens.detach()[..., : tokens.shape[-1] // 3 * 2].mean(2)
    if height % h + width % w > 0:  # means of real tokens only; a region has one at least
        rows, columns = torch.arange(height), torch.arange(width)
        real = torch.bincount(rows // h)[:, None] * torch.bincount(columns // w)
        means = means * (h * w / real).flatten()[:, None].to(means)
    q, k = means.chunk(2, -1)
    return (q @ k.transpose(1, 2)).topk(min(topk, k.shape[1]), dim=-1, sorted=False)[1]


def _hide_padding(
    q: torch.Tensor, k: torch.Tensor, height: int, width: int, h: int, w: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with one more channel, which makes keys of padding invisible."""
    real = torch.ones(1, height, width, 1, dtype=k.dtype, device=k.device)
    hidden = (_by_region(real, h, w).view(1, -1, 1, 1) - 1) * 30000  # near the end of half precision
    return torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, hidden.expand_as(k[..., :1])], -1)


def _by_blocks(q, k, v, index, block: int, scale: float):
    batch, regions, topk = index.shape
    if topk == regions:
        return attend(q, k, v, Dense(), scale=scale)
    if q.shape[1] <= SMALL:
        if q.device.type == "cpu" and batch * q.shape[1] >= MANY and topk * FEW <= regions:
            with torch.autocast("cpu", enabled=False):
                return _by_few_copies(q, k, v, index, block, scale)
        mask = q.new_full((batch, regions, regions), -torch.inf).scatter(-1, index, 0.0)
        mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    index = index.to(torch.int32)[:, None]
    return attend(q, k, v, BlockList(block, index, torch.full_like(index[..., 0], topk)), scale=scale)


def _by_copies(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, block: int, scale: float
) -> torch.Tensor:
    """The definition, with topk copies of the keys and values; all `[batch, tokens, heads, channels]`."""
    regions, which = index.shape[1], torch.arange(index.shape[0], device=q.device)[:, None, None]
    k, v = (t.unflatten(1, (regions, block))[which, index].flatten(2, 3).transpose(2, 3) for t in (k, v))
    scores = q.unflatten(1, (regions, block)).transpose(2, 3) @ k.transpose(-2, -1) * scale
    return (scores.softmax(-1) @ v).transpose(2, 3).flatten(1, 2)


def _by_few_copies(q, k, v, index, block: int, scale: float):
    """As `_by_copies`, without moving heads: each query has one row per head, which is 0 in the channels of the others.
    Some images at a time, so that the copies stay in the cache."""
    (_, regions, topk), heads = index.shape, q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    own = torch.eye(heads, dtype=dtype, device=q.device)[..., None] * scale
    at_once = max(AT_ONCE // (regions * topk * block * (k[0, 0].numel() + v[0, 0].numel())), 1)
    outs = []
    for query, key, value, some in zip(*(t.split(at_once) for t in (q, k, v, index)), strict=True):
        each = len(some) * regions
        chosen = (some + regions * torch.arange(len(some), device=q.device)[:, None, None]).flatten()
        key, value = (
            t.reshape(each, -1).index_select(0, chosen).view(each, topk * block, -1).to(dtype) for t in (key, value)
        )
        rows = (query.unsqueeze(2).to(dtype) * own).view(each, block * heads, -1)
        out = (rows @ key.transpose(1, 2)).softmax(-1) @ value
        out = out.view(len(some), regions * block, heads, heads, -1).diagonal(dim1=2, dim2=3)
        outs.append(out.transpose(2, 3))
    return torch.cat(outs).to(q.dtype)
