"""FreeSwim: videos larger than the model was trained on, by two paths through every block."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from typing import Any, ClassVar

import torch

from vision_attn.diffusion.attachment import denoisers, self_attention
from vision_attn.diffusion.families import Family, family_of
from vision_attn.diffusion.installed import CROSS_ATTENTION, SELF_ATTENTION, Installed, refuse_or_replace
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.methods.dual_path import CrossHook, DualPath, RootHook, SelfHook
from vision_attn.diffusion.native import native
from vision_attn.diffusion.schedule import Steps

HOOK = "vision_attn_freeswim"
_CROSS = re.compile(r"attn1$")  # beside every self-attention of this name is the cross-attention `attn2`


@dataclasses.dataclass(frozen=True)
class FreeSwim(Method):
    """Windows of the training size for detail, and full attention beside them to keep the scene in one piece.

    Every call runs on two copies of the latent. The local copy's queries see all frames and, in space, a window of the
    training size that moves inward at borders; the global copy sees everything. Both take their cross-attention to the
    text from the global copy. Only the local copy's result is used. It changes one pass through the denoiser;
    `upscale_video` is the whole way from a small video to a large one.

    Args:
        base: training grid `(h, w)` in tokens (pixels / 16 for Wan). None: looked up for Wan2.1 1.3B and 14B and the
            built-in model.
        cache_steps: the global copy is computed in every `cache_steps`-th conditional call, and its answers from the
            text are used again in the calls between; unconditional calls stay local. None: computed in every call.
        temperature: factor on the scores of self-attention; None is `sqrt(ln(2 n) / ln(n))` with `n = h * w` of base.
        inward: False cuts windows off at borders instead of moving them inward.
        override: False is the window alone, without a global copy.
        cache_device: where the answers wait, such as "cpu"; None leaves them where they are computed.

    Raises:
        TypeError, ValueError: an option out of range; at `attach`, a denoiser without cross-attention, or whose
            training size is not known.

    >>> from diffusers import WanTransformer3DModel
    >>> from vision_attn import attach
    >>> small = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, text_dim=16, ffn_dim=32, freq_dim=16)
    >>> model = WanTransformer3DModel(**small)
    >>> video, text = torch.randn(1, 16, 2, 16, 16), torch.randn(1, 4, 16)
    >>> with torch.no_grad(), attach(model, FreeSwim(base=(4, 4))) as run:
    ...     out = model(hidden_states=video, timestep=torch.tensor([500]), encoder_hidden_states=text).sample
    >>> print(run.report)
    freeswim(base=(4, 4), cache_steps=2)
    denoiser (WanTransformer3DModel): window 2x5x5 of 2x8x8 (39.1%), scores x 1.118
      calls     1 with global copy, 0 with stored answers, 0 local

    Paper: FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video
    Generation.
    """

    base: tuple[int, int] | None = None
    cache_steps: int | None = 2
    temperature: float | None = None
    inward: bool = True
    override: bool = True
    cache_device: str | None = None
    name: ClassVar[str] = "freeswim"

    def __post_init__(self) -> None:
        if isinstance(self.base, list):
            object.__setattr__(self, "base", tuple(self.base))
        base = self.base
        if base is not None and not (
            isinstance(base, tuple) and len(base) == 2 and all(type(n) is int and n > 0 for n in base)
        ):
            raise ValueError(f"base must be the training grid (height, width) in tokens; got {base!r}")
        if base is not None and math.prod(base) < 2 and self.temperature is None:
            raise ValueError(f"base={base} is a single token, for which there is no temperature; give one")
        steps = self.cache_steps
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ValueError(f"cache_steps must be an int of at least 1, or None for no cache; got {steps!r}")
        factor = self.temperature
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if factor is not None and not (number and math.isfinite(factor) and factor > 0):
            raise ValueError(f"temperature must be a number above 0, or None for the published rule; got {factor!r}")
        for field in ("inward", "override"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False; got {getattr(self, field)!r}")
        if self.cache_device is not None:
            try:
                torch.device(self.cache_device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"cache_device must name a device such as 'cpu'; got {self.cache_device!r}") from error

    def attach(self, target: Any, *, backend: str | None = None, replace: bool = False) -> FreeSwimRun:
        pipe, modules = denoisers(target)
        plans = [self._plan(name, module) for name, module in modules.items()]
        return FreeSwimRun(self, pipe, plans, backend, replace)

    def _plan(self, name: str, module: torch.nn.Module) -> Plan:
        cls = type(module).__name__
        family = family_of(module, None)
        attention = self_attention(module, family)
        names = dict(module.named_modules())
        pairs = [(layer, names.get(_CROSS.sub("attn2", at))) for at, (layer, _) in attention.items()]
        if family.text != "none" or family.stages or not all(_CROSS.search(at) for at in attention):
            reason = (
                "convolutions and several levels instead of blocks over one grid" if family.stages
                else "its text inside the sequence instead of cross-attention, which FreeSwim shares between its paths"
            )  # fmt: skip
            raise ValueError(f"FreeSwim cannot go into {cls}: it has {reason}")
        if any(cross is None for _, cross in pairs):
            raise ValueError(f"FreeSwim cannot go into this {cls}: blocks have no cross-attention beside attn1")
        base = self.base
        if base is None:
            known = native(module)
            if known is None:
                raise ValueError(
                    f"the size this {cls} was trained on is not known; give it in tokens, FreeSwim(base=(height, "
                    "width)): pixels / 16 for Wan, so (30, 52) for 480 x 832"
                )
            base = known.grid
        return Plan(name, module, family, base, pairs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A denoiser, looked up before anything is changed; pairs are (self-attention, cross-attention) per block."""

    name: str
    module: torch.nn.Module
    family: Family
    base: tuple[int, int]
    pairs: list[tuple[torch.nn.Module, torch.nn.Module]]


class FreeSwimRun(Installed):
    """FreeSwim attached: a context manager that detaches at the end, also after an exception."""

    def __init__(self, method: FreeSwim, pipe: Any | None, plans: list[Plan], backend: str | None, replace: bool):
        super().__init__()
        self.method, self._plans, self._paths = method, plans, []
        self.label = "FreeSwim"
        parts = (SELF_ATTENTION, CROSS_ATTENTION) if method.override else (SELF_ATTENTION,)
        for plan in plans:  # all of them before any is changed
            refuse_or_replace(plan.module, *parts, label=self.label, replace=replace)
        with self.installing():
            for plan in plans:
                self._install(plan, parts, Steps(pipe), backend)

    def _install(self, plan: Plan, parts: tuple[str, ...], steps: Steps, backend: str | None) -> None:
        self.claim(plan.module, *parts)
        path = DualPath(plan.family, getattr(plan.module, "config", None), steps, self.method, plan.base, backend)
        self._paths.append(path)
        self.hook(plan.module, RootHook(path, list(inspect.signature(plan.module.forward).parameters)), HOOK)
        for layer, cross in plan.pairs:
            self.native_backend(getattr(layer, "processor", None))
            self.hook(layer, SelfHook(path), HOOK)
            if self.method.override:
                self.native_backend(getattr(cross, "processor", None))
                path.cross.append(CrossHook(path))
                self.hook(cross, path.cross[-1], HOOK)
        self.later(path.forget)

    @property
    def report(self) -> FreeSwimReport:
        """What was attached and what ran so far."""
        return FreeSwimReport(
            self.method.to_dict(), [_report(*each) for each in zip(self._plans, self._paths, strict=True)]
        )


@dataclasses.dataclass
class FreeSwimReport:
    """`print(run.report)` shows it, `to_dict()` is plain JSON.

    Args:
        method: the options.
        denoisers: per denoiser its name, class, training grid `base`, token `grid` and `window` of the last call, share
            of the pairs that the local copy's self-attention computes (`density`), factor on the scores (`scores`),
            calls by kind, and bytes stored.
    """

    method: dict[str, Any]
    denoisers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: dict, list, str, int, float, bool, None."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __str__(self) -> str:
        defaults = dataclasses.asdict(FreeSwim()) | {"method": "freeswim", "cache_steps": ""}  # always shown
        shown = {k: v for k, v in self.method.items() if v != defaults[k]}
        lines = [f"freeswim({', '.join(f'{k}={v!r}' for k, v in shown.items())})"]
        for one in self.denoisers:
            where = "not called yet"
            if one["grid"]:
                sizes = ["x".join(map(str, one[key])) for key in ("window", "grid")]
                where = f"window {sizes[0]} of {sizes[1]} ({one['density']:.1%})"
            lines.append(f"{one['name']} ({one['cls']}): {where}, scores x {one['scores']:.3f}")
            calls = one["calls"]
            lines.append(
                f"  calls     {calls['dual']} with global copy, {calls['cached']} with stored answers, "
                f"{calls['local']} local"
            )
        return "\n".join(lines)


def _report(plan: Plan, path: DualPath) -> dict[str, Any]:
    grid = path.grid
    sizes = (
        None
        if grid is None
        else [*grid[:-2], *(min(n // 2 * 2 + 1, m) for n, m in zip(plan.base, grid[-2:], strict=True))]
    )
    return {
        "name": plan.name,
        "cls": type(plan.module).__name__,
        "base": list(plan.base),
        "grid": None if grid is None else list(grid),
        "window": sizes,
        "density": None if grid is None else path.pattern.density(grid),
        "scores": path.factor,
        "calls": dict(path.calls),
        "stored_bytes": sum(h.stored.numel() * h.stored.element_size() for h in path.cross if h.stored is not None),
    }
