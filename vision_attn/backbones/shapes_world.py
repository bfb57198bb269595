"""The built-in classifiers: a NAT and a BiFormer small enough for a CPU, with trained weights that ship.

They name the colour and shape of the largest thing in a picture of the shapes world; `vision_attn.train` trains them.
"""

from __future__ import annotations

from pathlib import Path

from timm.models import generate_default_cfgs, register_model

from vision_attn.backbones.biformer import BiFormer
from vision_attn.backbones.nat import NAT
from vision_attn.backbones.skeleton import cfg, create
from vision_attn.batches import SIDE  # 48 pixels: maps of 12, 6 and 3 tokens per axis
from vision_attn.shapes.stills import LABELS

_WEIGHTS = Path(__file__).parents[1] / "weights"


def _cfg(name: str, first_conv: str) -> dict:
    return cfg(
        file=str(_WEIGHTS / name / "model.safetensors"),
        num_classes=len(LABELS),
        label_names=LABELS,
        input_size=(3, SIDE, SIDE),
        pool_size=(3, 3),
        crop_pct=1.0,
        crop_mode="squash",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv=first_conv,
    )


default_cfgs = generate_default_cfgs(
    {"nat_shapes": _cfg("nat_shapes", "stem.proj.0"), "biformer_shapes": _cfg("biformer_shapes", "stem.0")}
)


def _as_it_is(state_dict: dict, model) -> dict:
    return state_dict


@register_model
def nat_shapes(pretrained: bool = False, **kwargs) -> NAT:
    """Neighborhoods of 5 x 5 tokens, without the bias, which costs most of a training step on a CPU."""
    options = {"depths": (2, 2, 2), "dim": 32, "num_heads": (2, 4, 8), "window": 5, "dilations": (1, 1, 1)}
    options |= {"rel_pos_bias": False, "small_map": "shrink", "drop_path_rate": 0.0, "out_indices": (0, 1, 2)}
    return create(NAT, "nat_shapes", pretrained, _as_it_is, **{**options, **kwargs})


@register_model
def biformer_shapes(pretrained: bool = False, **kwargs) -> BiFormer:
    """Each of 3 x 3 regions sees 3 of them in the first stage and 4 in the second; full attention in the third."""
    options = {"depths": (2, 2, 2), "dims": (32, 64, 128), "topk": (3, 4, 0), "head_dim": 16, "regions": 3}
    options |= {"drop_path_rate": 0.0, "out_indices": (0, 1, 2)}
    return create(BiFormer, "biformer_shapes", pretrained, _as_it_is, **{**options, **kwargs})
