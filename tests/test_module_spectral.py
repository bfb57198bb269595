"""Spectral gating: a sum over frequencies, a sum over positions, and other sizes."""

import pytest
import torch

from vision_attn.modules.spectral import SpectralGating, resize_filter

GRIDS = [(7, 5), (4, 6), (1, 1), (1, 9), (13, 2)]


def convolved(x, kernel):
    """Circular convolution of `[height, width]`, offset by offset; the kernel counts from its own corner."""
    out = torch.zeros_like(x)
    for dy in range(kernel.shape[0]):
        for dx in range(kernel.shape[1]):
            out += kernel[dy, dx] * x.roll((dy, dx), (0, 1))
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_output_is_a_product_of_spectra(grid):
    h, w = grid
    layer = SpectralGating(3, grid).double()
    x = torch.randn(2, h, w, 3, dtype=torch.float64)
    half = torch.view_as_complex(layer.complex_weight.detach())
    whole = torch.fft.fft2(x, dim=(1, 2))
    spectrum = torch.zeros_like(whole)
    for fy in range(h):
        for fx in range(w):  # a real map has conjugate values at opposite frequencies
            mirrored = fx > w // 2
            factor = half[-fy % h, w - fx].conj() if mirrored else half[fy, fx]
            if fx in (0, w / 2):  # its own opposite in x: only the part that keeps the map real acts
                factor = (factor + half[-fy % h, fx].conj()) / 2
            spectrum[:, fy, fx] = whole[:, fy, fx] * factor
    out = torch.fft.ifft2(spectrum, dim=(1, 2))
    assert out.imag.abs().max() < 1e-12
    torch.testing.assert_close(layer(x), out.real)


@pytest.mark.parametrize("grid", GRIDS)
def test_output_is_a_circular_convolution(grid):
    layer = SpectralGating(2, grid).double()
    kernel = torch.fft.irfft2(torch.view_as_complex(layer.complex_weight), s=grid, dim=(0, 1)).detach()
    x = torch.randn(1, *grid, 2, dtype=torch.float64)
    for c in range(2):
        torch.testing.assert_close(layer(x)[0, ..., c], convolved(x[0, ..., c], kernel[..., c]))


@pytest.mark.parametrize("old", [(7, 6), (4, 5)])
@pytest.mark.parametrize("new", [(9, 11), (8, 8), (7, 6), (3, 2), (1, 1), (12, 3)])
def test_other_sizes_keep_the_kernel(old, new):
    """A kernel of offsets that fit into both sizes filters a map of the new size the same way."""
    kernel = torch.zeros(*old, 1, dtype=torch.float64)
    resized = torch.zeros(*new, 1, dtype=torch.float64)
    reach = [(min(a, b) // 2, (min(a, b) - 1) // 2) for a, b in zip(old, new, strict=True)]
    for dy in range(-reach[0][0], reach[0][1] + 1):
        for dx in range(-reach[1][0], reach[1][1] + 1):
            kernel[dy, dx] = resized[dy, dx] = torch.randn(())
    layer = SpectralGating(1, old).double()
    layer.complex_weight.data = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    x = torch.randn(1, *new, 1, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0, ..., 0], convolved(x[0, ..., 0], resized[..., 0]))
    there = resize_filter(layer.complex_weight, old, new)
    if all(b >= a for a, b in zip(old, new, strict=True)):  # nothing was cut off, so the way back is exact
        torch.testing.assert_close(resize_filter(there, new, old), layer.complex_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_gradients(dtype):
    layer = SpectralGating(4, (13, 7)).to(dtype)
    x = torch.randn(2, 13, 7, 4, dtype=dtype, requires_grad=True)
    out = layer(x)
    assert out.dtype == dtype and out.isfinite().all()
    torch.testing.assert_close(out.double(), layer.double()(x.double()), rtol=0.02, atol=0.002)
    out.sum().backward()
    layer(torch.randn(1, 5, 9, 4, dtype=torch.float64)).square().sum().backward()
    assert x.grad.isfinite().all() and (layer.complex_weight.grad.abs().sum((0, 1, 3)) > 0).all()


def test_empty_grid():
    with pytest.raises(ValueError, match="at least 1"):
        SpectralGating(4, (0, 3))
