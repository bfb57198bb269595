"""Spatial attention as data: a pattern says who may look at whom, a kernel computes it, one call attaches it.

Example:
    >>> import torch
    >>> from vision_attn import Neighborhood, attend
    >>> q = k = v = torch.randn(1, 16, 16, 4, 32)  # [batch, height, width, heads, head_dim]
    >>> attend(q, k, v, Neighborhood(window=7)).shape
    torch.Size([1, 16, 16, 4, 32])
"""

from vision_attn import _checkout as _checkout
from vision_attn import _timm
from vision_attn._lazy import lazily

__version__ = "0.1.0"

# Public name -> the module that defines it. Importing this package needs torch only; each name loads on first use.
_PUBLIC = {
    "attend": "kernels.attend",
    "Shards": "kernels.parallel",
    "explain": "kernels.explain",
    "Pattern": "kernels.patterns",
    "PATTERNS": "kernels.patterns",
    "BlockList": "kernels.patterns",
    "Circle": "kernels.patterns",
    "Dense": "kernels.patterns",
    "Halo": "kernels.patterns",
    "LengthDecay": "kernels.patterns",
    "Neighborhood": "kernels.patterns",
    "PerHead": "kernels.patterns",
    "PowerStep": "kernels.patterns",
    "Radial": "kernels.patterns",
    "SlidingTile": "kernels.patterns",
    "Streaming": "kernels.patterns",
    "Window": "kernels.patterns",
    "TokenMerge": "merging",
    "AttachError": "hosts",
    "attach": "hosts",
}

__all__ = ["__version__", *_PUBLIC]


__getattr__ = lazily(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_timm.register()
