"""Quadrangle attention: each head of each window reads from a window that it shears, turns, moves and tilts."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module, trunc_normal_
from torch import nn

from vision_attn.modules.varied_window import VariedWindowAttention, offsets, table_bias

__all__ = ["QuadrangleAttention"]


@register_notrace_module
class QuadrangleAttention(VariedWindowAttention):
    """Varied-size window attention with a projective map of the window instead of shifts and stretches alone.

    Takes and returns maps `[batch, height, width, dim]`. Nine numbers are predicted per head and window; with all of
    them 0 this is plain window attention.

    Args:
        dim: channels, a multiple of `num_heads`.
        window: tokens per side of a window, at least 2.
        decomposed: relative positions as two embeddings per axis that are multiplied with the query, shared by the
            heads, instead of a table of one number per relative position and head.
        pull: added to the gradient of what is sampled outside of the map, to bring it back, times 10; the published
            models train with 0.1.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: sizes that do not fit together.

    From Vision Transformer with Quadrangle Attention.

    >>> QuadrangleAttention(32, num_heads=4, decomposed=True)(torch.randn(1, 20, 15, 32)).shape
    torch.Size([1, 20, 15, 32])
    """

    predictions = 9  # shift x, y, stretch x, y, shear x, y, perspective x, y, angle

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 7,
        decomposed: bool = False,
        qkv_bias: bool = True,
        pull: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, window, qkv_bias=qkv_bias, pull=pull, proj_drop=proj_drop, **dd)
        self.rel_pos_h = self.rel_pos_w = None
        if decomposed:
            self.relative_position_bias_table = None
            self.rel_pos_h = nn.Parameter(torch.empty(2 * window - 1, dim // num_heads, **dd))
            self.rel_pos_w = nn.Parameter(torch.empty(2 * window - 1, dim // num_heads, **dd))
            trunc_normal_(self.rel_pos_h, std=0.02)
            trunc_normal_(self.rel_pos_w, std=0.02)

    def warp(
        self, moves: torch.Tensor, slots: torch.Tensor, half: tuple[float, float], unit: tuple[float, float]
    ) -> torch.Tensor:
        x, y = slots[0] / half[0], slots[1] / half[1]  # shears and tilts are shares of the map
        shift_x, shift_y, stretch_x, stretch_y, shear_x, shear_y, tilt_x, tilt_y, angle = moves.unbind(0)
        depth = tilt_x * x + tilt_y * y + 1
        depth = torch.where(depth == 0, torch.full_like(depth, 1e-6), depth)
        x, y = x * (1 + stretch_x), y * (1 + stretch_y)
        x, y = x + shear_x * y, y + shear_y * x
        cos, sin = angle.cos(), angle.sin()
        x, y = cos * x + sin * y, cos * y - sin * x
        return torch.stack([(x * half[0] + shift_x * unit[0]) / depth, (y * half[1] + shift_y * unit[1]) / depth])

    def bias(self, qkv: torch.Tensor) -> torch.Tensor:
        if self.relative_position_bias_table is not None:
            return table_bias(self.relative_position_bias_table, self.window).to(qkv.dtype)
        else:  # the branch that TorchScript leaves out when there is a table
            apart = offsets(self.window, qkv.device)
            q = self.queries(qkv).unflatten(2, (self.window, self.window))
            by_row = torch.einsum("nmyxd,ykd->nmyxk", q, self.rel_pos_h[apart].to(q.dtype))
            by_column = torch.einsum("nmyxd,xkd->nmyxk", q, self.rel_pos_w[apart].to(q.dtype))
            return (by_row[..., None] + by_column[..., None, :]).flatten(4, 5).flatten(2, 3)
