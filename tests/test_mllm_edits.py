"""PAINT, ACT and ZeroTuning against full maps, edited by the formula of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import IMAGE, ROWS, VLM, VLMS, generate, prompt_of, single  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.mllm.attachment import _ATTACHED  # noqa: E402
from vision_attn.mllm.interface import listen, switch  # noqa: E402
from vision_attn.mllm.methods import act  # noqa: E402
from vision_attn.mllm.methods.act import ACT, fit_act  # noqa: E402
from vision_attn.mllm.methods.paint import PAINT  # noqa: E402
from vision_attn.mllm.methods.zerotuning import ZeroTuning, answer_entropy, search_gamma  # noqa: E402

CLOSE = dict(atol=2e-4, rtol=2e-4)
EVERY = pytest.mark.parametrize("vlm", VLMS.values(), ids=lambda vlm: vlm.name)


pytestmark = pytest.mark.usefixtures("inference")


def with_maps(
    model: Any, inputs: dict, edit: Callable[..., torch.Tensor], run: Any = None, tokens: int = 4, **options: Any
) -> torch.Tensor:
    """Logits of a generation in which `edit(layer, weights, scores, first, seen)` changes full maps.

    `weights` and `scores` are `[batch, heads, queries, keys]`, masked; `first` the key of the first real token of each
    row, negative where a sliding window has left it; `seen` counts queries up to this call. `run` drops tokens.
    """
    beams = options.get("num_beams", 1)
    padding = (inputs["attention_mask"] == 0).sum(1).repeat_interleave(beams)
    counts: dict[int, int] = {}

    def around(layer: int, module, q, k, v, mask, scale, compute):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
        queries, keys = q.shape[2], k.shape[2]
        counts[layer] = counts.get(layer, 0) + queries
        scores = q.double() @ k.mT * scale
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(0 if queries > 1 else keys)
        mask = mask if mask.dtype == torch.bool else mask > -1e30
        scores = scores.masked_fill(~mask[..., :keys], -torch.inf)
        pads = padding if run is None else (~run.engine.current.tokens[layer].valid).sum(1)
        first = pads - max(counts[layer] - keys, 0)
        weights = edit(layer, scores.softmax(-1).nan_to_num(), scores, first, counts[layer])
        return (weights @ v).transpose(1, 2).to(q.dtype)

    undo = [switch(model.config.get_text_config())]
    for layer, module in enumerate(model.get_decoder().layers):
        at = layer
        undo.append(listen(module.self_attn, lambda *a, at=at: around(at, *a)))
    try:
        return generate(model, inputs, tokens, **options)[1]
    finally:
        for each in undo:
            each()


def scaled_first(gamma: float, layers: tuple[int, ...], heads: list[int]) -> Callable[..., torch.Tensor]:
    def edit(layer, weights, scores, first, seen):
        if layer not in layers:
            return weights
        weights = weights.clone()
        for row, key in enumerate(first.tolist()):
            if key >= 0:
                weights[row, heads, :, key] *= gamma
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    return edit


@EVERY
def test_zerotuning_scales_the_first_column(vlm: VLM):
    model, inputs = vlm.build(), prompt_of(vlm)
    with mllm.attach(model, ZeroTuning(gamma=3.0, layers=(0, 1, 3), heads=(0, 4))):
        _, found = generate(model, inputs, tokens=4)
    wanted = with_maps(model, inputs, scaled_first(3.0, (0, 1, 3), [0, 4]))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.allclose(found, generate(model, inputs, tokens=4)[1], atol=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_beams_and_a_static_cache(name: str, options: dict):
    vlm = VLMS[name]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    for method, edit in (
        (ZeroTuning(gamma=3.0), scaled_first(3.0, (0, 1, 2, 3), list(range(6)))),
        (ACT(HEADS, beta=0.3, threshold=0.06), calibrated(HEADS, 0.3, 0.06)),
    ):
        with mllm.attach(model, method):
            _, found = generate(model, inputs, tokens=3, **options)
        torch.testing.assert_close(found, with_maps(model, inputs, edit, tokens=3, **options), **CLOSE)


@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL", "Gemma3"])
def test_where_tokens_are_dropped(name: str):
    vlm = VLMS[name]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    prune = (mllm.UniformPrune(keep=0.5), mllm.FastV(keep=0.5, layer=2))
    for method, edit in (
        (ZeroTuning(gamma=3.0), scaled_first(3.0, (0, 1, 2, 3), list(range(6)))),
        (ACT(HEADS, beta=0.3, threshold=0.06), calibrated(HEADS, 0.3, 0.06)),
    ):
        with mllm.attach(model, *prune, method):
            _, found = generate(model, inputs, tokens=3)
        with mllm.attach(model, *prune) as run:
            _, plain = generate(model, inputs, tokens=3)
            wanted = with_maps(model, inputs, edit, run, tokens=3)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert not torch.allclose(found, plain, atol=1e-3)


def calibrated(heads: tuple[tuple[int, int], ...], beta: float, threshold: float) -> Callable[..., torch.Tensor]:
    """ACT on full maps, one sample and head at a time. Sinks are found in the first call of each layer."""
    found: dict[tuple[int, int, int], list[int]] = {}

    def edit(layer, weights, scores, first, seen):
        weights = weights.clone()
        for row, pad in enumerate(first.tolist()):
            for head in [h for at, h in heads if at == layer]:
                w = weights[row, head]
                if (layer, row, head) not in found:
                    real = scores[row, head].isfinite()
                    real[:pad] = False
                    got = (w * real).sum(0) / real.sum(0)
                    found[layer, row, head] = [j for j in range(w.shape[1]) if got[j] > threshold][1:]
                    gone = 0
                else:
                    gone = max(seen - w.shape[1], 0)
                sinks = [j - gone for j in found[layer, row, head] if j >= gone]
                taken = w[:, sinks].sum(1)
                rest = [j for j in range(w.shape[1]) if j not in sinks]
                others = w[:, rest].sum(1)
                rows = (others > 1e-9).nonzero()[:, 0]
                if sinks:
                    w[rows[:, None], rest] *= (1 + (1 - beta) * taken / others)[rows, None]
                    w[rows[:, None], sinks] *= beta
        return weights

    return edit


HEADS = ((0, 1), (1, 0), (1, 5), (2, 3))


@EVERY
def test_act_calibrates_full_maps(vlm: VLM, monkeypatch):
    monkeypatch.setattr(act, "ROWS", 7)
    model, inputs = vlm.build(), prompt_of(vlm)
    with mllm.attach(model, ACT(HEADS, beta=0.3, threshold=0.06)):
        _, found = generate(model, inputs, tokens=4)
    wanted = with_maps(model, inputs, calibrated(HEADS, 0.3, 0.06))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.allclose(found, generate(model, inputs, tokens=4)[1], atol=1e-3)


def test_heads_that_do_not_hurt_are_kept():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    stock = model(**inputs).logits[0, -1]

    def measure() -> float:
        return float(model(**inputs).logits[0, -1, 7])

    gains = {}
    for layer, head in [(2, head) for head in range(6)]:
        with mllm.attach(model, ACT(((layer, head),), threshold=0.03)):
            gains[layer, head] = measure() - float(stock[7])
    found = fit_act(model, measure, threshold=0.03)
    assert found == ACT(tuple(pair for pair, gain in gains.items() if gain >= 0), threshold=0.03)
    assert 0 < len(found.heads) < 6 and torch.equal(model(**inputs).logits[0, -1], stock)
    with pytest.raises(ValueError, match="ACT hurts in every head"):
        counted = iter(range(100, 0, -1))
        fit_act(model, lambda: next(counted), layers=(1,))


def test_what_others_edit_is_scaled_too():
    """ZeroTuning works on the rows that PAI edited, in either order; ACT computes its heads anew, and says so."""
    model, inputs = VLMS["Gemma3"].build(), VLMS["Gemma3"].inputs(ROWS)
    image, scale = inputs["input_ids"] == IMAGE, scaled_first(3.0, (0, 1, 2, 3), list(range(6)))

    def edit(layer, weights, scores, first, seen):
        if layer >= 2:
            gone = seen - scores.shape[-1]
            own = torch.nn.functional.pad(image, (0, seen - image.shape[1]))[:, None, None, gone:]
            last = scores[:, :, -1:]
            last = torch.where(own & last.isfinite(), last + 0.8 * last.abs(), last)
            weights = torch.cat([weights[:, :, :-1], last.softmax(-1)], 2)
        return scale(layer, weights, scores, first, seen)

    wanted = with_maps(model, inputs, edit)
    methods = ZeroTuning(gamma=3.0), mllm.PAI(alpha=0.8, gamma=1)
    for order in (methods, methods[::-1]):
        with mllm.attach(model, *order):
            torch.testing.assert_close(generate(model, inputs, tokens=4)[1], wanted, **CLOSE)
    with pytest.raises(ValueError, match="ACT computes rows of attention anew, and pai would edit"):
        mllm.attach(model, mllm.PAI(gamma=1), ACT(HEADS))
    edit = calibrated(HEADS, 0.3, 0.06)

    def both(layer, weights, scores, first, seen):
        return scale(layer, edit(layer, weights, scores, first, seen), scores, first, seen)

    wanted = with_maps(model, inputs, both)
    methods = ZeroTuning(gamma=3.0), ACT(HEADS, beta=0.3, threshold=0.06)
    for order in (methods, methods[::-1]):
        with mllm.attach(model, *order):
            torch.testing.assert_close(generate(model, inputs, tokens=4)[1], wanted, **CLOSE)


def test_gamma_is_searched():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    stock = model(**inputs).logits

    def measure() -> float:
        return -answer_entropy(model, inputs)

    p = stock[0, -1].double().softmax(-1)
    assert abs(measure() - float((p * p.log()).sum())) < 1e-4
    tried = {}
    for gamma in (0.5, 1.0, 4.0):
        with mllm.attach(model, ZeroTuning(gamma, layers=(1, 2))):
            tried[gamma] = measure()
    found = search_gamma(model, measure, tuple(tried), layers=(1, 2))
    assert found == ZeroTuning(max(tried, key=tried.get), layers=(1, 2)) and len(set(tried.values())) == 3
    for sign in (1, -1):  # heads 2 to 4 are the larger group, whether they help or hurt

        def effect(sign=sign) -> float:
            run = _ATTACHED.get(model)
            return sign * sum((1, 1, -1, -1, -1, 0)[head] for head in run.methods[0].heads) if run else 0.0

        assert search_gamma(model, effect, (0.5, 4.0), probe=4.0) == ZeroTuning(0.5, heads=(2, 3, 4))
    assert torch.equal(model(**inputs).logits, stock)
    with pytest.raises(ValueError, match="needs gammas to try"):
        search_gamma(model, measure, ())
    with pytest.raises(ValueError, match="leaves the measure at 1"):
        search_gamma(model, lambda: 1.0, probe=2.0)


def test_numbers_out_of_range():
    model = VLMS["Llava"].build()
    for bad in (0, -1.0, float("inf"), True):
        with pytest.raises(ValueError, match="gamma is a finite number above 0"):
            ZeroTuning(gamma=bad)
    for method, message in (
        (ZeroTuning(2.0, layers=(4,)), "layers 0 to 3"),
        (ZeroTuning(2.0, heads=(6,)), "heads 0 to 5"),
        (ACT(((4, 0),)), "layers 0 to 3"),
        (ACT(((2, 6),)), "heads 0 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            mllm.attach(model, method)
    for options, message in (
        ({"heads": ()}, "see fit_act"),
        ({"heads": ((2, 0),), "beta": 1.5}, "from 0 to 1"),
        ({"heads": ((2, 0),), "threshold": 1}, "above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ACT(**options)


def tower_maps(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What the class token gives to every patch, `[tiles, patches]`, mean over heads: of layer 0, and of that before
    the last."""
    tower = model.base_model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    return [maps[at].double().mean(1)[:, 0, 1:] for at in (0, -2)]


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "InternVL"])
def test_paint_raises_the_scores_of_chosen_patches(name: str):
    vlm = VLMS[name]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    first, late = tower_maps(model, inputs["pixel_values"].flatten(0, -4))
    if name == "LlavaNext":
        newline, sizes = torch.tensor([torch.nan]).double(), list(inputs["image_sizes"])
        first, late = (
            [
                part[:, 0]
                for part in model.model.pack_image_features(
                    list(maps.view(3, 3, 36, 1)), sizes, vision_feature_select_strategy="default", image_newline=newline
                )[0]
            ]
            for maps in (first, late)
        )
    elif name == "InternVL":
        first, late = (maps.view(3, 3, 2, 3, 2).mean((2, 4)).flatten(1) for maps in (first, late))
    gains = []
    for one, other in zip(first, late, strict=True):
        real = [j for j in range(len(one)) if not one[j].isnan()]
        order = sorted(other[j].item() for j in real)
        quarter = [np.quantile(order, q) for q in (0.25, 0.75)]
        outliers = {j for j in real if other[j] > quarter[1] + 1.5 * (quarter[1] - quarter[0])}
        top = set(sorted(real, key=lambda j: -one[j])[: int(0.4 * len(real))]) - outliers
        gains.append(torch.tensor([0.3 if j in outliers else 0.9 if j in top else 0.0 for j in range(len(one))]))
        assert top
    assert any((gain == 0.3).any() for gain in gains) or name == "InternVL"
    image = inputs["input_ids"] == IMAGE
    gain = torch.zeros(image.shape).masked_scatter(image, torch.cat(gains))

    def edit(layer, weights, scores, first, seen):
        if layer < 2:
            return weights
        gone = seen - scores.shape[-1]
        last, more = scores[:, :, -1:], torch.nn.functional.pad(gain, (0, seen - gain.shape[1]))[:, None, None, gone:]
        last = torch.where(more > 0, last + more * last.abs(), last)
        return torch.cat([weights[:, :, :-1], last.softmax(-1)], 2)

    with mllm.attach(model, PAINT(alpha=0.9, beta=0.3, ratio=0.4, gamma=1)):
        _, found = generate(model, inputs, tokens=4)
    torch.testing.assert_close(found, with_maps(model, inputs, edit), **CLOSE)
    _, stock = generate(model, inputs, tokens=4)
    assert not torch.allclose(found[:, :2], stock[:, :2], atol=1e-3)
    with mllm.attach(model, PAINT(alpha=0, beta=0, gamma=1)):
        torch.testing.assert_close(generate(model, inputs, tokens=4)[1], stock, **CLOSE)
    for methods in ((), (mllm.UniformPrune(keep=0.5),)):  # the second branch is that of PAI
        with mllm.attach(model, PAINT(alpha=0, beta=0, gamma=1.5), *methods):
            _, found = generate(model, inputs, tokens=4)
        with mllm.attach(model, mllm.PAI(alpha=0, gamma=1.5), *methods):
            torch.testing.assert_close(found, generate(model, inputs, tokens=4)[1], **CLOSE)


def test_paint_follows_what_was_dropped():
    """With all but some tokens gone, it edits those as without."""
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    with mllm.attach(model, PAINT(alpha=0.9, gamma=1)) as run:
        generate(model, inputs, tokens=4)
        (gain,) = [note["gain"] for note in run.engine.current.notes.values() if "gain" in note]
    prune = mllm.UniformPrune(keep=0.5), mllm.FastV(keep=0.5, layer=3)
    with mllm.attach(model, *prune, PAINT(alpha=0.9, gamma=1)):
        _, found = generate(model, inputs, tokens=4)
    with mllm.attach(model, *prune) as run:

        def edit(layer, weights, scores, first, seen):
            if layer < 2:
                return weights
            tokens = run.engine.current.tokens[layer]
            more = gain[:, 0].gather(1, tokens.column) * tokens.valid
            more = torch.nn.functional.pad(more, (0, seen - more.shape[1]))[:, None, None]
            last = scores[:, :, -1:]
            last = torch.where(more > 0, last + more * last.abs(), last)
            return torch.cat([weights[:, :, :-1], last.softmax(-1)], 2)

        wanted = with_maps(model, inputs, edit, run)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_paint_needs_a_class_token():
    for name, message in (("PaliGemma", "none in its vision tower"), ("InstructBlip", "show no patches")):
        with pytest.raises(ValueError, match=message):
            mllm.attach(VLMS[name].build(), PAINT())
    for options in ({"alpha": -1}, {"beta": float("nan")}, {"ratio": 1.5}, {"gamma": 0.5}, {"alpha": True}):
        with pytest.raises(ValueError, match="is a finite number"):
            PAINT(**options)
