"""Spectral gating: every channel of a map is multiplied by a learned filter in the frequency domain."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

__all__ = ["SpectralGating", "resize_filter"]


class SpectralGating(nn.Module):
    """`irfft2(rfft2(x) * weight)` of a map `[batch, height, width, dim]`: a circular convolution as large as the map.

    Args:
        dim: channels.
        grid: (height, width) in tokens that the filter is made for. Maps of another size get `resize_filter` of it.

    Computed in float32 at least; the result has the dtype of the input.

    >>> SpectralGating(32, grid=(14, 14))(torch.randn(1, 14, 14, 32)).shape
    torch.Size([1, 14, 14, 32])

    Paper: SpectFormer: Frequency and Attention is what you need in a Vision Transformer.
    """

    def __init__(self, dim: int, grid: tuple[int, int], device=None, dtype=None):
        super().__init__()
        if min(grid) < 1:
            raise ValueError(f"grid {tuple(grid)} must be (height, width) in tokens, both at least 1")
        self.grid = (int(grid[0]), int(grid[1]))
        shape = (self.grid[0], self.grid[1] // 2 + 1, dim, 2)  # real and imaginary part
        self.complex_weight = nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return filter_map(x, self.complex_weight, self.grid)


@register_notrace_function
def filter_map(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map `[batch, height, width, dim]` through the filter `weight` of a map of size `grid`."""
    full = torch.promote_types(x.dtype, torch.float32)
    size = [x.shape[1], x.shape[2]]
    weight = weight.to(full)
    if size[0] != grid[0] or size[1] != grid[1]:
        weight = resize_filter(weight, grid, (size[0], size[1]))
    spectrum = torch.fft.rfft2(x.to(full), dim=(1, 2), norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfft2(spectrum, s=size, dim=(1, 2), norm="ortho").to(x.dtype)


def resize_filter(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The filter of maps of size `old` for maps of size `new`: the same convolution kernel, cut off or padded.

    Args:
        weight: `[old height, old width // 2 + 1, dim, 2]`, real and imaginary parts, float32 or float64.
        old, new: (height, width) of the maps in tokens.

    Returns:
        `[new height, new width // 2 + 1, dim, 2]`.

    >>> resize_filter(torch.randn(14, 8, 32, 2), (14, 14), (7, 9)).shape
    torch.Size([7, 5, 32, 2])
    """
    kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=[old[0], old[1]], dim=(0, 1))
    for axis in range(2):  # offsets -(n // 2) to (n - 1) // 2 stay what they are
        kept = min(old[axis], new[axis])
        back, ahead = kept // 2, kept - kept // 2
        length = kernel.shape[axis]
        shape = list(kernel.shape)
        shape[axis] = new[axis] - kept
        middle = torch.zeros(shape, dtype=kernel.dtype, device=kernel.device)
        ends = [kernel.narrow(axis, 0, ahead), middle, kernel.narrow(axis, length - back, back)]
        kernel = torch.cat(ends, axis)
    return torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)).resolve_conj()).contiguous()
