"""Where the pictures of the running prompt are, and how large: known only from the arguments of the vision tower."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from vision_attn.hosts import AttachError
from vision_attn.mllm.grids import Grid, grids


class Pictures:
    """Sees the arguments with which a model computes its visual features.

    `generate` computes them before the model is called, and forgets the sizes of the pictures.
    """

    def __init__(self, engine: Any, undo: list[Callable[[], None]]) -> None:
        self.engine, self.given = engine, {}
        self.inside = False  # some models give videos to their own function for images
        base = engine.base
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(base, name):
                plain, before = getattr(base, name), vars(base).get(name)
                # `generate` reads the signature to know which inputs were used, and `wraps` keeps it.
                vars(base)[name] = functools.wraps(plain)(functools.partial(self._features, plain))
                undo.append(functools.partial(_restore, base, name, before))

    def _features(self, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return plain(*args, **kwargs)
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name.startswith("pixel") and value is not None:
                value = torch.empty(value.shape, device="meta")  # all that is needed of them
            self.given[name] = value
        self.inside = True
        try:
            return plain(*args, **kwargs)
        finally:
            self.inside = False

    def views(self, prompt: Any) -> list[Grid]:
        """The views of the pictures of a prompt, over its columns; `grids` says what these are."""
        if "views" not in prompt.notes:
            ids = self.engine.ids
            if ids is None:
                raise AttachError("where the pictures are is known from input_ids only, and the prompt came without")
            prompt.notes["views"] = self._found(ids)
        return prompt.notes["views"]

    def _found(self, ids: torch.Tensor) -> list[Grid]:
        for beams in range(1, len(ids) + 1):  # these repeat rows, and not the pictures
            if len(ids) % beams:
                continue
            try:
                found = grids(self.engine.model, {**self.given, "input_ids": ids[::beams]})
            except ValueError as problem:
                error = problem
                continue
            return [dataclasses.replace(view, row=view.row * beams + i) for view in found for i in range(beams)]
        raise error


def _restore(base: Any, name: str, before: Any) -> None:
    if before is None:
        vars(base).pop(name, None)
    else:
        vars(base)[name] = before
