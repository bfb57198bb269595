"""Convolutions between maps `[batch, height, width, dim]`, and how layers start."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["ConvTokens", "init_conv"]


class ConvTokens(nn.Module):
    """A convolution to a map `[batch, height, width, dim]`, from an image or from another map.

    Args:
        kernel, stride: equal for whole patches, where a rest of the map is cut off; otherwise they overlap and the map
            is padded.
        image: the input is `[batch, in_dim, height, width]`.
        prenorm, norm: a layer norm before and after.

    >>> ConvTokens(16, 32, kernel=3, stride=2)(torch.randn(1, 9, 14, 16)).shape
    torch.Size([1, 5, 7, 32])
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int,
        stride: int,
        image: bool = False,
        prenorm: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        self.image = image
        self.prenorm = nn.LayerNorm(in_dim, eps=1e-6) if prenorm else nn.Identity()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, 0 if kernel == stride else kernel // 2)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.image:
            x = self.prenorm(x).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def init_conv(module: nn.Module) -> None:
    """Weights of a convolution scaled by what each input reaches, and no bias; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
