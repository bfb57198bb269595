"""The image tower of the built-in vision-language model as a ViT of timm: trained weights that patterns go into."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

NAME = "llava_shapes"
# Names in the CLIP tower of transformers -> names in timm; q, k and v become one matrix.
_RENAMED = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."), (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."), (r"^encoder\.layers\.", "blocks."), (r"\.layer_norm", ".norm"),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)  # fmt: skip


def load(random: bool = False) -> Any:
    """A timm `VisionTransformer` without classes, in eval mode: 32 x 32 pixels, 8 x 8 tokens and the class token.

    Args:
        random: the same with random weights, always the same ones.

    >>> sum(weight.numel() for weight in load().parameters())
    291264
    """
    import torch

    torch.manual_seed(0)
    model = build()
    if not random:
        model.load_state_dict(_weights(_folder() / "model.safetensors"))
    return model.eval()


def build() -> Any:
    """The modules, with whatever weights timm starts from."""
    import torch
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    config = json.loads((_folder() / "config.json").read_text())["vision_config"]
    pixels = json.loads((_folder() / "processor_config.json").read_text())["image_processor"]
    side = config["image_size"]
    model = VisionTransformer(
        img_size=side, patch_size=config["patch_size"], embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"], num_classes=0, pre_norm=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=config["layer_norm_eps"]), act_layer=QuickGELU,
    )  # fmt: skip
    model.pretrained_cfg = {
        "input_size": (3, side, side), "mean": pixels["image_mean"], "std": pixels["image_std"],
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash", "num_classes": 0,
    }  # fmt: skip
    return model


def _folder() -> Path:
    from vision_attn.mllm.loading import WEIGHTS

    return WEIGHTS / "shapes-llava"


def _weights(file: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    tower = "vision_tower."
    found = {name.removeprefix(tower): w.float() for name, w in load_file(file).items() if name.startswith(tower)}
    embeddings = {
        "cls_token": found.pop("embeddings.class_embedding")[None, None],
        "pos_embed": found.pop("embeddings.position_embedding.weight")[None],
    }
    renamed = {}
    for name, weight in found.items():
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        renamed[name] = weight
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        renamed[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return {**embeddings, **renamed}
