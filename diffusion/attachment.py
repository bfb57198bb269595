"""attach() for diffusers: put a pattern into the self-attention of a pipeline, and take it out again without a trace."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName

from vision_attn.diffusion.families import Family, family_of
from vision_attn.diffusion.hooks import AttentionHook, Context, RootHook
from vision_attn.diffusion.joint import density
from vision_attn.diffusion.report import DenoiserReport, Report
from vision_attn.diffusion.schedule import Schedule, Steps
from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.patterns import Pattern, Radial

ROOT_HOOK, ATTENTION_HOOK = "vision_attn_root", "vision_attn_attention"
DENOISERS = ("transformer", "transformer_2", "unet")


def attach(
    target: Any,
    pattern: Pattern,
    *,
    dense_steps: int = 0,
    dense_layers: int | Iterable[int] = 0,
    dense_last_steps: int = 0,
    calls: str = "both",
    temperature: str | float = "none",
    train_tokens: int | None = None,
    grid: tuple[int, ...] | None = None,
    backend: str | None = None,
    strict: bool = False,
    replace: bool = False,
) -> Run:
    """Make the self-attention of a diffusers pipeline or denoiser follow `pattern`, until detached.

    Image tokens follow the pattern among themselves. Text tokens see everything and are seen by everything, except padding that
    the model masks. A dense call is the untouched model, bit for bit.

    Args:
        target: a diffusers pipeline (both denoisers of one that has two), or a denoiser such as `pipe.transformer`.
        pattern: who sees whom on the token grid, `(t, h, w)` for video and `(h, w)` for images. One int for all axes is cut down on an
            axis that is shorter; a tuple must fit.
        dense_steps: the first denoising steps that stay dense, counted on the scheduler's whole schedule.
        dense_layers: the first layers that stay dense, or the numbers of those layers, from 0. Layers are transformer blocks in order
            of execution, double-stream before single-stream; for a U-Net every self-attention is a layer.
        dense_last_steps: the last denoising steps that stay dense.
        calls: which guidance calls follow the pattern: "both", "cond" or "uncond".
        temperature: factor on the scores of every attached call: "none", a number above 0, or "proportional",
            `sqrt(log(tokens) / log(train_tokens))` where tokens counts the sequence, text included.
        train_tokens: tokens of the sequence the model was trained on, text included; for "proportional", which cannot guess it.
        grid: sizes in tokens, when the class is unknown or the call does not say.
        backend: kernel backend by name; None lets `attend` pick.
        strict: raise where a call would stay dense with a warning.
        replace: detach what is attached to the same modules first; otherwise that is an error.

    Returns:
        A `Run`: context manager, `run.report`, `run.detach()`.

    Raises:
        TypeError: the target or the pattern is of the wrong kind.
        ValueError: the class cannot be attached to, no module matched, or an option is out of range.

    >>> from diffusers import WanTransformer3DModel
    >>> from vision_attn import Neighborhood
    >>> model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=2, text_dim=16, ffn_dim=32, freq_dim=16)
    >>> video, text = torch.randn(1, 16, 2, 16, 16), torch.randn(1, 4, 16)
    >>> with torch.no_grad(), attach(model, Neighborhood(window=(2, 5, 5)), dense_layers=1) as run:
    ...     out = model(hidden_states=video, timestep=torch.tensor([500]), encoder_hidden_states=text).sample
    >>> run.report.denoisers[0].calls
    {'sparse': 1, 'dense': 1}
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as Neighborhood(window=7) or Radial(); got {pattern!r}")
    schedule = Schedule(dense_steps, dense_layers, dense_last_steps, calls)
    _check_temperature(temperature, train_tokens)
    grid = _check_grid(grid)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}, or None to let attend pick")
    options = {
        "pattern": pattern, "temperature": temperature, "train_tokens": train_tokens, "grid": grid, "backend": backend, "strict": strict
    }  # fmt: skip
    pipe, modules = _denoisers(target)
    plans = [_plan(name, module, pattern, schedule, grid) for name, module in modules.items()]
    attached = [run for plan in plans if (run := _attached(plan.module)) is not None]
    if attached and not replace:
        raise ValueError(f"{plans[0].cls} already has a pattern attached; detach() that run first, or pass replace=True")
    for run in attached:
        run.detach()
    return Run(pipe, plans, schedule, options)


@dataclasses.dataclass(frozen=True)
class _Plan:
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

    def __init__(self, pipe: Any | None, plans: list[_Plan], schedule: Schedule, options: dict[str, Any]) -> None:
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

    def _install(self, pipe: Any | None, plan: _Plan) -> None:
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
        """Make a processor call `scaled_dot_product_attention`, which other attention backends do not; returns what was replaced."""
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
        for context in self._contexts:
            _collect_quietly(context)
        while self._undo:
            self._undo.pop()()
        for plan in self._plans:
            _forget_children(plan.module)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    @property
    def report(self) -> Report:
        """What changed and what ran so far. Calls inside a model compiled as a whole count once per announced call."""
        pattern = self._options["pattern"]
        plain = {**dataclasses.asdict(self._schedule), **{k: v for k, v in self._options.items() if k != "pattern"}}
        defaults = inspect.signature(attach).parameters
        warnings: dict[str, int] = {}
        denoisers = []
        for plan, context, backends in zip(self._plans, self._contexts, self._backends):
            _collect_quietly(context)
            for note, count in context.warnings.items():
                warnings[note] = warnings.get(note, 0) + count
            denoisers.append(_denoiser_report(plan, context, backends))
        options = {k: v for k, v in plain.items() if v != defaults[k].default}
        return Report(pattern.to_dict(), options, denoisers, warnings)

    def __repr__(self) -> str:
        state = "attached to" if self._undo else "detached from"
        return f"<Run: {self._options['pattern']!r} {state} {', '.join(plan.cls for plan in self._plans)}>"


def _denoiser_report(plan: _Plan, context: Context, backends: list[str]) -> DenoiserReport:
    layers: dict[int, float | None] = {}
    kept = total = 0.0
    for hook in context.hooks:
        share = None if hook.grid is None else density(context.pattern, hook.grid)
        layers[hook.layer] = 1.0 if hook.always_dense else share
        sparse, dense = hook.calls["sparse"], hook.calls["dense"]
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
        kept=kept / total if total else None,
        backends=backends,
    )


def _denoisers(target: Any) -> tuple[Any | None, dict[str, torch.nn.Module]]:
    """The pipeline, if it is one, and its denoisers by name."""
    if isinstance(target, torch.nn.Module):
        return None, {"denoiser": _plain(target)}
    if not isinstance(getattr(target, "components", None), dict):
        raise TypeError(f"attach to a diffusers pipeline or to its denoiser; got {type(target).__name__}")
    found = {name: getattr(target, name, None) for name in DENOISERS}
    found = {name: _plain(module) for name, module in found.items() if isinstance(module, torch.nn.Module)}
    if not found:
        raise ValueError(f"{type(target).__name__} has no denoiser; looked for its attributes {', '.join(DENOISERS)}")
    return target, found


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself rather than the wrapper of torch.compile."""
    while hasattr(module, "_orig_mod"):
        module = module._orig_mod
    return module


def _plan(name: str, module: torch.nn.Module, pattern: Pattern, schedule: Schedule, grid: tuple[int, ...] | None) -> _Plan:
    family = family_of(module, grid)
    if isinstance(pattern, Radial) and "t" not in family.axes:
        raise ValueError(
            f"Radial follows the distance between frames, and {family.name} makes images; use Neighborhood, Window or SlidingTile"
        )
    names = {n: m for n, m in module.named_modules() if re.search(family.attention, n)}
    if not names:
        raise ValueError(
            f"nothing to attach to in {type(module).__name__}: no module name matches {family.attention!r} (its self-attention as "
            f"{family.name} has it)"
        )
    order = sorted(names, key=lambda n: family.stages.index(n.split(".")[0])) if family.stages else list(names)
    blocks = list(dict.fromkeys(n.rpartition(".")[0] for n in order))
    attention = {n: (names[n], blocks.index(n.rpartition(".")[0])) for n in order}
    return _Plan(name, module, family, attention, schedule.layers(len(blocks)))


def _attached(module: torch.nn.Module) -> Run | None:
    hook = module._diffusers_hook.get_hook(ROOT_HOOK) if hasattr(module, "_diffusers_hook") else None
    return None if hook is None else hook.run


class _Beneath:
    """Hooks of accelerate (CPU offload) keep the forward they wrap in `_old_forward` and drop anything on top of them when they are
    renewed after every pipeline call; inside this block `forward` is the wrapped one, so ours goes beneath."""

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


def _check_temperature(temperature: Any, train_tokens: Any) -> None:
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature not in ("none", "proportional") and not (number and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be 'none', 'proportional' or a number above 0; got {temperature!r}")
    if (temperature == "proportional") != (train_tokens is not None):
        raise ValueError(
            "temperature='proportional' and train_tokens go together: the tokens of the sequence the model was trained on, text "
            f"included (FLUX at 1024x1024: 4096 + 512 = 4608); got temperature={temperature!r}, train_tokens={train_tokens!r}"
        )
    if train_tokens is not None and (not isinstance(train_tokens, int) or isinstance(train_tokens, bool) or train_tokens < 2):
        raise ValueError(f"train_tokens must be an int of at least 2; got {train_tokens!r}")


def _check_grid(grid: Any) -> tuple[int, ...] | None:
    if grid is None:
        return None
    sizes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(f"grid must be one to three sizes in tokens, such as (t, h, w); got {grid!r}")
    return sizes
