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
SMALL = 256  # tokens up to which one masked call takes less time than lists of tiny blocks,
MANY = 4096  # unless the images have as many queries in all heads as the CPU kernel takes lists of


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
        down, across = x.shape[1], x.shape[2]
        tokens = self.qkv(by_region(x, self.regions))  # what goes in is a third of what comes out
        out = attention_of_regions(
            tokens, down, across, self.num_heads, self.regions, self.topk, self.mask_padding, self.fused_attn
        )
        values = by_map(tokens[..., 2 * self.dim :], down, across, self.regions)
        local = self.lepe(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
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
    tokens = by_region(qkv, regions)
    return attention_of_regions(tokens, qkv.shape[1], qkv.shape[2], num_heads, regions, topk, mask_padding, fused)


@register_notrace_function
def by_region(x: torch.Tensor, regions: int) -> torch.Tensor:
    """Map `[batch, height, width, channels]` to `[batch, regions, tokens, channels]`, padded with zeros."""
    height, width = x.shape[1], x.shape[2]
    h, w = _size(height, width, regions)
    below, right = -height % h, -width % w
    if below + right > 0:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    down, across = (height + below) // h, (width + right) // w
    x = x.view(x.shape[0], down, h, across, w, x.shape[3]).transpose(2, 3)
    return x.reshape(x.shape[0], down * across, h * w, x.shape[5])


@register_notrace_function
def by_map(x: torch.Tensor, height: int, width: int, regions: int) -> torch.Tensor:
    """`by_region` undone, padding taken off."""
    h, w = _size(height, width, regions)
    down, across = -(-height // h), -(-width // w)
    x = x.reshape(x.shape[0], down, across, h, w, x.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], down * h, across * w, x.shape[-1])[:, :height, :width]


@register_notrace_function
def attention_of_regions(
    tokens: torch.Tensor,
    height: int,
    width: int,
    num_heads: int,
    regions: int,
    topk: int,
    mask_padding: bool = False,
    fused: bool = True,
) -> torch.Tensor:
    """`routed_attention` of the map of that size whose regions `by_region` made; what is in padding counts as 0."""
    batch, count, size, dim = tokens.shape[0], tokens.shape[1], tokens.shape[2], tokens.shape[3] // 3
    h, w = _size(height, width, regions)
    padded = count * size > height * width
    if padded:
        tokens = tokens * _real(tokens, height, width, regions)
    index = _choose(tokens, height, width, h, w, topk)
    q, k, v = tokens.view(batch, count * size, 3, num_heads, dim // num_heads).unbind(2)
    if mask_padding and padded:  # one more channel makes keys of padding invisible
        hidden = (_real(tokens, height, width, regions).view(1, -1, 1, 1) - 1) * 30000  # near the end of half precision
        q, k = torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, hidden.expand_as(k[..., :1])], -1)
    scale = dim**-0.5
    if fused and not torch.jit.is_scripting() and not torch.jit.is_tracing():
        out = _by_blocks(q, k, v, index, size, scale)
    else:
        out = _by_copies(q, k, v, index, size, scale)
    return by_map(out.reshape(batch, count, size, dim), height, width, regions)


def _real(like: torch.Tensor, height: int, width: int, regions: int) -> torch.Tensor:
    """1 for tokens and 0 for padding, `[1, regions, tokens, 1]`."""
    return by_region(torch.ones(1, height, width, 1, dtype=like.dtype, device=like.device), regions)


def _size(height: int, width: int, regions: int) -> tuple[int, int]:
    return max(height // regions, 1), max(width // regions, 1)


def _choose(tokens: torch.Tensor, height: int, width: int, h: int, w: int, topk: int) -> torch.Tensor:
    """The regions that each region sees, `[batch, regions, topk]`; `tokens` are those of `by_region`."""
    means = tokens.detach()[..., : tokens.shape[-1] // 3 * 2].mean(2)
    if height % h + width % w > 0:  # means of real tokens only; a region has one at least
        rows, columns = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
        real = torch.bincount(rows // h)[:, None] * torch.bincount(columns // w)
        means = means * (h * w / real).flatten()[:, None].to(means)
    q, k = means.chunk(2, -1)
    return (q @ k.transpose(1, 2)).topk(min(topk, k.shape[1]), dim=-1, sorted=False)[1]


class _Chosen(BlockList):
    """Lists that came out of `topk`: nothing can be wrong with them, and to look takes a fifth of a small call."""

    def check(self, grid: tuple[int, ...]) -> None:
        pass


def _by_blocks(q, k, v, index, block: int, scale: float):
    batch, regions, topk = index.shape
    if topk == regions:
        return attend(q, k, v, Dense(), scale=scale)
    if q.shape[1] <= SMALL and (q.device.type != "cpu" or batch * q.shape[1] * q.shape[2] < MANY):
        mask = q.new_full((batch, regions, regions), -torch.inf).scatter(-1, index, 0.0)
        mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    index = index.to(torch.int32)[:, None]
    return attend(q, k, v, _Chosen(block, index, torch.full_like(index[..., 0], topk)), scale=scale)


def _by_copies(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, block: int, scale: float
) -> torch.Tensor:
    """The definition, with topk copies of the keys and values; all `[batch, tokens, heads, channels]`."""
    regions, which = index.shape[1], torch.arange(index.shape[0], device=q.device)[:, None, None]
    k, v = (t.unflatten(1, (regions, block))[which, index].flatten(2, 3).transpose(2, 3) for t in (k, v))
    scores = q.unflatten(1, (regions, block)).transpose(2, 3) @ k.transpose(-2, -1) * scale
    return (scores.softmax(-1) @ v).transpose(2, 3).flatten(1, 2)
