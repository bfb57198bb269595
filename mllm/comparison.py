"""What the table of methods compares: methods as they are published, and the cheapest honest alternatives to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune, Method
from vision_attn.mllm.registry import make, methods

if TYPE_CHECKING:
    from vision_attn.mllm.exam import Student

GREEDY, THRESHOLD, BLIND = "greedy", "tuned yes-threshold", "blind rule"
RANDOM = "RandomPrune"
KEEP = 0.25  # share of the visual tokens in every row that drops some, unless its name says otherwise


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to answer.

    Args:
        name: in the table.
        methods: names of `registry.methods` and their options; none is the untouched model.
        kind: "baseline", "prune", "steer" or "both", the parts of the table.
        control: the row that says what the idea adds to what any method of its cost would do.
        prepare: makes the methods for a model, where they have to be fitted or calibrated to it.
    """

    name: str
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    kind: str = "steer"
    control: str = ""
    prepare: Callable[[Student], tuple[Method, ...]] | None = None

    def built(self, student: Student) -> tuple[Method, ...]:
        """The methods to attach."""
        if self.prepare is not None:
            return self.prepare(student)
        return tuple(make(name, **options) for name, options in self.methods.items())

    def key(self) -> str:
        """What its answers depend on, besides the code."""
        return f"{self.name} {self.methods}"  # what `prepare` does is in the name


BASELINES = [Row(GREEDY, kind="baseline"), Row(THRESHOLD, kind="baseline"), Row(BLIND, kind="baseline")]


def _streaming(student: Student) -> tuple[Method, ...]:
    from vision_attn.mllm.methods.streamingheads import StreamingHeads

    return (StreamingHeads.identify(student.model, induction=0.3, sink=2, recent=8),)


# Rows of a method, where it has not one row with its own defaults and `keep` of all.
OWN: dict[str, list[Row]] = {
    "streaming-heads": [Row("StreamingHeads, identified", {"streaming-heads": {}}, "prune", prepare=_streaming)],
    "task-kv": [Row("TaskKV", {"task-kv": {"recent": 8, "middle": 8}}, "prune")],
}
BOTH: list[Row] = []
# Methods of the registry without a row, and why.
LEFT_OUT: dict[str, str] = {}


@functools.cache
def rows() -> list[Row]:
    """All rows: baselines, every method of the registry, and methods together."""
    found = []
    for name, cls in methods().items():
        prunes = issubclass(cls, (InputPrune, LayerPrune, CachePrune))
        keeps = any(field.name == "keep" for field in dataclasses.fields(cls))
        options = {"keep": KEEP} if prunes and keeps else {}
        control = RANDOM if options and cls.__name__ != RANDOM else ""
        own = Row(cls.__name__, {name: options}, "prune" if prunes else "steer", control)
        found += OWN.get(name, [] if name in LEFT_OUT else [own])
    found.sort(key=lambda row: (row.kind != "prune", row.name != RANDOM, row.name != "UniformPrune"))
    return [*BASELINES, *found, *BOTH]


def taken() -> list[Row]:
    """The rows that a model is asked for; the others follow from the answers of greedy decoding, or from nothing."""
    return [row for row in rows() if row.name not in (THRESHOLD, BLIND)]
