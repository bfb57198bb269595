"""attach() for diffusers: put a pattern or a method into a pipeline, and take it out without a trace."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from typing import Any

import torch

from vision_attn.diffusion.families import Family, family_of
from vision_attn.diffusion.installed import Installed
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.run import Plan, Run
from vision_attn.diffusion.schedule import Schedule
from vision_attn.diffusion.sharding import check_shards
from vision_attn.hosts import plain
from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.parallel import Shards
from vision_attn.kernels.patterns import Pattern, Radial

DENOISERS = ("transformer", "transformer_2", "unet")


def attach(
    target: Any,
    pattern: Pattern | tuple[Pattern, ...] | Method,
    *,
    dense_steps: int = 0,
    dense_layers: int | Iterable[int] = 0,
    dense_last_steps: int = 0,
    calls: str = "both",
    temperature: str | float = "none",
    train_tokens: int | None = None,
    grid: tuple[int, ...] | None = None,
    backend: str | None = None,
    parallel: Shards | None = None,
    strict: bool = False,
    replace: bool = False,
) -> Installed:
    """Make the self-attention of a diffusers pipeline or denoiser follow `pattern`, until detached.

    Image tokens follow the pattern among themselves. Text tokens see everything and are seen by everything, except
    padding that the model masks. A dense call is the untouched model, bit for bit.

    Args:
        target: a diffusers pipeline (both denoisers of one that has two), or a denoiser such as `pipe.transformer`.
        pattern: who sees whom on the token grid, `(t, h, w)` for video and `(h, w)` for images. One int for all axes is
            cut down on an axis that is shorter; a tuple must fit. A tuple of patterns is one per layer. A method, such
            as `FreeSwim()` or a `Preset`, is attached in its own way, and takes the options that it names.
        dense_steps: the first denoising steps that stay dense, counted on the scheduler's whole schedule.
        dense_layers: the first layers that stay dense, or the numbers of those layers, from 0. Layers are transformer
            blocks in order of execution, double-stream before single-stream; in a U-Net every self-attention is a
            layer.
        dense_last_steps: the last denoising steps that stay dense.
        calls: which guidance calls follow the pattern: "both", "cond" or "uncond".
        temperature: factor on the scores of every attached call: "none", a number above 0, or "proportional",
            `sqrt(log(tokens) / log(train_tokens))` where tokens counts the sequence, text included.
        train_tokens: tokens of the sequence the model was trained on, text included; "proportional" cannot guess it.
        grid: sizes in tokens, when the class is unknown or the call does not say.
        backend: kernel backend by name; None lets `attend` pick.
        parallel: cut the image along one axis of its grid over the processes of a group, as `Shards(axis=1)` says:
            every rank calls the pipeline with the same arguments and gets the same result, and only what the pattern
            reaches is exchanged. For Wan, Flux, QwenImage and LTX; axis 0 is frames for video.
        strict: raise where a call would stay dense with a warning.
        replace: detach what is attached to the same modules first; otherwise that is an error.

    Returns:
        A `Run`: context manager, `run.report`, `run.detach()`.

    Raises:
        TypeError: the target or the pattern is of the wrong kind.
        ValueError: the class cannot be attached to, no module matched, an option is out of range, or what is attached
            already is in the way.

    >>> from diffusers import WanTransformer3DModel
    >>> from vision_attn import Neighborhood
    >>> small = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, text_dim=16, ffn_dim=32, freq_dim=16)
    >>> model = WanTransformer3DModel(**small)
    >>> video, text = torch.randn(1, 16, 2, 16, 16), torch.randn(1, 4, 16)
    >>> with torch.no_grad(), attach(model, Neighborhood(window=(2, 5, 5)), dense_layers=1) as run:
    ...     out = model(hidden_states=video, timestep=torch.tensor([500]), encoder_hidden_states=text).sample
    >>> run.report.denoisers[0].calls
    {'sparse': 1, 'dense': 1}
    """
    if isinstance(pattern, Method):
        given = {
            "dense_steps": dense_steps, "dense_layers": dense_layers, "dense_last_steps": dense_last_steps,
            "calls": calls, "temperature": temperature, "train_tokens": train_tokens, "grid": grid,
            "backend": backend, "parallel": parallel, "strict": strict, "replace": replace,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
        pattern.refuse_unknown(given)
        return pattern.attach(target, **given)
    schedule = (dense_steps, dense_layers, dense_last_steps, calls)
    return Run(*planned(target, pattern, schedule, temperature, train_tokens, grid, backend, strict, parallel), replace)


def planned(
    target: Any,
    pattern: Pattern | tuple[Pattern, ...],
    schedule: tuple,
    temperature: str | float,
    train_tokens: int | None,
    grid: tuple[int, ...] | None,
    backend: str | None,
    strict: bool,
    parallel: Shards | None = None,
) -> tuple[Any | None, list[Plan], Schedule, dict[str, Any]]:
    """The arguments of a `Run`, from checked options of `attach`; nothing is changed yet."""
    patterns = pattern if isinstance(pattern, tuple) and pattern else (pattern,)
    if not all(isinstance(each, Pattern) for each in patterns):
        raise TypeError(
            "pattern must be a pattern such as Neighborhood(window=7) or Radial(), a tuple of one pattern per layer, "
            f"or a method; got {pattern!r}"
        )
    schedule = Schedule(*schedule)
    _check_temperature(temperature, train_tokens)
    grid = _check_grid(grid)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}, or None to let attend pick")
    options = {
        "pattern": pattern, "temperature": temperature, "train_tokens": train_tokens, "grid": grid,
        "backend": backend, "strict": strict, "parallel": parallel,
    }  # fmt: skip
    pipe, modules = denoisers(target)
    plans = [_plan(name, module, pattern, schedule, grid) for name, module in modules.items()]
    for plan in plans if parallel is not None else ():
        check_shards(plan.module, plan.family, parallel)
    return pipe, plans, schedule, options


_DEFAULTS = {name: option.default for name, option in inspect.signature(attach).parameters.items()}


def denoisers(target: Any) -> tuple[Any | None, dict[str, torch.nn.Module]]:
    """The pipeline, if it is one, and its denoisers by name.

    Raises:
        TypeError, ValueError: neither a pipeline nor a module; a pipeline without a denoiser.
    """
    if isinstance(target, torch.nn.Module):
        return None, {"denoiser": plain(target)}
    if not isinstance(getattr(target, "components", None), dict):
        raise TypeError(f"attach to a diffusers pipeline or to its denoiser; got {type(target).__name__}")
    found = {name: getattr(target, name, None) for name in DENOISERS}
    found = {name: plain(module) for name, module in found.items() if isinstance(module, torch.nn.Module)}
    if not found:
        raise ValueError(f"{type(target).__name__} has no denoiser; looked for its attributes {', '.join(DENOISERS)}")
    return target, found


def self_attention(module: torch.nn.Module, family: Family) -> dict[str, tuple[torch.nn.Module, int]]:
    """The self-attention modules of a denoiser in order of execution: name -> module, layer.

    Raises:
        ValueError: there is none where the family has them.
    """
    names = {n: m for n, m in module.named_modules() if re.search(family.attention, n)}
    if not names:
        raise ValueError(
            f"nothing to attach to in {type(module).__name__}: no module name matches {family.attention!r}, which is "
            f"where {family.name} has its self-attention"
        )
    order = sorted(names, key=lambda n: family.stages.index(n.split(".")[0])) if family.stages else list(names)
    blocks = list(dict.fromkeys(n.rpartition(".")[0] for n in order))
    return {n: (names[n], blocks.index(n.rpartition(".")[0])) for n in order}


def _plan(
    name: str,
    module: torch.nn.Module,
    pattern: Pattern | tuple[Pattern, ...],
    schedule: Schedule,
    grid: tuple[int, ...] | None,
) -> Plan:
    family = family_of(module, grid)
    if grid is not None and len(grid) != len(family.axes):
        raise ValueError(
            f"grid={grid} has {len(grid)} sizes, but the grid of {family.name} is ({', '.join(family.axes)})"
        )
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    if any(isinstance(each, Radial) for each in patterns) and "t" not in family.axes:
        raise ValueError(
            f"Radial follows the distance between frames, and {family.name} makes images; use Neighborhood, Window or "
            "SlidingTile"
        )
    attention = self_attention(module, family)
    layers = 1 + max(layer for _, layer in attention.values())
    if isinstance(pattern, tuple) and len(pattern) != layers:
        raise ValueError(f"{len(pattern)} patterns for {layers} layers of {family.name}; give one per layer")
    return Plan(name, module, family, attention, schedule.layers(layers))


def _check_temperature(temperature: Any, train_tokens: Any) -> None:
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature not in ("none", "proportional") and not (number and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be 'none', 'proportional' or a number above 0; got {temperature!r}")
    if (temperature == "proportional") != (train_tokens is not None):
        raise ValueError(
            "temperature='proportional' and train_tokens go together: the tokens of the sequence the model was "
            f"trained on, text included (FLUX at 1024x1024: 4096 + 512 = 4608); got temperature={temperature!r}, "
            f"train_tokens={train_tokens!r}"
        )
    if train_tokens is not None and (type(train_tokens) is not int or train_tokens < 2):
        raise ValueError(f"train_tokens must be an int of at least 2; got {train_tokens!r}")


def _check_grid(grid: Any) -> tuple[int, ...] | None:
    if grid is None:
        return None
    sizes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(f"grid must be one to three sizes in tokens, such as (t, h, w); got {grid!r}")
    return sizes
