"""What attach() returns: the hooks it put in, how they come out again, and the report."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any

import torch

from vision_attn.diffusion.context import Context
from vision_attn.diffusion.families import Family
from vision_attn.diffusion.hooks import AttentionHook, RootHook
from vision_attn.diffusion.installed import SELF_ATTENTION, Installed, refuse_or_replace
from vision_attn.diffusion.report import DenoiserReport, Report
from vision_attn.diffusion.schedule import Schedule, Steps
from vision_attn.diffusion.sharding import cut_hooks
from vision_attn.diffusion.ulysses import OneMaskHook, text_masked
from vision_attn.joint import fit

ROOT_HOOK, CUT_HOOK, ATTENTION_HOOK = "vision_attn_root", "vision_attn_cut", "vision_attn_attention"
MASK_HOOK = "vision_attn_mask"
UNSET = (0, (), None, False, "both", "none")  # option values that change nothing, left out of reports


@dataclasses.dataclass(frozen=True)
class Plan:
    """A denoiser and its attention modules, looked up before anything is changed."""

    name: str
    module: torch.nn.Module
    family: Family
    attention: dict[str, tuple[torch.nn.Module, int]]  # name -> module, layer
    dense_layers: frozenset[int]

    @property
    def cls(self) -> str:
        return type(self.module).__name__


class Run(Installed):
    """An attached pattern: a context manager that detaches at the end, also after an exception."""

    context_class, hook_class, parts = Context, AttentionHook, (SELF_ATTENTION,)

    def __init__(
        self, pipe: Any | None, plans: list[Plan], schedule: Schedule, options: dict[str, Any], replace: bool
    ) -> None:
        super().__init__()
        self._plans, self._schedule, self._options = plans, schedule, options
        self._contexts: list[Context] = []
        self._backends: list[list[str]] = []
        pattern = options["pattern"]
        self.label = self.label or ("a pattern per layer" if isinstance(pattern, tuple) else repr(pattern))
        for plan in plans:  # all of them before any is changed
            refuse_or_replace(plan.module, *self.parts, label=self.label, replace=replace)
        with self.installing():
            for plan in plans:
                self._install(pipe, plan)

    def _install(self, pipe: Any | None, plan: Plan) -> None:
        self.claim(plan.module, *self.parts)
        config = getattr(plan.module, "config", None)
        context = self.context_class(plan.family, config, self._schedule, Steps(pipe), self._options)
        replaced: list[str] = []
        self._contexts.append(context)
        self._backends.append(replaced)
        parameters = list(inspect.signature(plan.module.forward).parameters)
        if context.cut is not None:
            for name, hook in cut_hooks(plan.module, plan.family, context.cut).items():
                self.hook(plan.module.get_submodule(name), hook, CUT_HOOK)
        self.hook(plan.module, RootHook(context, parameters), ROOT_HOOK)  # later, so that it sees the call uncut
        for module in text_masked(plan.module):
            self.hook(module, OneMaskHook(), MASK_HOOK)
        for module, layer in plan.attention.values():
            hook = self.hook_class(context, layer, layer in plan.dense_layers)
            context.hooks.append(hook)
            self.hook(module, hook, ATTENTION_HOOK)
            name = self.native_backend(getattr(module, "processor", None))
            if name is not None and name not in replaced:
                replaced.append(name)

    def detach(self) -> None:
        """Take everything out again. Safe to call twice."""
        super().detach()
        for context in self._contexts:
            _collect_quietly(context)

    @property
    def report(self) -> Report:
        """What changed and what ran so far. Calls inside a model compiled as a whole count once per announced call."""
        pattern = self._options["pattern"]
        plain = {**dataclasses.asdict(self._schedule), **{k: v for k, v in self._options.items() if k != "pattern"}}
        warnings: dict[str, int] = {}
        denoisers = []
        for plan, context, backends in zip(self._plans, self._contexts, self._backends, strict=True):
            _collect_quietly(context)
            for note, count in context.warnings.items():
                warnings[note] = warnings.get(note, 0) + count
            denoisers.append(_denoiser_report(plan, context, backends))
        options = {k: v for k, v in plain.items() if v not in UNSET}
        if "parallel" in options:
            options["parallel"] = {"axis": options["parallel"].axis, "ranks": self._contexts[0].cut.ranks}
        if isinstance(pattern, tuple):
            shown = {"pattern": "per-layer", "layers": [each.to_dict() for each in pattern]}
        else:
            shown = pattern.to_dict()
        return Report(shown, options, denoisers, warnings)


def _denoiser_report(plan: Plan, context: Context, backends: list[str]) -> DenoiserReport:
    layers: dict[int, float | None] = {}
    kept, total, unknown = 0.0, 0.0, False
    density = functools.cache(lambda grid, pattern: fit(pattern, grid).density(grid))
    for hook in context.hooks:
        share = None if hook.grid is None else density(hook.grid, context.pattern(hook.layer))
        layers[hook.layer] = 1.0 if hook.always_dense else share
        sparse, dense = hook.calls["sparse"], hook.calls["dense"]
        # A U-Net has a grid per level, and a module that was never sparse has not said which is its own.
        unknown |= bool(plan.family.stages and dense and hook.grid is None)
        weight = math.prod(hook.grid or next(iter(context.grids.values()), (0,))) ** 2
        kept += weight * (sparse * (share or 0.0) + dense)
        total += weight * (sparse + dense)
    grids = dict.fromkeys(hook.grid for hook in context.hooks if hook.grid is not None)
    return DenoiserReport(
        name=plan.name,
        cls=plan.cls,
        family=plan.family.name,
        modules=list(plan.attention),
        grids=[list(grid) for grid in grids],
        text=plan.family.text,
        layers=[layers[layer] for layer in sorted(layers)],
        steps=dict(context.steps_count),
        forwards=dict(context.forwards),
        calls={kind: sum(hook.calls[kind] for hook in context.hooks) for kind in ("sparse", "dense")},
        kept=kept / total if total and not unknown else None,
        backends=backends,
    )


def _collect_quietly(context: Context) -> None:
    strict, context.strict = context.strict, False
    try:
        context.collect()
    finally:
        context.strict = strict
