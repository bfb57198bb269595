"""What the hooks of one attached denoiser share: where the image is, what is sparse now, and what has been done."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from vision_attn.diffusion.families import Family, Grid
from vision_attn.diffusion.schedule import Schedule, Steps
from vision_attn.diffusion.sharding import Cut
from vision_attn.hosts import AttachError
from vision_attn.joint import fit
from vision_attn.kernels.patterns import Dense, Pattern


class Context:
    """State of one attached denoiser, shared by its hooks."""

    def __init__(self, family: Family, config: Any, schedule: Schedule, steps: Steps, options: dict[str, Any]) -> None:
        self.family, self.config, self.schedule, self.steps = family, config, schedule, steps
        self.patterns, self.backend, self.strict = options["pattern"], options["backend"], options["strict"]
        self.temperature, self.train_tokens = options["temperature"], options["train_tokens"]
        self.user_grid: Grid | None = options["grid"]
        self.hooks: list = []  # the attention hooks, in order of execution
        self.memo: dict = {}
        self.plans: dict[tuple[Grid, int], Pattern] = {}
        self.full: dict[tuple[Grid, Pattern], bool] = {}
        self.warnings: dict[str, int] = {}
        self.steps_count, self.forwards = {"sparse": 0, "dense": 0}, {"sparse": 0, "dense": 0}
        # Read inside compiled regions:
        self.announced = False
        self.active = True
        self.half: str | None = None  # the half of a `[uncond, cond]` batch that is sparse
        self.grids: dict[int, Grid] = {}  # image tokens, of this rank when the grid is cut -> the whole grid
        self.text = self.appended = self.batch = 0
        self.ranks = 1
        self.cut: Cut | None = Cut(options["parallel"]) if options.get("parallel") else None

    def decide(self, timestep: Any | None) -> None:
        """Set which modules are sparse in the coming call. Never traced."""
        step, total = self.steps.current(timestep, self.schedule.needs_step)
        if self.schedule.needs_step and step is None:
            raise AttachError(
                "dense_steps and dense_last_steps need the current step, but this call passes no timestep; attach to "
                "the pipeline, call the denoiser with timestep=, or leave them at 0"
            )
        active = not self.schedule.dense_at(step, total)
        if self.steps.is_new(step):
            self.steps_count["sparse" if active else "dense"] += 1
        self.active, self.half = self._guidance(active)
        for hook in self.hooks:
            hook.sparse = self.active and not hook.always_dense

    def _guidance(self, active: bool) -> tuple[bool, str | None]:
        calls, name = self.schedule.calls, self.steps.name
        if not active or calls == "both":
            return active, None
        if name in ("cond", "uncond"):
            return name == calls, None
        if getattr(self.steps.pipe, "do_classifier_free_guidance", None) is False:
            return calls == "cond", None
        if name == "cond_uncond" or (name is None and self.family.doubled_batch):
            return True, calls
        raise AttachError(
            f"calls={calls!r} needs to know which denoiser call is which, and this one is not announced by "
            f"cache_context (got {name!r}); use calls='both'"
        )

    def measure(self, call: dict[str, Any]) -> None:
        """Read grid, text length and batch from the arguments of a denoiser call. May be traced."""
        found = self.family.grid(self.config, call, self.memo)
        grid = found if self.user_grid is None else self.user_grid
        if grid is None:
            raise AttachError(
                f"the token grid of this {self.family.name} call is not known; pass grid=(...) in tokens to attach. "
                "Inside a model compiled as a whole, one call before compiling, or compile_repeated_blocks(), also does"
            )
        if found is not None and math.prod(found) != math.prod(grid):
            raise AttachError(f"grid={grid} has {math.prod(grid)} tokens, but this {self.family.name} call has {found}")
        sample = call.get("sample") if self.family.stages else call.get("hidden_states")
        self.batch = 0 if sample is None else int(sample.shape[0])
        self.appended = 0
        if self.family.appends:
            self.appended = int(sample.shape[1]) - math.prod(grid)
            if self.appended < 0:
                raise AttachError(f"grid={grid} has {math.prod(grid)} tokens, but this call has {int(sample.shape[1])}")
        text = None if self.family.text == "none" else call.get("encoder_hidden_states")
        self.text = 0 if text is None else int(text.shape[1])
        if self.cut is not None:
            self.cut.measure(grid)
        if not self.family.stages:
            self.grids = {math.prod(grid if self.cut is None else self.cut.own): grid}
            return
        height, width = grid
        levels = [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(self.config.block_out_channels))]
        self.grids = {h * w: (h, w) for h, w in levels}

    def place(self, tokens: int) -> tuple[Grid, int, bool] | None:
        """The whole grid, where it starts in a sequence of `tokens`, and whether that is all; None elsewhere."""
        for image, grid in self.grids.items():
            if self.family.stages:
                if tokens == image:
                    return grid, 0, True
                continue
            if self.family.drops_padding and torch.compiler.is_compiling():
                return grid, 0, False  # how much text is left depends on data, which compiled code must not ask for
            text = tokens - image - self.appended
            if text in (0, self.text) or (self.family.drops_padding and 0 < text < self.text):
                return grid, text if self.family.text == "first" else 0, not text + self.appended
        return None

    def pattern(self, layer: int) -> Pattern:
        return self.patterns[layer] if isinstance(self.patterns, tuple) else self.patterns

    def plan(self, grid: Grid, layer: int) -> tuple[Pattern, bool]:
        """The pattern of a layer fitted to a grid, and whether it is plain attention there; compiled code knows that of
        `Dense()` only."""
        pattern = self.pattern(layer)
        if torch.compiler.is_compiling():
            return fit(pattern, grid), isinstance(pattern, Dense)
        if (grid, layer) not in self.plans:  # by layer, because equal patterns may carry weights that differ
            self.plans[grid, layer] = fit(pattern, grid)
        if (grid, pattern) not in self.full:
            self.full[grid, pattern] = self.plans[grid, layer].is_dense(grid)
        return self.plans[grid, layer], self.full[grid, pattern]

    def scale(self, scale: float | None, head_dim: int, keys: int) -> float | None:
        """The factor on the scores, with the temperature."""
        if self.temperature == "none":
            return scale
        factor = self.temperature
        if factor == "proportional":
            factor = math.sqrt(math.log(keys) / math.log(self.train_tokens))
        return (head_dim**-0.5 if scale is None else scale) * factor

    def collect(self) -> None:
        """Add up what the attention hooks did since the last time. Never traced."""
        ran = [hook for hook in self.hooks if hook.tally is not None]
        if not ran:
            return
        sparse = False
        for hook in ran:
            (done, left), note = hook.tally, hook.note
            hook.tally = hook.note = None
            hook.calls["sparse"] += done
            hook.calls["dense"] += left
            sparse |= done > 0
            if hook.sparse and not done and note is None:
                note = (
                    f"{self.family.name}: attached modules ran without calling scaled_dot_product_attention on the "
                    "image tokens, so they stayed dense; an attention backend other than native was set after "
                    "attaching, or the processor was changed"
                )
            if note is not None:
                self.warn(note)
        self.forwards["sparse" if sparse else "dense"] += 1

    def warn(self, note: str) -> None:
        if self.strict:
            raise AttachError(note)
        if note not in self.warnings:
            warnings.warn(note, stacklevel=2)
        self.warnings[note] = self.warnings.get(note, 0) + 1
