"""attach() for vision-language models: methods go in together, and come out without a trace."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vision_attn.hosts import plain
from vision_attn.mllm.contrast import Contrast
from vision_attn.mllm.engine import Engine
from vision_attn.mllm.families import family_of
from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune, Method
from vision_attn.mllm.report import Report

POSITIONS = ("auto", "original", "compact")
_ATTACHED: WeakKeyDictionary[Any, Run] = WeakKeyDictionary()


class Run:
    """Attached methods: a context manager that detaches at the end, also after an exception."""

    def __init__(self, model: Any, methods: tuple[Method, ...], engine: Engine) -> None:
        self.model, self.methods, self.engine = model, methods, engine

    @property
    def report(self) -> Report:
        """Tokens, FLOPs and cache bytes of the prompts read so far; `print(run.report)`."""
        methods = [{"method": type(m).__name__, **_options(m)} for m in self.methods]
        positions = "compact" if self.engine.compact else "original"
        return Report(type(self.model).__name__, methods, positions, list(self.engine.reads))

    def detach(self) -> None:
        """Take everything out again. Safe to call twice."""
        self.engine.uninstall()
        if _ATTACHED.get(self.model) is self:
            del _ATTACHED[self.model]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()


def _options(method: Method) -> dict[str, Any]:
    """The fields of a method that say something in a report."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    plain = (str, int, float, bool, type(None), tuple, list)
    return {name: value if isinstance(value, plain) else type(value).__name__ for name, value in fields.items()}


def attach(
    model: Any,
    *methods: Method,
    positions: str = "auto",
    visual_mask: torch.Tensor | None = None,
    share_selection: bool = True,
) -> Run:
    """Make a transformers vision-language model drop or steer visual tokens, until detached.

    Args:
        model: one of the families of `vision_attn.mllm.families.FAMILIES`, in evaluation mode. What torch.compile made
            of it is dropped here and in `detach()`, as of all models of the process, and compiled again when needed.
        methods: at most one of each kind that drops tokens: before the text model, inside it, from the cache.
        positions: of the tokens that stay. "original" keeps the gaps, "compact" numbers them anew, "auto" is what the
            published code does: compact where tokens are dropped before a text model with plain positions.
        visual_mask: bool `[batch, length]`, for prompts given as `inputs_embeds`.
        share_selection: the second branch of a contrastive method keeps the visual tokens that the main one keeps. With
            False, and wherever a method makes new features of those it drops, methods choose again there.

    Returns:
        A run: context manager, `run.report`, `run.detach()`.

    Raises:
        TypeError: what is given is no method.
        ValueError: the family is unknown, methods of one kind twice, a method that the model cannot serve, or something
            is attached already.
    """
    model = plain(model)
    if visual_mask is not None and (visual_mask.dtype != torch.bool or visual_mask.ndim != 2):
        raise ValueError(
            f"visual_mask must be bool [batch, length]; got {visual_mask.dtype} of shape {tuple(visual_mask.shape)}"
        )
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"attach methods such as FastV(keep=0.5); got {method!r}")
    if not methods:
        raise TypeError("nothing to attach; give at least one method, such as FastV(keep=0.5)")
    for kind, where in ((InputPrune, "before the text model"), (LayerPrune, "inside it"), (CachePrune, "in the cache")):
        same = [type(method).__name__ for method in methods if isinstance(method, kind)]
        if len(same) > 1:
            raise ValueError(f"{' and '.join(same)} both drop tokens {where}; attach one of them")
    contrasts = [type(method).__name__ for method in methods if isinstance(method, Contrast) and method.contrasts]
    if len(contrasts) > 1:
        raise ValueError(f"{' and '.join(contrasts)} both choose the next token; attach one of them")
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(map(repr, POSITIONS))}; got {positions!r}")
    family = family_of(model)
    drops = [type(method).__name__ for method in methods if isinstance(method, (InputPrune, LayerPrune, CachePrune))]
    if drops and not family.prune:
        raise ValueError(
            f"{drops[0]} drops visual tokens, and {family.name} has a few learned ones for the whole image; attach "
            "methods that steer"
        )
    if positions == "compact" and family.mrope:
        raise ValueError(
            f"positions='compact' would destroy the rows and columns that {family.name} numbers its tokens by; use "
            "'original'"
        )
    if model.training:
        raise ValueError("the model is in training mode, and tokens are dropped for inference only; call model.eval()")
    if model in _ATTACHED:
        raise ValueError(
            f"{type(model).__name__} already has {', '.join(m.name for m in _ATTACHED[model].methods)} attached; "
            "detach() that run first, or attach all methods in one call"
        )
    for method in methods:
        method.check(model, family)
    engine = Engine(model, family, list(methods), positions, visual_mask)
    engine.share = share_selection
    run = Run(model, methods, engine)
    try:
        engine.install()
    except BaseException:
        engine.uninstall()
        raise
    _ATTACHED[model] = run
    return run
