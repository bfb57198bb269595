"""NaLaFormer: the pyramid of RAVLT with norm-aware linear attention and a normed, silu-gated output.

Paper: NaLaFormer: Norm-Aware Linear Attention for Transformer Models.
"""

from __future__ import annotations

from timm.models import generate_default_cfgs

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.ravlt import RAVLT, SIZES, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg

_NALA = {"kind": "nala", "out_gate": "normed", "twice": True, "projection": 1024}
_XTINY = {"dims": (32, 64, 128, 384), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 12), "drop_path_rate": 0.1}
_VARIANTS = {
    "nalaformer_xtiny": {**_XTINY, **_NALA},
    "nalaformer_tiny": {**SIZES["tiny"], **_NALA, "mlp_ratio": 4.0},
    "nalaformer_small": {**SIZES["small"], **_NALA},
    "nalaformer_base": {**SIZES["base"], **_NALA, "mlp_ratio": 4.0},
    "nalaformer_large": {**SIZES["large"], **_NALA},
}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.proj.0") for name in _VARIANTS})

register_variants(globals(), RAVLT, _VARIANTS, checkpoint_filter_fn)
