"""Where a long upscale keeps what it has, to go on after an interruption. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_attn.diffusion.restart import carried

_BASE, _STEP = "base.safetensors", "step.safetensors"


class Checkpoint:
    """The small video, and the latents after the last step that was kept; nothing at all when `folder` is None.

    `what` says which call it is: a folder that holds another is refused.
    """

    def __init__(self, folder: str | Path | None, what: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.call = _digest(what)
        for name in (_BASE, _STEP):
            said = self._read(name)[1].get("call", self.call)
            if said != self.call:
                raise ValueError(
                    f"{self.folder} holds an upscale with other settings or another video; remove it, or give another "
                    "checkpoint folder"
                )

    def load_base(self, generator: Any) -> np.ndarray | None:
        """The small video, if it was drawn before; the generator goes on from there."""
        tensors = self._read(_BASE)[0]
        if not tensors:
            return None
        for number, one in enumerate(_generators(generator)):
            one.set_state(tensors[f"noise.{number}"])
        return tensors["base"].numpy()

    def save_base(self, video: np.ndarray, generator: Any) -> None:
        noise = {f"noise.{number}": state for number, state in enumerate(states(generator))}
        self._write(_BASE, {"base": torch.from_numpy(video), **noise}, {})

    def load_step(self, device: Any) -> tuple[int, torch.Tensor | None, dict[str, Any]]:
        """Steps done, the latents after them, and what the scheduler carries."""
        tensors, said = self._read(_STEP)
        if not tensors:
            return 0, None, {}
        return (
            int(said["done"]),
            tensors["latents"],
            _joined(json.loads(said["carried"]), {key: value.to(device) for key, value in tensors.items()}),
        )

    def save_step(self, done: int, latents: torch.Tensor, scheduler: Any) -> None:
        tensors = {"latents": latents}
        plain = _parted(carried(scheduler), tensors)
        self._write(_STEP, tensors, {"done": str(done), "carried": json.dumps(plain)})

    def clear(self) -> None:
        """Remove what was kept, and the folder if nothing else is in it."""
        if self.folder is None or not self.folder.is_dir():
            return
        for name in (_BASE, _STEP):
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        from safetensors import SafetensorError, safe_open

        if self.folder is None or not (self.folder / name).is_file():
            return {}, {}
        try:
            with safe_open(self.folder / name, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} cannot be read ({error}); remove it to start again") from error

    def _write(self, name: str, tensors: dict[str, torch.Tensor], said: dict[str, str]) -> None:
        from safetensors.torch import save_file

        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.{os.getpid()}"
        try:
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            save_file(whole, partial, {**said, "call": self.call})
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)


def states(generator: Any) -> list[torch.Tensor]:
    """States of a generator, of each of a list of them, or of none."""
    return [one.get_state() for one in _generators(generator)]


def _generators(generator: Any) -> list[torch.Generator]:
    return [] if generator is None else [generator] if isinstance(generator, torch.Generator) else list(generator)


def _digest(what: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        value = value.numpy() if isinstance(value, torch.Tensor) else value
        return hashlib.sha256(value.tobytes()).hexdigest() if isinstance(value, np.ndarray) else repr(value)

    return hashlib.sha256(json.dumps(what, sort_keys=True, default=plain).encode()).hexdigest()


def _parted(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON, its tensors moved to `tensors` and referred to by name."""
    if isinstance(value, torch.Tensor):
        name = f"carried.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _parted(entry, tensors) for key, entry in value.items()}
    return [_parted(entry, tensors) for entry in value] if isinstance(value, list) else value


def _joined(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor"}:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _joined(entry, tensors) for key, entry in value.items()}
    return [_joined(entry, tensors) for entry in value] if isinstance(value, list) else value
