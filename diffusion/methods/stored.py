"""Files of trained tensors that belong to a method: safetensors, with the settings they were trained for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write(path: str | Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors and settings; the file appears whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, partial, {name: str(value) for name, value in settings.items()})
    partial.replace(path)


def read(path: str | Path, settings: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read what `write` wrote.

    Raises:
        ValueError: the file is missing or no such file, was trained for other settings, or its tensors are not those
            of `shapes`, name by name.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as weights in safetensors format: {error}") from error
    for name, value in settings.items():
        if found.get(name) != str(value):
            raise ValueError(f"{path} was made for {name}={found.get(name)}, and this is {name}={value}")
    wrong = [name for name in {**shapes, **tensors} if name not in tensors or name not in shapes]
    wrong += [name for name in tensors if name not in wrong and tensors[name].shape != shapes[name]]
    if wrong:
        raise ValueError(
            f"{path} does not fit this model: {len(wrong)} of {len(shapes)} tensors are missing, unknown or of "
            f"another shape, such as {sorted(wrong)[0]}"
        )
    return tensors


def refuse_offload(denoiser: torch.nn.Module, label: str) -> None:
    """Raise ValueError where weights are moved by somebody who would not know of new ones."""
    for name, module in denoiser.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        group = registry is not None and any("group_offloading" in hook for hook in registry.hooks)
        if group or (name and hasattr(module, "_hf_hook")):
            raise ValueError(
                f"{label} brings weights of its own, and {type(denoiser).__name__} is offloaded part by part; attach "
                "first, then enable sequential or group offload (enable_model_cpu_offload() works in either order)"
            )
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise ValueError(f"{label} needs the weights of {type(denoiser).__name__}, and some are on the meta device")
