"""CLEAR: image tokens attend to a disc around them, to the text and to pooled tokens."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from vision_attn.diffusion.attachment import planned
from vision_attn.diffusion.context import Context
from vision_attn.diffusion.installed import ROTARY
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.methods import stored
from vision_attn.diffusion.report import Report
from vision_attn.diffusion.run import Plan, Run
from vision_attn.kernels.patterns import Circle

_TRAINED = ("to_q", "to_k", "to_v", "to_out.0")  # of the image stream, in every attention module that has them


@dataclasses.dataclass(frozen=True)
class CLEAR(Method):
    """Circular windows on the joint attention of text and image, and tokens pooled from the whole image.

    An image token sees all text, the image tokens nearer than `radius` (clipped at the borders) and the pooled tokens.
    A text token sees all text and image tokens, and no pooled ones. For models that make images (h, w); for video the
    disc goes through all frames.

    Args:
        radius: in tokens, at least 1; CLEAR uses 8, 16 and 32.
        pooled: side of the cells that are pooled, at least 2, which must divide the grid; None for none. CLEAR uses 4
            with radius 8 or 16. Cells are means until `weights` says otherwise.
        weights: file that `run.save` or `python -m vision_attn.diffusion.distill clear` wrote: projections and pooling
            weights. Without them the model was never told of the windows, which costs quality.
        ntk: factor on the base of rotary position embeddings, for images larger than the model was trained on; CLEAR
            uses 10 for FLUX. FLUX only.

    `attach` takes the options of a pattern. CLEAR's proportional attention is `temperature="proportional"` with
    `train_tokens=4608` for FLUX; the sequence then counts its pooled tokens, and ten times when there are any.

    Raises:
        TypeError, ValueError: an option out of range; weights of another model, radius or cell; `ntk` on a model
            without a rotary base to change; cells that do not divide the grid, when the model is called.

    >>> import torch
    >>> from diffusers import PixArtTransformer2DModel
    >>> from vision_attn import attach
    >>> model = PixArtTransformer2DModel(
    ...     num_attention_heads=2, attention_head_dim=4, num_layers=2, cross_attention_dim=8, caption_channels=8,
    ...     num_embeds_ada_norm=8, norm_type="ada_norm_single", use_additional_conditions=False,
    ... )
    >>> call = dict(encoder_hidden_states=torch.randn(1, 5, 8), timestep=torch.tensor([500]))
    >>> with torch.no_grad(), attach(model, CLEAR(radius=3, pooled=4)) as run:
    ...     out = model(torch.randn(1, 4, 16, 16), **call, added_cond_kwargs=dict(resolution=None, aspect_ratio=None))
    >>> round(run.report.denoisers[0].kept, 3)
    0.282

    Paper: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up (arXiv 2412.16112).
    """

    radius: int = 16
    pooled: int | None = None
    weights: str | os.PathLike | None = None
    ntk: float = 1.0
    name: ClassVar[str] = "clear"

    def __post_init__(self) -> None:
        Circle(self.radius, self.pooled)  # its messages say what is wrong
        if self.weights is not None and not isinstance(self.weights, (str, os.PathLike)):
            raise TypeError(f"weights must be the path of a file, or None; got {self.weights!r}")
        if isinstance(self.ntk, bool) or not isinstance(self.ntk, (int, float)) or not 1 <= self.ntk < math.inf:
            raise ValueError(f"ntk must be a number of at least 1; got {self.ntk!r}")

    def attach(
        self,
        target: Any,
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
    ) -> ClearRun:
        schedule = (dense_steps, dense_layers, dense_last_steps, calls)
        pattern = Circle(self.radius, self.pooled)
        pipe, plans, schedule, options = planned(
            target, pattern, schedule, temperature, train_tokens, grid, backend, strict
        )
        return ClearRun(self, pipe, plans, schedule, options, replace)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "weights": None if self.weights is None else os.fspath(self.weights)}


class PooledCircle(Circle):
    """A circle whose cells are summed with weights of their own, one per place in a cell, rather than averaged."""

    def __init__(self, radius: int, pooled: int, weight: torch.Tensor) -> None:
        super().__init__(radius, pooled)
        object.__setattr__(self, "weight", weight)


class ClearContext(Context):
    """Counts pooled tokens where scores are scaled by the number of keys."""

    def scale(self, scale: float | None, head_dim: int, keys: int) -> float | None:
        cell = self.pattern(0).pooled
        if cell is not None:
            grid = self.place(keys)[0]
            keys = 10 * (keys + math.prod(grid) // cell**2)
        return super().scale(scale, head_dim, keys)


class ClearRun(Run):
    """CLEAR in a pipeline or denoiser: a context manager, `report`, `detach()`, and what can be trained.

    `trainable` names the projections of the image stream and the pooling weights, of one denoiser. The projections are
    the model's own unless weights were loaded, so train a copy of the model.
    """

    context_class = ClearContext

    def __init__(self, method: CLEAR, pipe: Any | None, plans: list[Plan], schedule, options, replace: bool) -> None:
        if method.weights is not None and len(plans) > 1:
            raise ValueError("weights belong to one denoiser, and this pipeline has two; attach to each by itself")
        self.method, self.label, self.trainable = method, repr(method), {}
        if method.pooled is not None:
            layers = 1 + max(layer for plan in plans for _, layer in plan.attention.values())
            mean = torch.full((method.pooled, method.pooled), method.pooled**-2.0)
            self.trainable = {f"pool.{layer}": nn.Parameter(mean.clone(), False) for layer in range(layers)}
            circles = (PooledCircle(method.radius, method.pooled, weight) for weight in self.trainable.values())
            options = {**options, "pattern": tuple(circles)}
        if method.ntk != 1:
            self.parts = (*Run.parts, ROTARY)
            for plan in plans:
                _rotary(plan)
        super().__init__(pipe, plans, schedule, options, replace)

    def _install(self, pipe: Any | None, plan: Plan) -> None:
        super()._install(pipe, plan)
        if self.method.ntk != 1:
            rotary = _rotary(plan)
            self.later(lambda theta=rotary.theta: setattr(rotary, "theta", theta))
            rotary.theta = rotary.theta * self.method.ntk
        places = {name: place for name, place in _projections(plan)}
        self.trainable |= {name: module._parameters[key] for name, (module, key) in places.items()}
        if self.method.weights is None:
            return
        stored.refuse_offload(plan.module, "CLEAR(weights=...)")
        shapes = {name: parameter.shape for name, parameter in self.trainable.items()}
        for name, tensor in stored.read(self.method.weights, self.settings(plan), shapes).items():
            if name in places:
                self.trainable[name] = self._replace(*places[name], tensor)
            else:
                self.trainable[name].data = tensor

    def _replace(self, module: nn.Module, key: str, tensor: torch.Tensor) -> nn.Parameter:
        """Put a parameter in the place of another, until detached."""
        before = module._parameters[key]
        after = nn.Parameter(tensor.to(before), False)

        def restore() -> None:
            before.data = before.data.to(after)  # the model may have been moved meanwhile
            module._parameters[key] = before

        self.later(restore)
        module._parameters[key] = after
        return after

    def settings(self, plan: Plan) -> dict[str, Any]:
        return {"method": CLEAR.name, "model": plan.cls, "radius": self.method.radius, "pooled": self.method.pooled}

    def save(self, path: str | os.PathLike) -> None:
        """Write what is trainable to a file for `CLEAR(weights=path)`, and nothing else of the model."""
        if len(self._plans) > 1:
            raise ValueError("weights belong to one denoiser, and this pipeline has two; attach to each by itself")
        stored.write(path, self.trainable, self.settings(self._plans[0]))

    @property
    def report(self) -> Report:
        report = super().report
        report.pattern = Circle(self.method.radius, self.method.pooled).to_dict()
        given = {"weights": self.method.to_dict()["weights"], "ntk": self.method.ntk}
        report.options |= {name: value for name, value in given.items() if value not in (None, 1)}
        return report


def _rotary(plan: Plan) -> nn.Module:
    """The module that makes rotary embeddings from a base, which is FLUX's."""
    rotary = getattr(plan.module, "pos_embed", None)
    if type(rotary).__name__ != "FluxPosEmbed":
        raise ValueError(
            f"ntk changes the base of FLUX's rotary embeddings, and {plan.cls} has none of that kind; leave ntk at 1"
        )
    return rotary


def _projections(plan: Plan) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Where the parameters of the image stream's projections are: name -> module, key."""
    for name, (attention, _) in plan.attention.items():
        for part in _TRAINED:
            module = attention
            for step in part.split("."):
                module = getattr(module, step, None) if not isinstance(module, nn.ModuleList) else module[int(step)]
            module = getattr(module, "base_layer", module)  # inside a LoRA
            if isinstance(module, nn.Module):
                present = [key for key, parameter in module._parameters.items() if parameter is not None]
                yield from ((f"{name}.{part}.{key}", (module, key)) for key in present)
