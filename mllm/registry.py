"""Methods by name, for commands and tables."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from typing import Any

from vision_attn import mllm
from vision_attn.mllm.method import Method


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Name -> class of every public method.

    >>> methods()["fastv"].__name__
    'FastV'
    """
    public = (getattr(mllm, name) for name in mllm.__all__)
    return {cls.name: cls for cls in public if isinstance(cls, type) and issubclass(cls, Method) and cls.name}


def methods_table() -> str:
    """The table of all methods, for the README of this folder."""
    from vision_attn.mllm.around import Around
    from vision_attn.mllm.contrast import Contrast
    from vision_attn.mllm.heads import HeadGain
    from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune
    from vision_attn.mllm.steering import RowEdit

    kinds = {
        InputPrune: "before the text model",
        LayerPrune: "inside the text model",
        CachePrune: "cache",
        RowEdit: "rows of attention",
        HeadGain: "outputs of heads",
        Around: "attention as a whole",
        Contrast: "choice of the next token",
    }
    lines = ["| method | by name | works on | what it does |", "| --- | --- | --- | --- |"]
    found = [([where for kind, where in kinds.items() if issubclass(cls, kind)], cls) for cls in methods().values()]
    for where, cls in sorted(found, key=lambda one: (list(kinds.values()).index(one[0][0]), one[1].name)):
        what = " ".join(inspect.getdoc(cls).split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{cls.__name__}` | `{cls.name}` | {', '.join(where)} | {what} |")
    return "\n".join(lines)


def make(name: str, **options: Any) -> Method:
    """A method by its name; options are its fields.

    Raises:
        ValueError: no such method, or it has no such option.

    >>> make("fastv", keep=0.25)
    FastV(keep=0.25, layer=2)
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}{hint} Known: {', '.join(sorted(known))}")
    fields = [field.name for field in dataclasses.fields(known[name]) if field.init]
    for option in options:
        if option not in fields:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(fields) or 'none'}")
    return known[name](**options)
