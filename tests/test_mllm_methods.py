"""What holds for every method that attach() takes for vision-language models, on every family that it can serve.

It changes what the model says, treats the rows of a padded batch as if each were alone, leaves rows without an image as
they are, and leaves no trace, also after an exception. One line of `METHODS` per method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import PRUNED, ROWS, VLM, VLMS, generate, single  # noqa: E402

from vision_attn import mllm  # noqa: E402

CLOSE = dict(atol=1e-4, rtol=1e-4)
PRUNABLE = tuple(vlm.name for vlm in PRUNED)
CLASS_TOKEN = tuple(vlm.name for vlm in PRUNED if vlm.tower == "cls")
EVERYWHERE = tuple(VLMS)
CAUSAL = tuple(name for name in PRUNABLE if name not in ("Gemma3", "PaliGemma"))
SEVERAL_HEADS = tuple(name for name in PRUNABLE if name != "PaliGemma")
GATES = {
    name: [[(3 * layer + 5 * head) % 7 for head in range(3 if name in SEVERAL_HEADS else 1)] for layer in range(4)]
    for name in VLMS
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to make a method for a family, and what is expected of it.

    Args:
        make: `(vlm) -> methods`, one or a list of several that are attached together.
        families: names in `VLMS` that it serves.
        first: it changes the first token already; methods that shorten the cache afterwards do not.
        alone: rows of a batch equal single runs; not for methods that draw noise by the place in the batch.
        text: it changes rows without an image too.
    """

    make: Callable[[VLM], Any]
    families: tuple[str, ...] = PRUNABLE
    first: bool = True
    alone: bool = True
    text: bool = False


METHODS: dict[str, Entry] = {
    "random": Entry(lambda vlm: mllm.RandomPrune(keep=0.5), alone=False),
    "uniform": Entry(lambda vlm: mllm.UniformPrune(keep=0.5)),
    "fastervlm": Entry(lambda vlm: mllm.FasterVLM(keep=0.5)),
    "holov": Entry(lambda vlm: mllm.HoloV(keep=0.5, segments=3)),
    "visionzip": Entry(lambda vlm: mllm.VisionZip(keep=0.5)),
    "divprune": Entry(lambda vlm: mllm.DivPrune(keep=0.5)),
    "cdpruner": Entry(lambda vlm: mllm.CDPruner(keep=0.5)),
    "vispruner": Entry(lambda vlm: mllm.VisPruner(keep=0.5)),
    "prumerge": Entry(lambda vlm: mllm.PruMerge()),
    "prumerge-plus": Entry(lambda vlm: mllm.PruMergePlus()),
    "vtccls": Entry(lambda vlm: mllm.VTCCLS(keep=0.5, start_layer=0)),
    "fastv": Entry(lambda vlm: mllm.FastV(keep=0.5, layer=2)),
    "pyramid-drop": Entry(lambda vlm: mllm.PyramidDrop(keep=(0.6, 0.3), layers=(2, 3))),
    "sparsevlm": Entry(lambda vlm: mllm.SparseVLM(keep=(0.6, 0.3), layers=(2, 3), heads=2)),
    "dart": Entry(lambda vlm: mllm.DART(keep=0.6, pivots=2)),
    "schedule": Entry(lambda vlm: mllm.TokenSchedule([1, 1, 0.5, 0.25], rows=3)),
    "visual-exit": Entry(lambda vlm: mllm.VisualExit(layer=3)),
    "neighbor-visual": Entry(lambda vlm: mllm.NeighborVisualAttention(window=3)),
    "visual-heads": Entry(lambda vlm: mllm.VisualHeadMask(((), (), (0, 3), (1, 4, 5)))),
    "visual-blocks": Entry(lambda vlm: mllm.VisualBlockPattern(frame_window=0, block=4), CAUSAL),
    "kvprune": Entry(lambda vlm: mllm.KVPrune(keep=0.5, rows=4, pool=3), first=False),
    "streaming-heads": Entry(
        lambda vlm: mllm.StreamingHeads(table=GATES[vlm.name], sink=2, recent=6, compensate=True), first=False
    ),
    "zipvl": Entry(lambda vlm: mllm.ZipVL(tau=0.5, recent=2, probes=4)),
    "task-kv": Entry(lambda vlm: mllm.TaskKV(sink=2, recent=6, middle=2), SEVERAL_HEADS, first=False),
    "zerotuning": Entry(lambda vlm: mllm.ZeroTuning(gamma=3.0), text=True),
    "paint": Entry(lambda vlm: mllm.PAINT(alpha=0.9), families=CLASS_TOKEN),
    "act": Entry(lambda vlm: mllm.ACT(((0, 1), (1, 0), (2, 3)), threshold=0.06), text=True),
    "vcd": Entry(lambda vlm: mllm.VCD(alpha=9.0, beta=0, steps=999), first=False, alone=False),
    "icd": Entry(lambda vlm: mllm.ICD(instruction=(7, 41, 20), alpha=9.0, beta=0), first=False),
    "dola": Entry(lambda vlm: mllm.DoLa(layers=(0, 2, 3), beta=0), first=False, text=True),
    "opera-penalty": Entry(lambda vlm: mllm.OperaPenalty(weight=50.0, candidates=8), first=False),
    "agla": Entry(lambda vlm: mllm.AGLA(matcher=lambda pixels: -pixels, alpha=9.0, beta=0), first=False),
    "damro": Entry(
        lambda vlm: mllm.DAMRO(k=3, alpha=9.0, beta=0, proxy=None if vlm.tower == "cls" else "received"), first=False
    ),
    "m3id": Entry(lambda vlm: mllm.M3ID(decay=2.0, beta=0), first=False),
    "pai": Entry(lambda vlm: mllm.PAI(alpha=0.8)),
    "vhr": Entry(lambda vlm: mllm.VHR()),
    "gift": Entry(lambda vlm: mllm.GIFT(alpha=2.0)),
    "var": Entry(lambda vlm: mllm.VAR(dims=(3, 4, 5, 6), tau=1.5, layers=(2, 3))),
}
CASES = [(name, family) for name, entry in METHODS.items() for family in entry.families]
# Every second pair by default: each method on half of its families, each family with half of the methods.
EVERY = pytest.mark.parametrize(
    "name, family",
    [
        pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] if place % 2 else [])
        for place, case in enumerate(CASES)
    ],
)


pytestmark = pytest.mark.usefixtures("inference")


def made(entry: Entry, vlm: VLM) -> list[Any]:
    methods = entry.make(vlm)
    return methods if isinstance(methods, list) else [methods]


def trace(model: torch.nn.Module) -> Any:
    """Everything that attaching might leave behind."""
    modules = {
        name: (type(m), sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    configs = [model.config._attn_implementation, model.config.get_text_config()._attn_implementation]
    configs += [getattr(model.config.vision_config, "_attn_implementation", None)]
    return modules, configs, [(name, t.data_ptr()) for name, t in model.state_dict().items()]


@EVERY
def test_a_method_on_a_family(name: str, family: str):
    entry, vlm = METHODS[name], VLMS[family]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    _, stock = generate(model, inputs, tokens=3)
    before = trace(model)
    with mllm.attach(model, *made(entry, vlm)) as run:
        _, batch = generate(model, inputs, tokens=3)
        assert batch.isfinite().any() and batch.shape == stock.shape
        if entry.alone:
            for i in range(len(ROWS)):
                _, row = generate(model, single(vlm, ROWS, i), tokens=3)
                torch.testing.assert_close(batch[:, i : i + 1], row, **CLOSE)
        assert str(run.report) and run.report.to_dict()
    assert trace(model) == before
    first = 0 if entry.first else 1
    assert not torch.allclose(batch[first:, :2], stock[first:, :2], atol=1e-4)
    if not entry.first:
        assert torch.equal(batch[0], stock[0])
    if not entry.text:
        torch.testing.assert_close(batch[:, 2], stock[:, 2], **CLOSE)
    with pytest.raises(RuntimeError, match="boom"), mllm.attach(model, *made(entry, vlm)):
        handle = model.get_decoder().layers[-1].mlp.register_forward_pre_hook(boom)
        try:
            generate(model, inputs, tokens=3)
        finally:
            handle.remove()
    assert trace(model) == before
    assert torch.equal(generate(model, inputs, tokens=3)[1], stock)


def boom(*_: Any) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str):
    entry = METHODS[name]
    vlm = VLMS[entry.families[0]]
    model = vlm.build().to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in vlm.inputs(ROWS).items()}
    with mllm.attach(model, *made(entry, vlm)):
        assert not generate(model, inputs, tokens=3)[1].isnan().any()


def test_every_method_is_here():
    from vision_attn.mllm.method import Method

    public = [getattr(mllm, name) for name in mllm.__all__]
    methods = {cls.name for cls in public if isinstance(cls, type) and issubclass(cls, Method) and cls.name}
    assert methods <= set(METHODS), f"no line in METHODS: {sorted(methods - set(METHODS))}"
