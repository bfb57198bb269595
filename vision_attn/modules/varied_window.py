"""Varied-size window attention: each head of each window moves and stretches the window that it reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_, use_fused_attn
from torch import nn

from vision_attn.kernels.native.sampled import sampled_windows
from vision_attn.modules.softmax import check_heads, softmax_attention

__all__ = ["VariedWindowAttention"]

DIALECTS = ("swin", "classification", "detection")


@register_notrace_module
class VariedWindowAttention(nn.Module):
    """Window attention whose keys and values are sampled from a window that is predicted per head.

    Takes maps `[batch, height, width, dim]` of any size and returns `[batch, height, width, out_dim]`. From the mean of
    a window two shifts and two stretches are predicted for each head; keys and values are read there bilinearly, zero
    outside of the map. Maps are padded with zeros to whole windows, and what is padded is seen. With all predictions 0
    this is plain window attention.

    Args:
        dim: channels, a multiple of `num_heads`.
        window: tokens per side of a window, at least 2.
        out_dim: channels of keys, values and output, `dim` when None.
        dialect: three published codes differ where a map is not square or not made of whole windows. "swin" pads at the
            bottom and right, and a shift of 1 is 1 / windows of the padded map, whose width is 2; its windows start
            unmoved. "classification" (ViTAE) counts the whole windows before padding, at least one; "detection" also
            pads on both sides, and takes the count along the height for x and the other for y.
        pull: added to the gradient of what is sampled outside of the map, to bring it back, times 10; 0 for none.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: sizes that do not fit together.

    From VSA: Learning Varied-Size Window Attention in Vision Transformers.

    >>> VariedWindowAttention(32, num_heads=4)(torch.randn(1, 20, 15, 32)).shape
    torch.Size([1, 20, 15, 32])
    """

    predictions = 4  # per head and window: shift x, shift y, stretch x, stretch y

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 7,
        out_dim: int | None = None,
        dialect: str = "swin",
        qkv_bias: bool = True,
        pull: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        out_dim = out_dim or dim
        check_heads(dim, num_heads)
        check_heads(out_dim, num_heads)
        if window < 2:
            raise ValueError(f"window must be at least 2 tokens, got {window}")
        if dialect not in DIALECTS:
            raise ValueError(f"dialect {dialect!r}; allowed: {', '.join(map(repr, DIALECTS))}")
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.out_dim = out_dim
        self.num_heads = num_heads
        self.window = window
        self.dialect = dialect
        self.pull = pull
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias, **dd)
        self.transform = nn.Linear(dim, self.predictions * num_heads, **dd)
        self.proj = nn.Linear(out_dim, out_dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **dd))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.reset_transform()

    @torch.jit.ignore
    def reset_transform(self) -> None:
        """Start with unmoved windows; the ViTAE codes keep random ones."""
        if self.dialect == "swin":
            nn.init.zeros_(self.transform.weight)
            nn.init.zeros_(self.transform.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"the map must be [batch, height, width, {self.dim}]; got {x.shape}")
        height, width, size = x.shape[1], x.shape[2], self.window
        below, right = -height % size, -width % size
        top, left = (below // 2, right // 2) if self.dialect == "detection" else (0, 0)
        pad = [0, 0, left, right - left, top, below - top]
        padded, qkv = x, self.qkv(x)
        if below + right > 0:
            padded, qkv = F.pad(x, pad), F.pad(qkv, pad)
        means = F.avg_pool2d(padded.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
        points = self.points(means, height, width)
        out = self.attention(qkv, points)
        return self.proj_drop(self.proj(out[:, top : top + height, left : left + width]))

    def attention(self, qkv: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Queries stay, and keys and values are sampled; `[batch, height, width, out_dim]` of whole windows."""
        heads, bias = self.num_heads, self.bias(qkv)
        if self.fused_attn and not torch.jit.is_scripting():
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(3)
            out = sampled_windows(q, k, v, points, bias, self.scale)
            if out is not None:
                return out.flatten(3)
        q = self.queries(qkv)
        kv = qkv[..., self.out_dim :].unflatten(-1, (2, heads, -1)).to(points.dtype)
        kv = sample(kv, points).to(q.dtype).flatten(0, 1)
        k, v = kv.chunk(2, -1)
        out = softmax_attention(q, k, v, self.fused_attn, 0.0, bias, self.scale)
        batch, height, width, size = qkv.shape[0], qkv.shape[1], qkv.shape[2], self.window
        out = out.view(batch, height // size, width // size, heads, size, size, out.shape[-1])
        out = out.permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(batch, height, width, self.out_dim)

    def queries(self, qkv: torch.Tensor) -> torch.Tensor:
        """`[batch * windows, heads, tokens, head_dim]`."""
        batch, height, width, size = qkv.shape[0], qkv.shape[1], qkv.shape[2], self.window
        q = qkv[..., : self.out_dim].unflatten(-1, (self.num_heads, -1))
        q = q.reshape(batch, height // size, size, width // size, size, self.num_heads, q.shape[-1])
        return q.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

    def points(self, means: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Where to read, `[2, batch, windows, heads, tokens]`: x and y, from 0 for the first token of the padded map.

        `means` are those of windows, `[batch, down, across, dim]`; `height` and `width` those of the map unpadded.
        """
        down, across, size = means.shape[1], means.shape[2], self.window
        moves = self.transform(F.leaky_relu(means)).unflatten(-1, (self.num_heads, 1, 1, -1)).movedim(-1, 0)
        moves = moves.to(torch.promote_types(moves.dtype, torch.float32))  # half precision would blur the places
        by_x, by_y = across, down
        if self.dialect != "swin":
            by_x, by_y = max(width // size, 1), max(height // size, 1)
            if self.dialect == "detection":
                by_x, by_y = by_y, by_x
        whole = (across * size - 1) / 2, (down * size - 1) / 2  # half of the map
        slot = torch.arange(size, dtype=moves.dtype, device=moves.device) - (size - 1) / 2
        slots = torch.stack([slot.expand(size, -1), slot[:, None].expand(-1, size)])
        points = self.warp(moves, slots, whole, (whole[0] / by_x, whole[1] / by_y))
        first, last = (size - 1) / 2, max(down, across) * size
        middle = torch.arange(first, last, size, dtype=moves.dtype, device=moves.device)  # of windows, on either axis
        middles = torch.stack([middle[:across].expand(down, -1), middle[:down, None].expand(-1, across)])
        points = (points + middles[:, None, :, :, None, None, None]).flatten(5, 6).flatten(2, 3)
        if self.pull > 0 and not torch.jit.is_scripting():
            _pull_inside(points, whole, self.pull)
        return points

    def warp(
        self, moves: torch.Tensor, slots: torch.Tensor, half: tuple[float, float], unit: tuple[float, float]
    ) -> torch.Tensor:
        """Places in windows `[2, ..., window, window]`, relative to their middles, after the predicted moves.

        `moves` are `[predictions, ..., 1, 1]`; `slots` the places before the moves, `[2, window, window]`; `half` the
        map from its middle to its end, and `unit` a shift of 1, along x and y. All in tokens.
        """
        shift = torch.stack([moves[0] * unit[0], moves[1] * unit[1]])
        return torch.addcmul(shift, slots[:, None, None, None, None], moves[2:] + 1)

    def bias(self, qkv: torch.Tensor) -> torch.Tensor:
        """Added to the scaled scores; it belongs to the slots of a window, wherever they were moved."""
        return table_bias(self.relative_position_bias_table, self.window).to(qkv.dtype)


def sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Maps `[batch, height, width, parts, heads, dim]` between tokens, zero outside, at points `[2, batch, windows,
    heads, tokens]`: `[batch, windows, heads, tokens, parts * dim]`."""
    batch, height, width, heads = maps.shape[0], maps.shape[1], maps.shape[2], maps.shape[4]
    maps = maps.permute(0, 4, 1, 2, 3, 5).flatten(4).flatten(0, 1)
    if maps.device.type == "cpu" and points.numel() >= 4096:
        return _sums_of_rows(maps, points)
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=points.dtype, device=points.device)
    places = points.permute(1, 3, 2, 4, 0).flatten(0, 1) / half - 1
    out = F.grid_sample(maps.permute(0, 3, 1, 2), places, mode="bilinear", padding_mode="zeros", align_corners=True)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 4, 2)


def _sums_of_rows(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """As `F.grid_sample`, with four rows of `[batch * heads, height, width, channels]` to a point: many points take a
    quarter of the time on a CPU."""
    batch, windows, heads, tokens = points.shape[1], points.shape[2], points.shape[3], points.shape[4]
    height, width = maps.shape[1], maps.shape[2]
    last = torch.tensor([width - 1, height - 1], device=points.device).view(2, 1, 1, 1, 1)
    before = points.detach().nan_to_num().floor()
    share = points - before
    near = torch.stack([before, before + 1])  # the tokens on both sides, of x and y
    hidden = (near < 0) | (near > last)
    weights = torch.stack([1 - share, share]).masked_fill(hidden, 0.0)
    near = near.masked_fill_(hidden, 0.0).long()
    first = torch.arange(0, batch * heads * height, height, device=maps.device).view(batch, 1, heads, 1)
    corners = ((near[:, 1] + first) * width)[:, None] + near[:, 0]
    weights = (weights[:, 1][:, None] * weights[:, 0]).view(4, -1).mT
    out = F.embedding_bag(corners.view(4, -1).mT, maps.flatten(0, 2), mode="sum", per_sample_weights=weights)
    return out.view(batch, windows, heads, tokens, -1)


def offsets(size: int, device: torch.device) -> torch.Tensor:
    """Entry `query - key + size - 1` of a table, for each pair on an axis of a window."""
    slot = torch.arange(size, device=device)
    return slot[:, None] - slot + size - 1


def table_bias(table: torch.Tensor, size: int) -> torch.Tensor:
    """Table `[(2 * size - 1) ** 2, heads]` of relative positions to `[1, heads, size ** 2, size ** 2]`."""
    apart = offsets(size, table.device)
    pairs = (apart[:, None, :, None] * (2 * size - 1) + apart[:, None]).flatten(2, 3).flatten(0, 1)
    return table[pairs].permute(2, 0, 1)[None]


def _pull_inside(points: torch.Tensor, half: tuple[float, float], pull: float) -> None:
    """Push points that lie outside of the map towards it, whatever the loss says."""
    if points.requires_grad:
        half = torch.tensor(half, dtype=points.dtype, device=points.device).view(2, 1, 1, 1, 1)
        ends = points.detach() / half - 1  # from -1 to 1 on the map
        outside = (ends > 1.001).to(points.dtype) - (ends < -1.001).to(points.dtype)
        points.register_hook(lambda grad: grad + 10 * pull * outside / half)
