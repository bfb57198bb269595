"""What attach() returns: the hooks it put in, how they come out again, and the report."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName

from vision_attn.diffusion.context import Context
from vision_attn.diffusion.families import Family
from vision_attn.diffusion.hooks import AttentionHook, RootHook
from vision_attn.diffusion.report import DenoiserReport, Report
from vision_attn.diffusion.schedule import Schedule, Steps
from vision_attn.joint import fit

ROOT_HOOK, ATTENTION_HOOK = "vision_attn_root", "vision_attn_attention"
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


class Run:
    """An attachment: a context manager that detaches at the end, also after an exception."""

    def __init__(self, pipe: Any | None, plans: list[Plan], schedule: Schedule, options: dict[str, Any]) -> None:
        self._plans, self._schedule, self._options = plans, schedule, options
        self._undo: list = []
        self._contexts: list[Context] = []
        self._backends: list[list[str]] = []
        try:
            for plan in plans:
                self._install(pipe, plan)
        except BaseException:
            self.detach()
            raise

    def _install(self, pipe: Any | None, plan: Plan) -> None:
        context = Context(plan.family, getattr(plan.module, "config", None), self._schedule, Steps(pipe), self._options)
        replaced: list[str] = []
        self._contexts.append(context)
        self._backends.append(replaced)
        parameters = list(inspect.signature(plan.module.forward).parameters)
        self._hook(plan.module, RootHook(context, parameters, self), ROOT_HOOK)
        for module, layer in plan.attention.values():
            hook = AttentionHook(context, layer, layer in plan.dense_layers)
            context.hooks.append(hook)
            self._hook(module, hook, ATTENTION_HOOK)
            name = self._native_backend(getattr(module, "processor", None))
            if name is not None and name not in replaced:
                replaced.append(name)
        _forget_children(plan.module)

    def _hook(self, module: torch.nn.Module, hook: Any, name: str) -> None:
        had_registry, had_forward = hasattr(module, "_diffusers_hook"), "forward" in vars(module)
        self._undo.append(lambda: _unhook(module, name, had_registry, had_forward))
        registry = HookRegistry.check_if_exists_or_initialize(module)
        with _Beneath(module):
            registry.register_hook(hook, name)

    def _native_backend(self, processor: Any | None) -> str | None:
        """Make a processor call `scaled_dot_product_attention`, as other backends do not; returns what was replaced."""
        if not hasattr(processor, "_attention_backend"):
            return None
        own, before = "_attention_backend" in vars(processor), processor._attention_backend

        def restore() -> None:
            if processor._attention_backend is not AttentionBackendName.NATIVE:
                return  # somebody chose another one since
            if own:
                processor._attention_backend = before
            else:
                vars(processor).pop("_attention_backend", None)

        self._undo.append(restore)
        processor._attention_backend = AttentionBackendName.NATIVE
        name = getattr(before, "value", before)
        return None if name in (None, "native") else str(name)

    def detach(self) -> None:
        """Take everything out again. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        for plan in self._plans:
            _forget_children(plan.module)
        for context in self._contexts:
            _collect_quietly(context)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

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
        return Report(pattern.to_dict(), options, denoisers, warnings)

    def __repr__(self) -> str:
        state = "attached to" if self._undo else "detached from"
        return f"<Run: {self._options['pattern']!r} {state} {', '.join(plan.cls for plan in self._plans)}>"


def _denoiser_report(plan: Plan, context: Context, backends: list[str]) -> DenoiserReport:
    layers: dict[int, float | None] = {}
    kept, total, unknown = 0.0, 0.0, False
    density = functools.cache(lambda grid: fit(context.pattern, grid).density(grid))
    for hook in context.hooks:
        share = None if hook.grid is None else density(hook.grid)
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


class _Beneath:
    """Puts our hook beneath those of accelerate (CPU offload).

    They keep the forward they wrap in `_old_forward`, and drop anything on top of them when they are renewed, which is
    after every pipeline call. Inside this block `forward` is the wrapped one.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.outer = module, None

    def __enter__(self) -> None:
        if hasattr(self.module, "_hf_hook") and "_old_forward" in vars(self.module):
            self.outer, self.module.forward = self.module.forward, self.module._old_forward

    def __exit__(self, *exception: Any) -> None:
        if self.outer is not None:
            self.module._old_forward, self.module.forward = self.module.forward, self.outer


def _unhook(module: torch.nn.Module, name: str, had_registry: bool, had_forward: bool) -> None:
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    if name in registry.hooks:
        with _Beneath(module):
            registry.remove_hook(name, recurse=False)
    if registry.hooks or had_registry:
        return
    del module._diffusers_hook
    # remove_hook leaves the class's own forward behind as an attribute of the instance.
    forward = vars(module).get("forward")
    if not had_forward and getattr(forward, "__func__", None) is type(module).forward:
        del module.forward


def _forget_children(module: torch.nn.Module) -> None:
    """diffusers keeps a list of hooked descendants; newer versions have to be told that it changed."""
    registry = getattr(module, "_diffusers_hook", None)
    if hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def _collect_quietly(context: Context) -> None:
    strict, context.strict = context.strict, False
    try:
        context.collect()
    finally:
        context.strict = strict
