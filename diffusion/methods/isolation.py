"""IR-Diffusion: the same subjects in several pictures, by isolation and reposition attention."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any, ClassVar

import torch

from vision_attn.diffusion.attachment import denoisers
from vision_attn.diffusion.families import Family
from vision_attn.diffusion.hooks import RootHook
from vision_attn.diffusion.installed import CROSS_ATTENTION, SELF_ATTENTION, Installed, refuse_or_replace
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.subject_hooks import HOOK, CrossHook, SelfHook, State, subject_layers
from vision_attn.diffusion.subjects import as_masks

SDXL_LAYERS, SDXL_FIRST = 70, 36  # self-attention layers of SDXL's U-Net, and the first that the authors reposition in


@dataclasses.dataclass(frozen=True, eq=False)
class IRDiffusion(Method):
    """Keeps subjects apart inside a picture, and alike between pictures.

    The batch is one reference picture per subject, in the order of the subjects, and then the targets; with guidance in
    one batch, that twice. `consistent_images` makes such batches. Three things change, for the targets only:

    - isolation: a token of one subject does not see the tokens of another;
    - reposition: a token of a subject also sees the tokens of that subject's reference, moved from their bounding box
      to the subject's box in the target, in the later layers;
    - mutual cross-attention: inside a subject the answer to the text is that to the prompt of its reference.

    Tokens that several masks claim stay visible to all of them.

    Args:
        target_masks: where each subject is, `[targets, subjects, height, width]` or `[targets, subjects, frames,
            height, width]`: bool, or numbers of which those above 0.5 count. In pixels, or in tokens, or any size of
            the same shape; frames are counted in tokens. A mask that is empty leaves its subject out of that target.
        reference_masks: where each subject is in its reference, `[subjects, ...]` likewise. None: the batch holds
            targets only, and isolation is all that happens.
        isolation, reposition: switch these parts off.
        cross: share of the reference's prompt in mutual cross-attention, 0 to 1; 0 switches it off.
        first_layer: where reposition begins, counting self-attention from 0. None: 36 in SDXL, as published; the first
            layer of the decoder in other U-Nets; half way in transformers, where nothing is published.
        dropout: chance of a token to be without its reference in a layer, 0 to below 1, for more variety.
        seed: of the dropout.

    Raises:
        TypeError, ValueError: masks of another form, an option out of range, or no part switched on.
        AttachError: a batch or a picture that the masks do not fit.

    >>> masks = torch.zeros(1, 2, 8, 8)
    >>> masks[0, 0, :4], masks[0, 1, 5:] = 1, 1
    >>> IRDiffusion(target_masks=masks, reference_masks=masks[0]).pictures
    3

    Paper: Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention.
    """

    target_masks: torch.Tensor
    reference_masks: torch.Tensor | None = None
    isolation: bool = True
    reposition: bool = True
    cross: float = 0.9
    first_layer: int | None = None
    dropout: float = 0.0
    seed: int = 0
    name: ClassVar[str] = "ir-diffusion"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_masks", as_masks("target_masks", self.target_masks, 2))
        if self.reference_masks is not None:
            object.__setattr__(self, "reference_masks", as_masks("reference_masks", self.reference_masks, 1))
            if len(self.reference_masks) != self.target_masks.shape[1]:
                raise ValueError(
                    f"target_masks have {self.target_masks.shape[1]} subjects and reference_masks "
                    f"{len(self.reference_masks)}; every subject has one reference"
                )
        for name, value, most in (("cross", self.cross, 1.0), ("dropout", self.dropout, math.nextafter(1.0, 0.0))):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise ValueError(f"{name} must be a number from 0 to {'1' if most == 1 else 'below 1'}; got {value!r}")
        first = self.first_layer
        if first is not None and (not isinstance(first, int) or isinstance(first, bool) or first < 0):
            raise ValueError(f"first_layer must be the number of a layer, from 0, or None; got {first!r}")
        if not (self.isolation or (self.references and (self.reposition or self.cross))):
            raise ValueError("isolation is off and nothing else is on; reposition and cross need reference_masks")

    @property
    def references(self) -> int:
        """Reference pictures in a batch."""
        return 0 if self.reference_masks is None else len(self.reference_masks)

    @property
    def pictures(self) -> int:
        """Pictures in a batch, references and targets."""
        return self.references + len(self.target_masks)

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown = {k: list(v.shape) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        return {"method": self.name, **shown}

    def attach(self, target: Any, *, replace: bool = False) -> Attached:
        return Attached(self, target, replace)


class Attached(Installed):
    """IRDiffusion in the denoisers of a pipeline."""

    def __init__(self, method: IRDiffusion, target: Any, replace: bool) -> None:
        super().__init__()
        self.method, self.label = method, type(method).__name__
        pipe, modules = denoisers(target)
        moving, crossing = (bool(method.references and option) for option in (method.reposition, method.cross))
        parts = [SELF_ATTENTION] * (method.isolation or moving) + [CROSS_ATTENTION] * crossing
        found = {name: subject_layers(module) for name, module in modules.items()}
        for module in modules.values():
            refuse_or_replace(module, *parts, label=self.label, replace=replace)
        self.states: dict[str, State] = {}
        with self.installing():
            for name, module in modules.items():
                family, layers, crosses = found[name]
                state = self.states[name] = State(method, pipe, module, family)
                self.claim(module, *parts)
                self.hook(module, RootHook(state.context, list(inspect.signature(module.forward).parameters)), HOOK)
                first = first_layer(method, family, list(layers))
                for number, (layer, _) in enumerate(layers.values() if SELF_ATTENTION in parts else ()):
                    self.hook(layer, SelfHook(state, moving and number >= first), HOOK)
                    self.native_backend(getattr(layer, "processor", None))
                for layer in crosses.values() if crossing else ():
                    self.hook(layer, CrossHook(state), HOOK)

    @property
    def report(self) -> Report:
        """What ran so far."""
        counts = {name: dict(state.counts) for name, state in self.states.items()}
        grids = {name: [list(grid) for grid, _ in state.casts] for name, state in self.states.items()}
        return Report(self.method.to_dict(), counts, grids)


@dataclasses.dataclass
class Report:
    """What an attached IRDiffusion did; `to_dict()` is plain JSON.

    Args:
        calls: per denoiser, layers run with "isolation", "reposition" and "cross".
        grids: token grids met so far.
    """

    method: dict[str, Any]
    calls: dict[str, dict[str, int]]
    grids: dict[str, list[list[int]]]

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.method.items() if k != "method")
        lines = [f"{self.method['method']}({options})"]
        for name, counts in self.calls.items():
            grids = ", ".join("x".join(map(str, grid)) for grid in self.grids[name]) or "not called yet"
            lines.append(f"{name}: grid {grids}; calls with " + ", ".join(f"{k} {n}" for k, n in counts.items()))
        return "\n".join(lines)


def first_layer(method: IRDiffusion, family: Family, names: list[str]) -> int:
    """Where reposition begins.

    Raises:
        ValueError: the model has no such layer.
    """
    if method.first_layer is not None:
        if method.first_layer >= len(names):
            raise ValueError(f"first_layer={method.first_layer}, but {family.name} has {len(names)} layers")
        return method.first_layer
    if not family.stages:
        return len(names) // 2
    if len(names) == SDXL_LAYERS:
        return SDXL_FIRST
    return next(i for i, name in enumerate(names) if name.startswith(family.stages[-1]))
