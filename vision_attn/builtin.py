"""How the built-in models are written: folders that timm and open_clip read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn

from vision_attn.batches import SIDE
from vision_attn.shapes.words import tokenizer


def clip_config() -> dict:
    """What `open_clip_config.json` of the built-in CLIP says: our backbone, and a text tower of two small layers."""
    levels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "timm_model_name": "nat_shapes",
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": SIDE,
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": len(tokenizer()),
                "hf_tokenizer_name": "local",  # any name: open_clip takes the folder that holds the config
                "tokenizer_kwargs": {"clean": "lower"},
                "width": 64,
                "heads": 4,
                "layers": 2,
                "pool_type": "eos",
                "eos_id": 1,
            },
        },
        "preprocess_cfg": {**levels, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def save_classifier(model: nn.Module, folder: Path) -> None:
    """Write a timm model with weights in half precision; `timm.create_model("local-dir:FOLDER")` reads it."""
    from timm.models import save_for_hf

    save_for_hf(copy.deepcopy(model).half(), folder, safe_serialization=True)


def write_clip_config(folder: Path) -> None:
    """Write what `open_clip.create_model("local-dir:FOLDER")` needs apart from weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config(), indent=1) + "\n")
    tokenizer().save_pretrained(folder)


def save_clip(model: nn.Module, folder: Path) -> None:
    """Write a CLIP model with weights in half precision beside its config."""
    from safetensors.torch import save_file

    tensors = {name: half(value) for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", {"format": "pt"})


def half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value
