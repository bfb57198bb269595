"""Attention layers for vision models; each name loads its file on first use."""

import timm  # noqa: F401  before any layer is half imported: the first import of timm imports our backbones

from vision_attn._lazy import lazily

# Public name -> the file that defines it.
_PUBLIC = {
    "WindowAttention2d": "window",
    "VariedWindowAttention": "varied_window",
    "QuadrangleAttention": "quadrangle",
    "AggregatedAttention": "aggregated",
    "ContMix": "contmix",
    "CosineAttention": "aggregated",
    "GatedAttention": "gated",
    "HeadRouter": "mixture_of_heads",
    "LinearAttention2d": "linear",
    "LargeKernel": "large_kernel",
    "MaskPredictor": "predicted",
    "MixtureOfHeads": "mixture_of_heads",
    "PredictedAttention": "predicted",
    "SpectralGating": "spectral",
    "load_balance": "mixture_of_heads",
    "BiLevelRoutingAttention": "routing",
    "NeighborhoodAttention": "neighborhood",
    "grid_attention": "fused",
    "linear_attention": "linear",
}

__all__ = [*_PUBLIC]


__getattr__ = lazily(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
