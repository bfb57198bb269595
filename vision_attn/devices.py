"""Devices and dtypes as people type them."""

from __future__ import annotations

import re

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device that is there; raises ValueError otherwise."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device: got {device!r}, allowed: auto, cpu, cuda, cuda:0, cuda:1, ...")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {device!r}, but torch {torch.__version__} sees no CUDA GPU; use cpu or auto")
        count = torch.cuda.device_count()
        if ":" in device and int(device.split(":")[1]) >= count:
            raise ValueError(f"device: got {device!r}, but there are {count} GPUs, numbered from 0")
    return torch.device(device)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, *, built_in: bool) -> torch.dtype:
    """The dtype to load with; None picks float32 on CPU and for the built-in model, bfloat16 elsewhere."""
    if dtype is None:
        return torch.float32 if built_in or device.type == "cpu" else torch.bfloat16
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    return found
