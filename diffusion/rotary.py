"""Changing the frequencies of rotary position embeddings, and taking the change out again.

A table of rotary embeddings holds the cosine and sine of `phase + position * theta` for every token and channel.
Replacing `theta` along an axis of the grid by another frequency turns that entry by `position * (other - theta)`, so an
edit needs neither the phases nor the order of the channels, only the frequency of each channel and the token's place.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import ModelHook

from vision_attn.diffusion.attachment import denoisers
from vision_attn.diffusion.families import Family, Grid, family_of
from vision_attn.diffusion.installed import ROTARY, Installed, refuse_or_replace
from vision_attn.hosts import AttachError

if TYPE_CHECKING:
    from vision_attn.diffusion.methods.rope import RotaryEdit

ROOT_HOOK, TABLE_HOOK = "vision_attn_rotary_root", "vision_attn_rotary"


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """Of one axis: `theta` `[n]` in radians per token, float64, fastest first; channels `[n, copies]` of each."""

    theta: torch.Tensor
    channels: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Where a family has its rotary embedding.

    Args:
        axes: `(denoiser, arguments of its call by name)` -> frequencies per axis of the grid.
        module: attribute of the denoiser that makes the tables.
        argument: argument of the denoiser that brings them instead.
        rows: dimension of the tables that runs over tokens.
        noise: what the timestep is divided by to get the share of noise; None where it is something else.
    """

    axes: Callable[[Any, dict[str, Any]], dict[str, Frequencies]]
    module: str = ""
    argument: str = ""
    rows: int = 0
    noise: float | None = 1000.0


def _powers(dim: int, base: float) -> torch.Tensor:
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _in_pairs(base: float, **dims: int) -> dict[str, Frequencies]:
    """Axes one after the other, the two channels of a frequency side by side."""
    ends = torch.tensor([0, *dims.values()]).cumsum(0).tolist()
    spans = zip(dims.items(), ends[:-1], ends[1:], strict=True)
    return {axis: Frequencies(_powers(d, base), torch.arange(a, b).view(-1, 2)) for (axis, d), a, b in spans}


def _wan(model: Any, call: dict[str, Any]) -> dict[str, Frequencies]:
    rope = model.rope
    return _in_pairs(10000.0, t=rope.t_dim, h=rope.h_dim, w=rope.w_dim)


def _hunyuan(model: Any, call: dict[str, Any]) -> dict[str, Frequencies]:
    return _in_pairs(model.rope.theta, **dict(zip("thw", model.rope.rope_dim, strict=True)))


def _cogvideox(model: Any, call: dict[str, Any]) -> dict[str, Frequencies]:
    # Its pipeline already fits height and width to the trained size.
    return _in_pairs(10000.0, t=model.config.attention_head_dim // 4)


def _flux(model: Any, call: dict[str, Any]) -> dict[str, Frequencies]:
    first, height, width = model.pos_embed.axes_dim
    axes = _in_pairs(model.pos_embed.theta, first=first, h=height, w=width)
    return {axis: axes[axis] for axis in "hw"}


def _cosmos(model: Any, call: dict[str, Any]) -> dict[str, Frequencies]:
    rope, axes, start = model.rope, {}, 0
    half = (rope.dim_t + rope.dim_h + rope.dim_w) // 2
    for axis in "thw":
        dim = getattr(rope, f"dim_{axis}")
        theta = _powers(dim, 10000.0 * getattr(rope, f"{axis}_ntk_factor"))
        first = torch.arange(start, start + dim // 2)
        axes[axis] = Frequencies(theta, torch.stack([first, first + half], 1))
        start += dim // 2
    if call.get("fps") is not None:
        axes["t"] = dataclasses.replace(axes["t"], theta=axes["t"].theta * rope.base_fps / call["fps"])
    return axes


def _ltx(model: Any, call: dict[str, Any]) -> dict[str, Frequencies]:
    if call.get("video_coords") is not None:
        raise AttachError("positions of LTX that are given as video_coords cannot be changed; call it without them")
    rope, scales = model.rope, call.get("rope_interpolation_scale")
    base = {"t": rope.base_num_frames, "h": rope.base_height, "w": rope.base_width}
    patch = {"t": rope.patch_size_t, "h": rope.patch_size, "w": rope.patch_size}
    count, axes = rope.dim // 6, {}
    rising = rope.theta ** torch.linspace(0, 1, count, dtype=torch.float64) * math.pi
    for at, axis in enumerate("thw"):
        step = 1.0 if scales is None else float(scales[at]) * patch[axis] / base[axis]
        first = rope.dim % 6 + 2 * (3 * torch.arange(count) + at)
        axes[axis] = Frequencies(rising.flip(0) * step, torch.stack([first, first + 1], 1).flip(0))
    return axes


ROTARIES = {
    "WanTransformer3DModel": Rotary(_wan, "rope", rows=1),
    "HunyuanVideoTransformer3DModel": Rotary(_hunyuan, "rope"),
    "CogVideoXTransformer3DModel": Rotary(_cogvideox, argument="image_rotary_emb"),
    "LTXVideoTransformer3DModel": Rotary(_ltx, "rope", rows=1),
    "CosmosTransformer3DModel": Rotary(_cosmos, "rope", noise=None),
    "FluxTransformer2DModel": Rotary(_flux, "pos_embed", noise=1.0),
}
_REFUSED = {
    "MochiTransformer3DModel": "it learns its frequencies for every head",
    "QwenImageTransformer2DModel": "it places text behind the picture, by the picture's size",
}


@dataclasses.dataclass
class RotaryReport:
    """What a change of rotary embeddings did; `denoisers` has one entry per denoiser.

    Each entry has its name, class, the trained sizes in tokens per axis, how often it was called and its tables were
    changed (calls in compiled code are not counted), and the last grid with its ratio to the trained size per axis.
    """

    method: dict[str, Any]
    denoisers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: dict, list, str, int, float, bool, None."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.method.items() if k != "method" and v is not None)
        lines = [f"{self.method['method']}({options})"]
        for d in self.denoisers:
            trained = ", ".join(f"{axis} {size}" for axis, size in d["trained"].items())
            lines.append(f"{d['name']} ({d['class']}): trained on {trained} tokens")
            lines.append(f"  {d['changed']} of {d['calls']} calls were longer, and changed")
            if d["grid"]:
                times = ", ".join(f"{axis} {ratio:.3g}x" for axis, ratio in d["times"].items())
                lines.append(f"  last grid {'x'.join(map(str, d['grid']))}: {times}")
        return "\n".join(lines)


class Denoiser:
    """One denoiser whose frequencies are edited: what its hooks share."""

    def __init__(self, name: str, module: torch.nn.Module, edit: RotaryEdit) -> None:
        self.name, self.module, self.edit = name, module, edit
        self.family: Family = family_of(module, None)
        self.rotary = rotary_of(self.family)
        self.trained: dict[str, int] = edit.trained(module, self.family)
        self.memo: dict = {}
        self.grid: Grid | None = None
        self.sizes: dict[str, int] = {}
        self.longer: list[str] = []  # axes that are, in the coming call
        self.found: dict[str, Frequencies] = {}
        self.noise: torch.Tensor | None = None
        self.calls = self.changed = 0

    def measure(self, call: dict[str, Any]) -> None:
        """Read grid, frequencies and the share of noise from the arguments of a denoiser call."""
        self.grid = self.family.grid(self.module.config, call, self.memo)
        if self.grid is None:
            raise AttachError(f"the token grid of this {self.family.name} call is not known")
        self.sizes = dict(zip(self.family.axes, self.grid, strict=True))
        self.longer = [axis for axis, size in self.trained.items() if self.sizes[axis] > size]
        self.found = self.rotary.axes(self.module, call)
        if self.edit.needs_noise:
            if call.get("timestep") is None:
                raise AttachError(f"{type(self.edit).__name__} follows the timestep, and this call passes none")
            self.noise = (call["timestep"].float().amax() / self.rotary.noise).clamp(0, 1)
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.changed += bool(self.longer)

    def change(
        self, cos: torch.Tensor, sin: torch.Tensor, ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables with the edited frequencies.

        Args:
            ids: positions `[tokens, axes]`, the last ones those of the grid; None for a table of the grid alone.
        """
        if not self.longer:
            return cos, sin
        places = self.places(cos, ids)
        wide = torch.promote_types(cos.dtype, torch.float32)
        new_cos, new_sin = cos.to(wide, copy=True), sin.to(wide, copy=True)
        for axis in self.longer:
            theta, channels = self.found[axis].theta, self.found[axis].channels.to(cos.device)
            other = self.edit.edited(theta, axis, self.sizes[axis], self.trained[axis], self.family, self.noise)
            exact = torch.float32 if cos.device.type == "mps" else torch.float64
            turn = (other - theta.to(other)).to(cos.device, exact)
            angle = torch.outer(places[axis].to(exact), turn)
            shape = [1] * (cos.ndim - 1) + [channels.shape[0]]
            shape[self.rotary.rows] = len(angle)
            turn_cos, turn_sin = (part.to(wide).view(shape) for part in (angle.cos(), angle.sin()))
            for copy in channels.T:
                c, s = new_cos[..., copy], new_sin[..., copy]
                new_cos[..., copy], new_sin[..., copy] = c * turn_cos - s * turn_sin, s * turn_cos + c * turn_sin
        gain = max(self.edit.gain(self.sizes[axis] / self.trained[axis]) for axis in self.longer)
        return (new_cos * gain).to(cos.dtype), (new_sin * gain).to(sin.dtype)

    def places(self, table: torch.Tensor, ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Position of every row of a table along each axis of the grid."""
        if ids is not None:
            return dict(zip(self.family.axes, ids[:, -len(self.family.axes) :].T, strict=True))
        rows = table.shape[self.rotary.rows]
        if rows != math.prod(self.grid):
            raise AttachError(
                f"the rotary table of this {self.family.name} has {rows} rows for {math.prod(self.grid)} tokens; if "
                "context parallelism is on, enable it after attaching"
            )
        each = torch.meshgrid(*(torch.arange(n, device=table.device) for n in self.grid), indexing="ij")
        return {axis: place.flatten() for axis, place in zip(self.family.axes, each, strict=True)}

    def report(self) -> dict[str, Any]:
        return {
            "name": self.name, "class": type(self.module).__name__, "trained": dict(self.trained),
            "calls": self.calls, "changed": self.changed, "grid": list(self.grid or ()),
            "times": {axis: self.sizes[axis] / size for axis, size in self.trained.items() if axis in self.sizes},
        }  # fmt: skip


class RotaryRootHook(ModelHook):
    """On the denoiser: reads each call, and edits tables that come as an argument."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.parameters = list(inspect.signature(denoiser.module.forward).parameters)

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any):
        call = dict(zip(self.parameters[: len(args)], args, strict=True)) | kwargs
        self.denoiser.measure(call)
        name = self.denoiser.rotary.argument
        if not name:
            return args, kwargs
        if call.get(name) is None:
            raise AttachError(f"this {type(module).__name__} is called without {name}: it has no rotary embedding")
        return (), {**call, name: self.denoiser.change(*call[name], None)}


class RotaryTableHook(ModelHook):
    """On the module that makes the tables."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        ids = (args[0] if args else kwargs["ids"]) if self.denoiser.family.name == "FluxTransformer2DModel" else None
        return self.denoiser.change(*self.fn_ref.original_forward(*args, **kwargs), ids)


class RotaryRun(Installed):
    """Edited rotary embeddings of a pipeline or denoiser, until detached."""

    def __init__(self, target: Any, edit: RotaryEdit, replace: bool) -> None:
        super().__init__()
        self.label, self._edit = repr(edit), edit
        self._edited = [Denoiser(name, module, edit) for name, module in denoisers(target)[1].items()]
        for each in self._edited:  # all of them before any is changed
            refuse_or_replace(each.module, ROTARY, label=self.label, replace=replace)
        with self.installing():
            for each in self._edited:
                self.claim(each.module, ROTARY)
                self.hook(each.module, RotaryRootHook(each), ROOT_HOOK)
                if each.rotary.module:
                    self.hook(getattr(each.module, each.rotary.module), RotaryTableHook(each), TABLE_HOOK)

    @property
    def report(self) -> RotaryReport:
        """What was changed so far."""
        return RotaryReport(self._edit.to_dict(), [each.report() for each in self._edited])


@functools.cache
def rotary_of(family: Family) -> Rotary:
    """Where a family has its rotary embedding.

    Raises:
        ValueError: it has none, or one whose frequencies cannot be edited.
    """
    if family.name not in ROTARIES:
        reason = _REFUSED.get(family.name, "it has no rotary embedding")
        raise ValueError(
            f"the rotary frequencies of {family.name} cannot be changed: {reason}; allowed: {', '.join(ROTARIES)}"
        )
    return ROTARIES[family.name]
