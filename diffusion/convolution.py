"""3-D convolutions of video VAEs on a CPU."""

from __future__ import annotations

import types

import torch


def quick_conv3d(module: torch.nn.Module) -> None:
    """Let the 3-D convolutions of a module use oneDNN for a single sample on a CPU.

    torch computes one sample of up to 20480 values of channels * frames * height, which most layers of a small video
    VAE are, by a kernel that took 6 to 10 times as long. Other devices and dtypes are left as they are; so are weights
    and their names.

    >>> conv = torch.nn.Conv3d(4, 8, 3)
    >>> clip = torch.randn(1, 4, 3, 8, 8)
    >>> before = conv(clip)
    >>> quick_conv3d(conv)
    >>> torch.allclose(conv(clip), before, atol=1e-5)
    True
    """
    for conv in module.modules():
        if isinstance(conv, torch.nn.Conv3d) and max(conv.kernel_size) > 1:
            conv._conv_forward = types.MethodType(_forward, conv)


def _forward(conv: torch.nn.Conv3d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and x.ndim == 5
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if plain and on_cpu and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    return torch.nn.Conv3d._conv_forward(conv, x, weight, bias)
