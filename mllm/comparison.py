"""What the table of methods compares: methods as they are published, and the cheapest honest alternatives to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune, Method, top
from vision_attn.mllm.registry import make, methods

if TYPE_CHECKING:
    from vision_attn.mllm.exam import Exam, Student

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
        how: what `prepare` or `look` does, for the reader.
        look: from a model, a picture and a question to the picture that is answered from, where that is another.
    """

    name: str
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    kind: str = "steer"
    control: str = ""
    prepare: Callable[[Student], tuple[Method, ...]] | None = None
    how: str = ""
    look: Callable[[Student, np.ndarray, str], np.ndarray] | None = None

    def built(self, student: Student) -> tuple[Method, ...]:
        """The methods to attach."""
        if self.prepare is not None:
            return self.prepare(student)
        return tuple(make(name, **options) for name, options in self.methods.items())

    def key(self) -> str:
        """What its answers depend on, besides the code."""
        return f"{self.name} {self.methods}"  # what `prepare` and `look` do is in the name


BASELINES = [Row(GREEDY, kind="baseline"), Row(THRESHOLD, kind="baseline"), Row(BLIND, kind="baseline")]


@dataclasses.dataclass(frozen=True)
class RandomLayer(LayerPrune):
    """The control of methods that drop tokens at one layer: as many, chosen blindly, for every row of a batch anew."""

    keep: float = KEEP
    layer: int = 2

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        visual = layer.tokens.visual
        return top(_blindly(visual.shape), visual, [round(self.keep * n) for n in visual.sum(1).tolist()])


@dataclasses.dataclass(frozen=True)
class RandomCache(CachePrune):
    """The control of methods that shorten the cache of every head: as many tokens, chosen blindly in every layer."""

    keep: float = KEEP

    def select(self, layer: Layer) -> torch.Tensor:
        visual, heads = layer.tokens.visual, layer.cached[0].shape[1]
        counts = [round(self.keep * n) for n in visual.sum(1).tolist()]
        kept = [top(_blindly(visual.shape, layer.number, head), visual, counts) for head in range(heads)]
        return torch.stack(kept, 1)


def _blindly(shape: torch.Size, *seeds: int) -> torch.Tensor:
    seed = sum(1000**power * seed for power, seed in enumerate(seeds))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _streaming(student: Student) -> tuple[Method, ...]:
    from vision_attn.mllm.methods.streamingheads import StreamingHeads

    return (StreamingHeads.identify(student.model, induction=0.3, sink=2, recent=8),)


def _searched(student: Student) -> tuple[Method, ...]:
    from vision_attn.mllm.schedules import search_schedule

    found = search_schedule(student.model, _accuracy(student, 30), tokens=(student.tokens, 12), steps=8)
    return (found.schedule,)


def _routed(student: Student) -> tuple[Method, ...]:
    """Routers fitted to questions and captions of pictures that are in no exam, with the model's own answers."""
    from vision_attn.mllm import tiny
    from vision_attn.mllm.exits import fit_exit

    drawn = _practice(student, 30)
    texts = [(question.image, f"is there a {question.object} in the image ?") for question in drawn.questions[::3]]
    texts += [(image, tiny.DESCRIBE) for image in range(len(drawn.pictures))]
    samples = []
    for image, text in texts:
        inputs = student.inputs([drawn.pictures[image]], [text])
        ids = student.generate(inputs, 48)
        labels = ids.clone()
        labels[:, : inputs["input_ids"].shape[1]] = -100
        samples.append((inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return (fit_exit(student.model, samples, hidden=64, rank=16).method,)


def _practice(student: Student, images: int) -> Exam:
    """Pictures that are in no exam."""
    from vision_attn.mllm.exam import exam

    return exam(images, seed=3000, cell=student.cell)


def _accuracy(student: Student, images: int) -> Callable[..., float]:
    """Of the answers to all questions on so many of them, with what is attached when it is called."""
    drawn = _practice(student, images)

    def measure(*_: Any) -> float:
        said = student.answer(drawn)[0]
        return sum(yes == q.label for yes, q in zip(said, drawn.questions, strict=True)) / len(said)

    return measure


def _calibrated(student: Student) -> tuple[Method, ...]:
    from vision_attn.mllm.methods.act import fit_act

    return (fit_act(student.model, _accuracy(student, 20)),)


def _blinded(student: Student) -> tuple[Method, ...]:
    from vision_attn.mllm import tiny
    from vision_attn.mllm.methods.visualheadmask import VisualHeadMask

    drawn = _practice(student, 40)
    inputs = student.inputs(drawn.pictures, [tiny.DESCRIBE] * len(drawn.pictures))
    return (VisualHeadMask.calibrate(student.model, [inputs]),)


def _disturbed(student: Student) -> tuple[Method, ...]:
    from vision_attn.mllm.methods.icd import ICD

    return (ICD(tuple(student.words(ICD.INSTRUCTION.lower(), add_special_tokens=False).input_ids)),)


def _carved(student: Student, picture: np.ndarray, question: str) -> np.ndarray:
    """CARVE's refined picture alone: models of one picture cannot be shown both. Its own answer from it is not used."""
    from PIL import Image

    from vision_attn.mllm import tiny
    from vision_attn.mllm.carve import CARVE

    def pixels(shown: Any) -> np.ndarray:
        return np.asarray(shown.resize(picture.shape[1::-1], Image.Resampling.BICUBIC))

    def read(pictures: list[Any], text: str) -> dict[str, Any]:
        return student.inputs(list(map(pixels, pictures)), [text])

    method = CARVE(steps=4, pair=False, general=tiny.DESCRIBE, suffix="")
    return pixels(method(student.model, read, Image.fromarray(picture), question).refined)


def _at_layer(label: str, method: str) -> Row:
    return Row(label, {method: {"keep": KEEP}}, "prune", BLIND_LAYER)


def _staged(label: str, method: str) -> Row:
    return Row(label, {method: {"keep": (0.5, 0.25, 0.125), "layers": (1, 2, 3)}}, "prune")


BLIND_LAYER, BLIND_CACHE = "random at layer 2", "random in the cache"
# Rows of a method, where it has not one row with its own defaults and `keep` of all.
OWN: dict[str, list[Row]] = {
    "cdpruner": [Row("CDPruner, without text", {"cdpruner": {"keep": KEEP}}, "prune", RANDOM)],
    "fastv": [_at_layer("FastV", "fastv")],
    "dart": [_at_layer("DART", "dart")],
    "pyramid-drop": [_staged("PyramidDrop", "pyramid-drop")],
    "sparsevlm": [_staged("SparseVLM", "sparsevlm")],
    "schedule": [
        Row("TokenSchedule, halved by every layer", {"schedule": {"keep": (1.0, 0.5, 0.25, 0.125)}}, "prune"),
        Row(
            "TokenSchedule, G-Search",
            {"schedule": {}},
            "prune",
            prepare=_searched,
            how="by `search_schedule`, on the answers about 30 other pictures",
        ),
    ],
    "visual-exit": [
        Row("VisualExit, fixed", {"visual-exit": {}}, "prune"),
        Row("VisualExit, attention", {"visual-exit": {"rule": "attention"}}, "prune"),
        Row(
            "VisualExit, routers",
            {"visual-exit": {"rule": "router"}},
            "prune",
            prepare=_routed,
            how="by `fit_exit`, on what the model says of 30 other pictures",
        ),
    ],
    "kvprune": [Row("KVPrune", {"kvprune": {"keep": KEEP, "rows": 8}}, "prune", BLIND_CACHE)],
    "streaming-heads": [
        Row(
            "StreamingHeads, identified",
            {"streaming-heads": {}},
            "prune",
            prepare=_streaming,
            how="by `StreamingHeads.identify(induction=0.3, sink=2, recent=8)`",
        )
    ],
    "task-kv": [Row("TaskKV", {"task-kv": {"recent": 8, "middle": 8}}, "prune")],
    "zipvl": [
        Row("ZipVL, drop", {"zipvl": {"recent": 8, "probes": 16}}, "prune"),
        Row("ZipVL, quantize", {"zipvl": {"recent": 8, "probes": 16, "mode": "quantize"}}, "prune"),
    ],
    "icd": [
        Row(
            "ICD, in words it does not know",
            {"icd": {}},
            prepare=_disturbed,
            how="the sentence of the paper, none of whose words the model knows",
        )
    ],
    "neighbor-visual": [Row("NeighborVisualAttention", {"neighbor-visual": {}}, "prune")],
    "visual-heads": [
        Row(
            "VisualHeadMask, calibrated",
            {"visual-heads": {}},
            "prune",
            prepare=_blinded,
            how="by `VisualHeadMask.calibrate`, on 40 other pictures",
        )
    ],
    "damro": [Row("DAMRO, 4 patches", {"damro": {"k": 4}})],
    "pai": [
        Row("PAI", {"pai": {}}),
        Row("PAI, attention alone, alpha 0.5", {"pai": {"alpha": 0.5, "gamma": 1.0}}),
    ],
    "gift": [Row(f"GIFT, alpha {alpha:g}", {"gift": {"alpha": alpha}}) for alpha in (1.0, 5.0)],
    "act": [
        Row("ACT, fitted", {"act": {}}, prepare=_calibrated, how="by `fit_act`, on the answers about 20 other pictures")
    ],
    "zerotuning": [Row(f"ZeroTuning, gamma {gamma}", {"zerotuning": {"gamma": gamma}}) for gamma in (0.5, 2.0)],
}
CONTROLS = [
    Row(BLIND_LAYER, kind="prune", prepare=lambda student: (RandomLayer(),)),
    Row(BLIND_CACHE, kind="prune", prepare=lambda student: (RandomCache(),)),
]
PROCEDURES = [
    Row("CARVE, its picture alone", look=_carved, how="`CARVE(steps=4, pair=False)`")
]  # what works around `generate`, and is not attached
BOTH = [
    Row("HoloV + VHR", {"holov": {"keep": KEEP}, "vhr": {}}, "both", "HoloV"),
    Row("FastV + GIFT, alpha 1", {"fastv": {"keep": KEEP}, "gift": {"alpha": 1.0}}, "both", "FastV"),
]
# Methods of the registry without a row, and why.
LEFT_OUT = {
    "agla": "it needs a matcher of pictures and questions, and there is none for this world",
    "var": "the models have no attention sinks: `find_sinks` finds no dimension, neither above 20 nor above 5",
    "visual-blocks": "it leaves prompts of one picture as they are",
}


@functools.cache
def rows() -> list[Row]:
    """All rows: baselines, every method of the registry, and methods together."""
    found = []
    for name, cls in methods().items():
        prunes, input_prunes = issubclass(cls, (InputPrune, LayerPrune, CachePrune)), issubclass(cls, InputPrune)
        options = {"keep": KEEP} if input_prunes else {}
        control = RANDOM if input_prunes and cls.__name__ != RANDOM else ""
        own = Row(cls.__name__, {name: options}, "prune" if prunes else "steer", control)
        found += OWN.get(name, [] if name in LEFT_OUT else [own])
    first = (RANDOM, "UniformPrune", BLIND_LAYER, BLIND_CACHE)
    found = sorted([*CONTROLS, *found], key=lambda row: (row.kind != "prune", row.name not in first))
    return [*BASELINES, *found, *BOTH, *PROCEDURES]


def taken() -> list[Row]:
    """The rows that a model is asked for; the others follow from the answers of greedy decoding, or from nothing."""
    return [row for row in rows() if row.name not in (THRESHOLD, BLIND)]
