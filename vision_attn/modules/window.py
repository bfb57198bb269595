"""Window attention as a layer: the map is cut into squares whose tokens see each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_, use_fused_attn
from torch import nn

from vision_attn.modules.softmax import check_heads, softmax_attention, split_heads

__all__ = ["WindowAttention2d"]


@register_notrace_module
class WindowAttention2d(nn.Module):
    """Softmax attention inside windows of `window` x `window` tokens.

    Input and output are maps `[batch, height, width, dim]`. A map that does not divide into windows gets zeros at the
    bottom and right before the projection, which take part as keys and values, as in the models this serves.

    Args:
        shift: tokens by which the windows are moved, 0 to `window - 1`; Swin uses `window // 2` in every second layer.
        rel_pos_bias: learn one number per head and relative position, row `(2 * window - 1) * dy + dx` of
            `relative_position_bias_table`, with dy and dx `query - key + window - 1`.
        small_map: on an axis with at most `window` tokens, "shrink" makes the window the map, without shift, and uses
            the middle of the table, as Swin does; "pad" keeps the window.

    Raises:
        ValueError: an option out of range.

    >>> WindowAttention2d(32, num_heads=4, window=7, shift=3)(torch.randn(1, 20, 15, 32)).shape
    torch.Size([1, 20, 15, 32])

    Paper: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 7,
        shift: int = 0,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        small_map: str = "shrink",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"window must be at least 1 and shift from 0 to window - 1; got {window} and {shift}")
        if small_map not in ("shrink", "pad"):
            raise ValueError(f"small_map {small_map!r}; allowed: 'shrink', 'pad'")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.shrink = small_map == "shrink"
        self.fused_attn = use_fused_attn()
        self.relative_position_bias_table = (
            nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **dd)) if rel_pos_bias else None
        )
        if self.relative_position_bias_table is not None:
            trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        rows, columns = self._extents(height), self._extents(width)
        down, right = self._shift(height), self._shift(width)
        x = F.pad(x, [0, 0, 0, -width % columns, 0, -height % rows])
        if down + right > 0:
            x = x.roll((-down, -right), (1, 2))
        tall, wide = x.shape[1] // rows, x.shape[2] // columns
        x = x.view(batch * tall, rows, wide, columns, dim).transpose(1, 2).reshape(-1, rows * columns, dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        mask = self._bias(rows, columns)
        if down + right > 0:
            row, column = self._parts(tall, rows, down, x.device), self._parts(wide, columns, right, x.device)
            part = (3 * row[:, None, :, None] + column[None, :, None, :]).view(tall * wide, rows * columns)
            hidden = (part[:, :, None] != part[:, None]).to(q.dtype)[:, None] * -100.0
            mask = (hidden if mask is None else hidden + mask.to(q.dtype)).repeat(batch, 1, 1, 1)
        if mask is not None:
            mask = mask.to(q.dtype)
        out = softmax_attention(q, k, v, self.fused_attn, mask=mask).transpose(1, 2).reshape(x.shape)
        out = self.proj(out).view(batch, tall, wide, rows, columns, dim).transpose(2, 3)
        out = out.reshape(batch, tall * rows, wide * columns, dim)
        if down + right > 0:
            out = out.roll((down, right), (1, 2))
        return out[:, :height, :width]

    def _extents(self, tokens: int) -> int:
        return min(self.window, tokens) if self.shrink else self.window

    def _shift(self, tokens: int) -> int:
        return self.shift if tokens > self.window else 0

    def _bias(self, rows: int, columns: int) -> torch.Tensor | None:
        """`[1, heads, tokens, tokens]` of a window."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        row = torch.arange(rows, device=table.device)
        column = torch.arange(columns, device=table.device)
        dy = (row[:, None] - row + self.window - 1)[:, None, :, None]
        dx = (column[:, None] - column + self.window - 1)[None, :, None, :]
        pairs = ((2 * self.window - 1) * dy + dx).view(rows * columns, rows * columns)
        return table[pairs].permute(2, 0, 1)[None]

    def _parts(self, windows: int, tokens: int, shift: int, device: torch.device) -> torch.Tensor:
        """Which part of the map the tokens of an axis came from, `[windows, tokens]`: the last window has two."""
        place = torch.arange(windows * tokens, device=device)
        last = windows * tokens
        return ((place >= last - tokens).long() + (place >= last - shift).long()).view(windows, tokens)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, window={self.window}, shift={self.shift}"
