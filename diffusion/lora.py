"""LoRA on the self-attention of a denoiser, and loading LoRAs with a check that they belong to the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vision_attn.diffusion.attachment import self_attention
from vision_attn.diffusion.families import family_of

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(denoiser: torch.nn.Module, rank: int = 16) -> torch.nn.ModuleList:
    """Freeze a denoiser and put a LoRA on the query, key, value and output projections of its self-attention.

    Args:
        denoiser: such as `pipe.transformer`.
        rank: of the change to each projection, at least 1. Its scale is 1 (alpha is the rank).

    Returns:
        The new layers, to train; at the start they change nothing.

    Raises:
        TypeError, ValueError: a class without LoRA support, or one without self-attention to attach to.

    >>> from vision_attn.diffusion.tiny import denoiser
    >>> layers = add_lora(denoiser(), rank=4)
    >>> sum(weight.numel() for weight in layers.parameters())  # 6 layers x 4 projections x 2 x 4 x 128
    24576
    """
    from peft import LoraConfig

    if not hasattr(denoiser, "add_adapter"):
        raise TypeError(f"{type(denoiser).__name__} takes no LoRA: it has no add_adapter")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an int of at least 1; got {rank!r}")
    attention = self_attention(denoiser, family_of(denoiser, None))
    modules = dict(denoiser.named_modules())  # single-stream blocks have their output projection elsewhere
    targets = [target for name in attention for part in PROJECTIONS if (target := f"{name}.{part}") in modules]
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    added = [getattr(denoiser.get_submodule(t), side) for t in targets for side in ("lora_A", "lora_B")]
    return torch.nn.ModuleList(added)


def save_lora(pipe: Any, folder: str | Path) -> Path:
    """Write the LoRA of a pipeline's transformer as diffusers reads it; the file appears whole or not at all.

    Returns:
        The file, `pytorch_lora_weights.safetensors` in `folder`.
    """
    from peft.utils import get_peft_model_state_dict

    folder = Path(folder)
    partial = f".{FILE.removesuffix('.safetensors')}.{os.getpid()}.safetensors"
    try:
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=partial)
        (folder / partial).replace(folder / FILE)
    finally:
        (folder / partial).unlink(missing_ok=True)
    return folder / FILE


def lora_file(path: str | Path) -> Path:
    """The safetensors file that a path means, itself or in its folder. Raises ValueError where there is none."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"{path} is neither a safetensors file nor a folder with {FILE}")
    return file


def load_lora(pipe: Any, path: str | Path, name: str = "lora") -> None:
    """Load a LoRA into a pipeline with `pipe.load_lora_weights`, after a look at whether it was made for that model.

    Args:
        pipe: a diffusers pipeline whose class can load LoRAs.
        path: a folder with `pytorch_lora_weights.safetensors`, or a safetensors file.
        name: of the adapter, for `pipe.set_adapters` and `pipe.delete_adapters`.

    Raises:
        TypeError: the pipeline's class loads no LoRAs.
        ValueError: the file is missing or holds no LoRA, or one of another model.

    >>> from vision_attn.diffusion.tiny import pipeline
    >>> load_lora(pipeline(), "nowhere")
    Traceback (most recent call last):
    ValueError: nowhere is neither a safetensors file nor a folder with pytorch_lora_weights.safetensors
    """
    if not hasattr(pipe, "load_lora_weights") or not hasattr(pipe, "transformer"):
        raise TypeError(f"{type(pipe).__name__} loads no LoRAs into a transformer")
    file = lora_file(path)
    try:
        stored = pipe.lora_state_dict(str(file.parent), weight_name=file.name, use_safetensors=True)
    except Exception as error:  # safetensors and each family's conversion raise classes of their own
        raise ValueError(f"{file} cannot be read as a LoRA: {error}") from error
    _check_belongs(stored, pipe.transformer, file)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)


def _check_belongs(stored: dict[str, torch.Tensor], denoiser: torch.nn.Module, file: Path) -> None:
    """Raise ValueError unless every pair of matrices fits a linear layer of the denoiser."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in stored.items():
        layer, found, _ = key.removeprefix("transformer.").rpartition(".lora_")
        if found and key.endswith(".weight"):
            layers.setdefault(layer, {})[key.rsplit(".", 2)[1]] = tuple(value.shape)
    if not layers:
        raise ValueError(f"{file} holds no LoRA: none of its {len(stored)} tensors is named like one")
    own = dict(denoiser.named_modules())
    wrong = [line for layer, sides in layers.items() if (line := _misfit(layer, sides, own))]
    if wrong:
        raise ValueError(
            f"{file} is a LoRA of another model: {len(wrong)} of its {len(layers)} layers do not fit this "
            f"{type(denoiser).__name__}. The first: {wrong[0]}. Load it into the model it was trained on"
        )


def _misfit(layer: str, sides: dict[str, tuple[int, ...]], own: dict[str, torch.nn.Module]) -> str:
    module = own.get(layer)
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if weight is None:
        return f"{layer} is not in this model"
    wanted = tuple(weight.shape)
    inner, outer = sides.get("lora_A", ()), sides.get("lora_B", ())
    if (outer[:1], inner[1:]) != (wanted[:1], wanted[1:]) or inner[:1] != outer[1:2]:
        return f"{layer} has weights {list(wanted)} here, and the LoRA is {list(outer)} times {list(inner)}"
    return ""
