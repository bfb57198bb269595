"""Absolute position tables, for maps of any size."""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed_nhwc, trunc_normal_
from torch import nn

__all__ = ["PositionTable", "read_table"]


class PositionTable(nn.Module):
    """Adds a learned table `[1, height, width, dim]` to maps `[batch, height, width, dim]`; bicubic for other sizes.

    >>> PositionTable(16, (14, 14))(torch.zeros(2, 7, 9, 16)).shape
    torch.Size([2, 7, 9, 16])
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, *grid, dim))
        trunc_normal_(self.table, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + resample_abs_pos_embed_nhwc(self.table, [x.shape[1], x.shape[2]])


def read_table(weights: dict[str, torch.Tensor], key: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """`weights` with the table under `key` in the shape of the model's, where it is a published list of tokens
    `[1, tokens, dim]` of a square map.

    Raises:
        ValueError: the tokens do not make a square.
    """
    table, (_, height, width, _) = weights[key], model.get_parameter(key).shape
    if table.ndim == 3:
        side = round(table.shape[1] ** 0.5)
        if side * side != table.shape[1]:
            raise ValueError(f"the position table has {table.shape[1]} tokens, which do not make a square")
        table = table.unflatten(1, (side, side))
    return {**weights, key: resample_abs_pos_embed_nhwc(table, [height, width])}
