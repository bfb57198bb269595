"""What attach() returns for a vision model: what was put on, how it comes off again, and what it did."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.hosts import AttachError, plain
from vision_attn.retrofit.families import Place
from vision_attn.retrofit.interception import own_class, put_on, state_of, take_off
from vision_attn.retrofit.report import Report, TowerReport


class Layer:
    """What an attached module reads: its tower, and what it did last."""

    def __init__(self, tower: Tower, number: int, name: str) -> None:
        self.tower, self.number, self.name = tower, number, name
        self.times = 1  # attention calls in one call of the layer: two where it is differential
        self.calls = {"sparse": 0, "masked": 0, "dense": 0}
        self.seen: tuple | None = (
            None  # (kind, grid, ...) of the last call; compiled code writes it, and never reads it
        )

    @property
    def active(self) -> bool:
        return self.tower.active

    def left(self, trouble: str) -> None:
        self.tower.warn(f"{self.name} was left dense: {trouble}")

    # What the last call says; None before the first one, and where it does not apply.

    @property
    def grid(self) -> tuple[int, ...] | None:
        return None if self.seen is None else self.seen[1]

    @property
    def density(self) -> float | None:
        """Share of the pairs of patch tokens that is allowed."""
        return None

    @property
    def tokens(self) -> list[int] | None:
        """Tokens before the layer, inside its attention, and after it."""
        return None

    @property
    def flops(self) -> tuple[int, int] | None:
        """As the model was, and now."""
        return None


class Tower:
    """An image tower that something is attached to."""

    def __init__(self, place: Place, grid: tuple[int, ...] | None, strict: bool) -> None:
        self.name, self.cls, self.prefix = place.name, own_class(place.module).__name__, place.prefix
        self.place: Place | None = place  # until it is put on
        self.user_grid, self.grid, self.strict = grid, grid, strict
        self.active = True
        self.layers: list[Layer] = []
        self.dense: list[str] = []  # layers that were left alone
        self.parts: list[tuple[nn.Module, type, Any]] = []
        self.warnings: dict[str, int] = {}
        if place.family is not None and place.family.frames:
            self.parts.append((place.module, Frames, self))
            return
        if place.embed is not None:
            self.parts.append((place.embed, Embed, self))

    def add(self, layer: Layer, module: nn.Module, behaviour: type) -> None:
        self.layers.append(layer)
        self.parts.append((module, behaviour, layer))

    def measure(self, embed: nn.Module, image: torch.Tensor, tokens: torch.Tensor) -> None:
        """Read the grid where the image becomes tokens."""
        if hasattr(embed, "dynamic_feat_size"):
            found = embed.dynamic_feat_size((int(image.shape[-2]), int(image.shape[-1])))
        else:
            found = tokens.shape[-2:]
        self.found((int(found[0]), int(found[1])))

    def found(self, grid: tuple[int, ...]) -> None:
        """Take the grid of the call that is running."""
        if self.user_grid is not None and self.user_grid != grid:
            raise AttachError(f"grid={self.user_grid}, but this image has {grid} tokens; leave grid out")
        self.grid = grid

    def warn(self, note: str) -> None:
        if self.strict:
            raise AttachError(note)
        if torch.compiler.is_compiling():
            return
        if note not in self.warnings:
            warnings.warn(note, stacklevel=2)
        self.warnings[note] = self.warnings.get(note, 0) + 1


class Embed:
    """In front of the module that cuts an image into tokens."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(x, *args, **kwargs)
        if self._vision_attn.active:
            self._vision_attn.measure(self, x, out)
        return out


class Frames:
    """In front of a tower that takes several frames."""

    def forward(self, images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._vision_attn.active:
            if images.ndim != 5:
                raise AttachError(f"images must be [batch, frames, channels, height, width]; got {tuple(images.shape)}")
            frames, height, width = (int(images.shape[i]) for i in (1, 3, 4))
            self._vision_attn.found((frames, height // self.patch_size, width // self.patch_size))
        return super().forward(images, *args, **kwargs)


class Run:
    """An attachment: a context manager that detaches at the end, also after an exception."""

    def __init__(
        self, model: nn.Module, towers: list, pattern: dict[str, Any], options: dict[str, Any], replace: bool
    ) -> None:
        self._model, self._towers, self._pattern, self._options = model, towers, pattern, options
        self._on: list[tuple[nn.Module, Any]] = []
        self._seconds: dict[str, float] | None = None
        self._flops: int | None = None
        parts = [part for tower in towers for part in tower.parts]
        if any(state_of(module) is not None for module, _, _ in parts):
            if not replace:
                raise ValueError(
                    f"{own_class(plain(model)).__name__} already has something attached; detach() that run first, or "
                    "pass replace=True"
                )
            for module in plain(model).modules():
                take_off(module)
        for tower in towers:
            tower.place, tower.parts = None, []
        try:
            for module, behaviour, state in parts:
                put_on(module, behaviour, state)
                self._on.append((module, state))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything out again. Safe to call twice."""
        while self._on:
            module, state = self._on.pop()
            if state_of(module) is state:  # somebody may have replaced it
                take_off(module)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def measure(self, *inputs: Any, repeats: int = 5, **options: Any) -> Report:
        """Time `model(*inputs, **options)` with and without what is attached, in turns, and count the FLOPs of both.

        Args:
            repeats: rounds; the report has the medians. One round before them is not counted.

        Raises:
            ValueError: the run is detached, or repeats is not an int above 0.
        """
        if type(repeats) is not int or repeats < 1:
            raise ValueError(f"repeats must be an int of at least 1; got {repeats!r}")
        if not self._on:
            raise ValueError("this run is detached; measure while it is attached")
        times: dict[str, list[float]] = {"before": [], "after": []}
        with torch.no_grad():
            for _ in range(repeats + 1):
                for name in times:
                    times[name].append(self._timed(name == "after", inputs, options))
            self._flops = self._counted(inputs, options)
        self._seconds = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
        return self.report

    def _timed(self, active: bool, inputs: tuple, options: dict[str, Any]) -> float:
        self._activate(active)
        try:
            _wait()
            start = time.perf_counter()
            self._model(*inputs, **options)
            _wait()
            return time.perf_counter() - start
        finally:
            self._activate(True)

    def _counted(self, inputs: tuple, options: dict[str, Any]) -> int:
        """FLOPs of the model as it was. Attention is spelled out, because not every fused form can be counted."""
        fast = torch.backends.mha.get_fastpath_enabled()
        self._activate(False)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                plain(self._model)(*inputs, **options)
            return counter.get_total_flops()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            self._activate(True)

    def _activate(self, active: bool) -> None:
        for tower in self._towers:
            tower.active = active

    @property
    def report(self) -> Report:
        """What changed and what ran so far. Calls in compiled code are not counted; density and FLOPs are those of the
        last call."""
        options = {k: v for k, v in self._options.items() if v not in (0, (), None, False)}
        warned: dict[str, int] = {}
        for tower in self._towers:
            for note, count in tower.warnings.items():
                warned[note] = warned.get(note, 0) + count
        towers = [_tower_report(tower) for tower in self._towers]
        model = None
        if self._flops is not None:
            saved = sum(t.flops["before"] - t.flops["after"] for t in towers if t.flops is not None)
            model = {"before": self._flops, "after": self._flops - saved}
        return Report(self._pattern, options, towers, model, self._seconds, warned)

    def __repr__(self) -> str:
        state = "attached to" if self._on else "detached from"
        return f"<Run: {self._pattern['pattern']} {state} {own_class(plain(self._model)).__name__}>"


def _tower_report(tower: Tower) -> TowerReport:
    flops = [layer.flops for layer in tower.layers]
    known = [f for f in flops if f is not None]
    grids = dict.fromkeys(layer.grid for layer in tower.layers if layer.grid is not None)
    return TowerReport(
        name=tower.name,
        cls=tower.cls,
        modules=[layer.name for layer in tower.layers],
        dense=list(tower.dense),
        grids=[list(grid) for grid in grids],
        prefix=tower.prefix,
        density=[layer.density for layer in tower.layers],
        tokens=[layer.tokens for layer in tower.layers],
        calls={kind: sum(layer.calls[kind] for layer in tower.layers) for kind in ("sparse", "masked", "dense")},
        flops={"before": sum(f[0] for f in known), "after": sum(f[1] for f in known)} if known else None,
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
