"""Large depthwise kernels that train with smaller ones beside them and merge into one."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["LargeKernel"]

# Kernel size: sizes and dilations of the smaller kernels that are trained beside it.
_BRANCHES = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class LargeKernel(nn.Module):
    """Depthwise convolution with a large kernel; in training the sum of it and smaller, dilated ones, each normed.

    Takes and gives maps `[batch, dim, height, width]`.

    Args:
        kernel: its size: 7, 13, 15 or 17.
        deploy: one kernel with a bias and nothing else; `merge` turns the trained form into it.

    Raises:
        ValueError: a kernel size without known branches.

    >>> layer, x = LargeKernel(8, 7).eval(), torch.randn(1, 8, 9, 9)
    >>> before = layer(x)
    >>> layer.merge()
    >>> torch.testing.assert_close(layer(x), before)

    Paper: UniRepLKNet: A Universal Perception Large-Kernel ConvNet.
    """

    def __init__(self, dim: int, kernel: int, deploy: bool = False):
        super().__init__()
        if kernel not in _BRANCHES:
            raise ValueError(f"kernel {kernel}; allowed: {', '.join(map(str, _BRANCHES))}")
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=deploy)
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.branches = nn.ModuleDict()
        for size, step in () if deploy else _BRANCHES[kernel]:
            conv = nn.Conv2d(dim, dim, size, padding=size // 2 * step, dilation=step, groups=dim, bias=False)
            self.branches[f"k{size}_{step}"] = nn.Sequential(conv, nn.BatchNorm2d(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv(x))
        for branch in self.branches.values():
            out = out + branch(x)
        return out

    @torch.jit.ignore
    @torch.no_grad()
    def merge(self) -> None:
        """Add all kernels into the large one, with the statistics of the norms; exact in eval mode."""
        if isinstance(self.norm, nn.Identity):
            return
        kernel, bias = _with_norm(self.conv, self.norm)
        for conv, norm in self.branches.values():
            part, shift = _with_norm(conv, norm)
            size, step = conv.kernel_size[0], conv.dilation[0]
            first = (kernel.shape[-1] - 1 - (size - 1) * step) // 2
            at = slice(first, first + (size - 1) * step + 1, step)
            kernel[..., at, at] += part
            bias += shift
        self.conv.weight.copy_(kernel)
        self.conv.bias = nn.Parameter(bias)
        self.norm = nn.Identity()
        self.branches = nn.ModuleDict()


def _with_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * factor.view(-1, 1, 1, 1), norm.bias - norm.running_mean * factor
