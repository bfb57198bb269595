"""Which steps, layers and guidance calls stay dense, and how the current denoising step is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from diffusers.hooks.hooks import StateManager

from vision_attn.hosts import AttachError

CALLS = ("both", "cond", "uncond")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which calls stay dense. The fields are those of `attach`, checked."""

    dense_steps: int = 0
    dense_layers: int | tuple[int, ...] = 0
    dense_last_steps: int = 0
    calls: str = "both"

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_last_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a number of steps, an int of at least 0; got {value!r}")
        layers = self.dense_layers
        if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes)):
            layers = tuple(sorted(set(layers)))
            object.__setattr__(self, "dense_layers", layers)
        for value in layers if isinstance(layers, tuple) else (layers,):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(
                    "dense_layers must be an int (the first layers) or an iterable of layer numbers from 0; got "
                    f"{self.dense_layers!r}"
                )
        if self.calls not in CALLS:
            raise ValueError(f"calls must be one of {', '.join(map(repr, CALLS))}; got {self.calls!r}")

    @property
    def needs_step(self) -> bool:
        return bool(self.dense_steps or self.dense_last_steps)

    def layers(self, count: int) -> frozenset[int]:
        """The dense layers of a model of `count` layers; raises ValueError for one it does not have."""
        dense = range(self.dense_layers) if isinstance(self.dense_layers, int) else self.dense_layers
        if any(layer >= count for layer in dense):
            raise ValueError(
                f"dense_layers={self.dense_layers!r}, but the model has {count} layers; allowed: 0 to {count - 1}"
            )
        return frozenset(dense)

    def dense_at(self, step: int | None, total: int | None) -> bool:
        """Whether a step is dense; `step` counts from 0."""
        if not self.needs_step:
            return False
        if step < self.dense_steps:
            return True
        if self.dense_last_steps and total is None:
            raise AttachError(
                f"dense_last_steps={self.dense_last_steps} needs the number of steps, which a bare denoiser does not "
                f"know; attach to the pipeline instead"
            )
        return bool(self.dense_last_steps) and step >= total - self.dense_last_steps


class Announcements(StateManager):
    """Receives what a pipeline says about the coming call in `model.cache_context(...)`, outside compiled code."""

    def __init__(self, listener) -> None:
        super().__init__(state_cls=None)
        self._listener = listener

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        self._listener(context)


class Steps:
    """Finds the current step: what the pipeline announced, else its scheduler, else changes of the timestep."""

    def __init__(self, pipe: Any | None) -> None:
        self.pipe = pipe
        self.announced: Any | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the run, as at the end of a pipeline call."""
        self._timestep: float | None = None
        self._calls = 0  # with this timestep, before this one
        self._counted = -1
        self._seen: tuple[int, set] = (-1, set())

    @property
    def name(self) -> str | None:
        """Name of the announced call, usually "cond", "uncond" or "cond_uncond"; older diffusers announce a string."""
        return self.announced if isinstance(self.announced, str) else getattr(self.announced, "name", None)

    def current(self, timestep: Any | None, read_timestep: bool) -> tuple[int | None, int | None]:
        """Return the step, from 0, and the number of steps; None where unknown.

        `read_timestep` allows the last resort, which waits for the device.
        """
        index = getattr(self.announced, "step_index", None)
        if index is not None:
            return index, getattr(self.announced, "num_inference_steps", None) or self._total()
        scheduler = getattr(self.pipe, "scheduler", None)
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index  # None before the first step of a run
            return (getattr(scheduler, "begin_index", None) or 0 if index is None else index), self._total()
        if not read_timestep or timestep is None:
            return None, self._total()
        now = float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
        again, before = now == self._timestep, self._timestep
        self._timestep, self._calls = now, self._calls + 1 if again else 0
        places = [i for i, each in enumerate(getattr(scheduler, "timesteps", ())) if each == now]
        if places:  # PNDM has one twice
            self._counted = places[min(self._calls, len(places) - 1)]
        elif before is None or now > before:
            self._counted = 0
        elif not again:
            self._counted += 1
        return self._counted, self._total()

    def _total(self) -> int | None:
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return None if timesteps is None else len(timesteps)

    def is_new(self, step: int | None) -> bool:
        """Whether this call starts a step, rather than being its second guidance call."""
        last, names = self._seen
        if step is None:
            return False
        if step == last and self.name not in names:
            names.add(self.name)
            return False
        if step == last and self.name is None:
            return False
        self._seen = (step, {self.name})
        return True
