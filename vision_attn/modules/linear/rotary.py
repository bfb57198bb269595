"""Axial rotary positions: one half of the channels turns with the row of a token, the other half with its column."""

from __future__ import annotations

import math

import torch

__all__ = ["axial_turns", "check_rotary", "rotate"]


def check_rotary(head_dim: int) -> None:
    """Raise if heads of this width cannot be split into pairs for rows and pairs for columns."""
    if head_dim % 4 or head_dim < 8:
        raise ValueError(f"rotary positions need a head_dim that is a multiple of 4 and at least 8; got {head_dim}")


def axial_turns(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers of modulus 1 for `rotate`, `[height, width, 1, head_dim / 2]`, for x `[batch, height, width,
    heads, head_dim]`.

    The `head_dim / 4` speeds go geometrically from 1 to 1/10000 radians per token, for rows and for columns.
    """
    height, width, speeds = x.shape[1], x.shape[2], x.shape[4] // 4
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    speed = torch.exp(torch.linspace(0.0, -math.log(10000.0), speeds, dtype=dtype, device=x.device))
    rows = torch.arange(height, dtype=dtype, device=x.device)[:, None] * speed
    columns = torch.arange(width, dtype=dtype, device=x.device)[:, None] * speed
    angle = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], -1)
    return torch.polar(torch.ones_like(angle), angle)[:, :, None]


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of channels of x `[batch, height, width, heads, head_dim]`, in float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)
