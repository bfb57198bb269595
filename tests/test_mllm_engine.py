"""Dropping visual tokens from stock models: the same numbers however the model is called, and no trace afterwards."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import IMAGE, PRUNED, ROWS, VLM, VLMS, generate, single  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402
from vision_attn.mllm.attachment import attach  # noqa: E402
from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune, top  # noqa: E402

EVERY = pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
CLOSE = dict(atol=1e-4, rtol=1e-4)


pytestmark = pytest.mark.usefixtures("inference")


@dataclasses.dataclass(frozen=True)
class Third(InputPrune):
    """Keep the tokens that come first when places are counted by threes: nothing near a uniform choice."""

    def select(self, image, keep: int) -> torch.Tensor:
        place = torch.arange(len(image.features))
        return (place % 3 * len(place) + place).argsort()[:keep].sort().values


@dataclasses.dataclass(frozen=True)
class Late(LayerPrune):
    """Keep the first visual tokens of a row: half of them at a layer, half of the rest at the next one."""

    at: int = 2

    def cuts(self, layers: int) -> tuple[int, ...]:
        return tuple(range(self.at, layers))

    def select(self, layer, notes) -> torch.Tensor:
        visual = layer.tokens.visual
        counts = [-(-n // 2) for n in visual.sum(1).tolist()]
        return top(-layer.tokens.column, visual, counts)


@dataclasses.dataclass(frozen=True)
class Cached(CachePrune):
    """Keep other visual tokens for each KV head."""

    def select(self, layer) -> torch.Tensor:
        visual, heads = layer.tokens.visual, layer.cached[0].shape[1]
        counts, place = [n // 2 for n in visual.sum(1).tolist()], visual.cumsum(1)
        return torch.stack([top(place * (head + 3) % 7, visual, counts) for head in range(heads)], 1)


def late(vlm: VLM) -> Late:
    return Late(at=2 if vlm.name == "Qwen3VL" else 1)


def kinds(vlm: VLM) -> dict[str, list[Any]]:
    return {"input": [Third(keep=0.5)], "layer": [late(vlm)], "both": [Third(keep=0.6), late(vlm)], "cache": [Cached()]}


KINDS = pytest.mark.parametrize("kind", ["input", "layer", "both", "cache"])


@EVERY
def test_keeping_everything_is_the_stock_model(vlm: VLM):
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    _, stock = generate(model, inputs)
    with attach(model, Third(keep=1.0)):
        _, kept = generate(model, inputs)
    torch.testing.assert_close(kept, stock, **CLOSE)


@EVERY
@KINDS
def test_rows_of_a_ragged_batch_are_single_runs(vlm: VLM, kind: str):
    """One image, two images, and text alone in one left-padded batch."""
    model, methods = vlm.build(), kinds(vlm)[kind]
    _, stock = generate(model, vlm.inputs(ROWS))
    with attach(model, *methods):
        _, batch = generate(model, vlm.inputs(ROWS))
        for i in range(len(ROWS)):
            _, alone = generate(model, single(vlm, ROWS, i))
            torch.testing.assert_close(batch[:, i : i + 1], alone, **CLOSE)
    torch.testing.assert_close(batch[:, 2], stock[:, 2], **CLOSE)  # no image, no change
    first = 1 if kind == "cache" else 0
    assert (batch[first:, :2] - stock[first:, :2]).abs().max() > 0.01
    if kind == "cache":
        assert torch.equal(batch[0], stock[0])


@EVERY
def test_cached_generation_is_recomputation(vlm: VLM):
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    with attach(model, *kinds(vlm)["both"]):
        tokens, cached = generate(model, inputs, tokens=8)
        _, again = generate(model, inputs, tokens=8, use_cache=False)
        torch.testing.assert_close(cached, again, **CLOSE)
        _, static = generate(model, inputs, tokens=8, cache_implementation="static")
        torch.testing.assert_close(static, cached, **CLOSE)
        looked_up, _ = generate(model, single(vlm, ROWS, 0), tokens=8, prompt_lookup_num_tokens=3)
        alone, _ = generate(model, single(vlm, ROWS, 0), tokens=8)
    assert torch.equal(looked_up, alone)


@EVERY
@pytest.mark.parametrize("kind", ["both", "cache"])
def test_beams_of_a_batch_are_beams_of_single_rows(vlm: VLM, kind: str):
    model, options = vlm.build(), dict(num_beams=3, length_penalty=0.0)
    with attach(model, *kinds(vlm)[kind]):
        batch = model.generate(**vlm.inputs(ROWS), max_new_tokens=5, do_sample=False, **options)
        for i in range(len(ROWS)):
            alone = model.generate(**single(vlm, ROWS, i), max_new_tokens=5, do_sample=False, **options)
            assert batch[i, -5:].tolist() == alone[0, -5:].tolist()


@EVERY
def test_dropping_is_masking(vlm: VLM):
    """With their old positions, the tokens that stay see what they see in a dense run that hides the others as keys."""
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    with attach(model, Third(keep=0.5), positions="original") as run:
        out = model(**inputs, output_hidden_states=True)
        column = run.engine.current.read.column[0]
    pruned = out.hidden_states[-1][0]
    hidden = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    hidden[column] = False
    assert hidden.sum() > 3 and (inputs["input_ids"][0][hidden] == IMAGE).all()

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        length = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        kwargs["attention_mask"] = mask.masked_fill(hidden, low)
        window = getattr(module, "sliding_window", None)
        if window is not None:  # distance counts the tokens that stay
            rank = (~hidden).long().cumsum(0)
            full = torch.ones(length, length, dtype=torch.bool).tril()
            near = full & (rank[:, None] - rank < window) & ~hidden
            picture = inputs["input_ids"][0] == IMAGE
            near |= picture[:, None] & picture & (rank[:, None] - rank < window) & ~hidden
            kwargs["attention_mask"] = (
                near[None, None] if low is False else torch.zeros_like(mask).masked_fill(~near, low)
            )
        return args, kwargs

    handles = [
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.get_decoder().layers
    ]
    dense = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(pruned, dense[column], **CLOSE)


@EVERY
def test_compact_positions_are_those_of_a_short_prompt(vlm: VLM):
    if vlm.mrope:
        with pytest.raises(ValueError, match="positions='compact' would destroy"):
            attach(vlm.build(), Third(), positions="compact")
        return
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    numbers = []
    text = model.get_decoder()
    with attach(model, Third(keep=0.5), positions="compact"):
        handle = text.register_forward_pre_hook(
            lambda module, args, kwargs: numbers.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
        )
        generate(model, inputs, tokens=3)
        handle.remove()
    first = 1 if vlm.name == "PaliGemma" else 0
    n = len(numbers[0])
    assert n < inputs["input_ids"].shape[1]
    assert numbers == [list(range(first, n + first)), [n + first], [n + first + 1]]


@EVERY
@pytest.mark.parametrize("kind", ["both", "cache"])
def test_detach_leaves_no_trace(vlm: VLM, kind: str):
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    _, stock = generate(model, inputs)  # the first call installs hooks of transformers' own

    def trace():
        found = {n: (set(vars(m)), set(m._forward_hooks), set(m._forward_pre_hooks)) for n, m in model.named_modules()}
        configs = [model.config._attn_implementation, model.config.get_text_config()._attn_implementation]
        return found, configs, list(model.state_dict())

    before = trace()
    for fails in (False, True):
        run = attach(model, *kinds(vlm)[kind])
        with pytest.raises(RuntimeError, match="boom") if fails else run, run:
            generate(model, inputs)
            if fails:
                raise RuntimeError("boom")
        run.detach()
        assert trace() == before
        assert torch.equal(generate(model, inputs)[1], stock)
    watch = weakref.ref(run)
    del run
    gc.collect()
    assert watch() is None


@EVERY
@pytest.mark.parametrize("kind", ["layer", "cache"])
def test_lengths_of_the_cache(vlm: VLM, kind: str):
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    with attach(model, *kinds(vlm)[kind]) as run:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        lengths = [tokens.valid.shape[1] for tokens in run.engine.current.cached]
    length = inputs["input_ids"].shape[1]
    cached = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    sliding = [getattr(layer, "is_sliding", False) for layer in out.past_key_values.layers]
    assert [c for c, s in zip(cached, sliding, strict=True) if not s] == [
        n + 2 for n, s in zip(lengths, sliding, strict=True) if not s
    ]
    if kind == "layer":
        first = late(vlm).at
        assert lengths[:first] == [length] * first and lengths[first] < length and lengths[-1] < lengths[first]


@EVERY
def test_a_second_turn(vlm: VLM):
    """A kept cache equals reading everything again; renumbered positions cannot be continued.

    PaliGemma's earlier words see the later ones when all is read again, so it is compared with the stock model.
    """
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    more = torch.tensor([[11, 12, 13, 14]])

    def second(cache=None, **given):
        ids = torch.cat([inputs["input_ids"], answer, more], 1)
        extra = torch.zeros(1, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                given[name] = torch.cat([inputs[name], extra], 1)
        return generate(model, given, tokens=4, past_key_values=cache)

    first = functools.partial(model.generate, **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    out = first()
    answer = out.sequences[:, -3:]
    _, stock = second(out.past_key_values)
    with attach(model, Third(keep=1.0), positions="original"):
        _, kept = second(first().past_key_values)
    torch.testing.assert_close(kept, stock, **CLOSE)
    with attach(model, Third(keep=0.5), positions="original"):
        out = first()
        answer = out.sequences[:, -3:]
        pictures = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image"))}
        _, again = second(**pictures)
        _, kept = second(out.past_key_values)
    if vlm.name != "PaliGemma":
        torch.testing.assert_close(kept, again, **CLOSE)
    if not vlm.mrope:
        with attach(model, Third(keep=0.5), positions="compact"):
            out = first()
            with pytest.raises(ValueError, match="cannot be continued with renumbered positions"):
                second(out.past_key_values)


@EVERY
def test_a_call_without_cache_and_mask(vlm: VLM):
    """Gaps in the positions are not taken for packed sequences."""
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    with attach(model, Third(keep=0.5), positions="original"):
        masked = model(**inputs, use_cache=False).logits
        inputs.pop("attention_mask")
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, masked, **CLOSE)


def test_what_cannot_be_done_is_said():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    _, stock = generate(model, inputs)
    for bad in (0, 0.0, 1.5, -1, True, "half", float("nan")):
        with pytest.raises(ValueError, match="keep is a share of the visual tokens"):
            Third(keep=bad)
    with pytest.raises(TypeError, match="attach methods such as"):
        attach(model, "fastv")
    with pytest.raises(TypeError, match="nothing to attach"):
        attach(model)
    with pytest.raises(ValueError, match="Third and Third both drop tokens before the text model"):
        attach(model, Third(), Third())
    with pytest.raises(ValueError, match="allowed are 1 to 3"):
        attach(model, Late(at=9))
    with pytest.raises(ValueError, match="positions must be one of"):
        attach(model, Third(), positions="new")
    with pytest.raises(ValueError, match="cannot attach to Linear"):
        attach(torch.nn.Linear(2, 2), Third())
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        attach(model, Third())
    model.eval()
    with attach(model, Third(keep=37)), pytest.raises(ValueError, match="the image has 36 tokens"):
        generate(model, inputs)
    with attach(model, Third()):
        with pytest.raises(ValueError, match="already has .* attached"):
            attach(model, Third())
        with pytest.raises(ValueError, match="labels cannot be used"):
            model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(ValueError, match="give the whole prompt at once"):
            generate(model, inputs, prefill_chunk_size=16)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="pass visual_mask="):
            model(inputs_embeds=embeds)
    with attach(model, Cached()), pytest.raises(ValueError, match="cannot shorten a StaticLayer"):
        generate(model, inputs, cache_implementation="static")
    assert torch.equal(generate(model, inputs)[1], stock)


def test_a_prompt_after_one_that_failed_half_way():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    with attach(model, late(vlm)):
        _, wanted = generate(model, inputs)

        def fail(*_):
            raise RuntimeError("boom")

        handle = model.get_decoder().layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            generate(model, vlm.inputs(ROWS, seed=1))
        handle.remove()
        assert torch.equal(generate(model, inputs)[1], wanted)


def test_a_prompt_given_as_embeddings():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    embeds[ids == IMAGE] = torch.cat(list(features))
    with attach(model, Third(keep=0.5)):
        wanted = model(**inputs).logits
    with attach(model, Third(keep=0.5), visual_mask=ids == IMAGE):
        found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(found, wanted, **CLOSE)
    given, beams = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, dict(num_beams=2)
    with attach(model, Third(keep=0.5)):
        wanted = generate(model, inputs, **beams)[1]
    with attach(model, Third(keep=0.5), visual_mask=ids == IMAGE):
        torch.testing.assert_close(generate(model, given, **beams)[1], wanted, **CLOSE)
        with pytest.raises(AttachError, match=r"visual_mask is for prompts of shape \[1, \d+\], and this one has"):
            model(inputs_embeds=embeds[:, 1:])
    for wrong in ((ids == IMAGE)[0], ids):
        with pytest.raises(ValueError, match=r"visual_mask must be bool \[batch, length\]"):
            attach(model, Third(), visual_mask=wrong)


def test_a_prompt_without_images_is_left_alone():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs([[6], [3]])
    _, stock = generate(model, inputs)
    with attach(model, Third(keep=0.5), late(vlm), Cached()):
        assert torch.equal(generate(model, inputs)[1], stock)


def test_half_precision():
    vlm = VLMS["Qwen2_5_VL"]
    model = vlm.build().to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in vlm.inputs(ROWS).items()}
    with attach(model, Third(keep=0.5), late(vlm)):
        assert generate(model, inputs)[1].isfinite().all()


def test_a_copy_of_an_attached_model_can_be_attached_to():
    model = VLMS["Llava"].build()
    with attach(model, Third()):
        twin = copy.deepcopy(model)
    attach(twin, Third()).detach()


@pytest.mark.parametrize("method", [mllm.UniformPrune(keep=0.5), mllm.FastV(keep=0.5, layer=2), mllm.VHR()], ids=str)
def test_what_was_compiled_before_is_compiled_again(method):
    """Compiled code does not look whether modules got hooks since."""
    vlm = VLMS["Llava"]
    model, one = vlm.build(), single(vlm, ROWS, 0)
    stock = model(**one).logits
    with attach(model, method):
        wanted = model(**one).logits
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(**one).logits, stock, **CLOSE)
        with mllm.attach(compiled, method):
            torch.testing.assert_close(compiled(**one).logits, wanted, **CLOSE)


def test_another_kernel_while_attached_is_refused():
    vlm = VLMS["Llava"]
    model, one = vlm.build(), single(vlm, ROWS, 0)
    with attach(model, mllm.PAI()):
        model.set_attn_implementation("eager")
        with pytest.raises(AttachError, match="attention was set to 'eager' while methods that look into it"):
            model(**one)
    assert model.config.get_text_config()._attn_implementation == "eager", "what was chosen since stays"
    with attach(model, mllm.UniformPrune(keep=0.5)):
        pruned = model(**one).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(**one).logits, pruned, **CLOSE)


def test_padding_on_the_right():
    vlm = VLMS["Llava"]
    model, one = vlm.build(), single(vlm, ROWS, 0)
    more = {name: torch.nn.functional.pad(one[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    with attach(model, mllm.UniformPrune(keep=0.5)):
        short, long = model(**one).logits, model(**{**one, **more}).logits
    torch.testing.assert_close(long[:, : short.shape[1]], short, **CLOSE)
    for method in (mllm.PAI(), mllm.VHR()):
        with attach(model, method), pytest.raises(AttachError, match="pad on the left"):
            model(**{**one, **more})


@EVERY
def test_the_report_says_what_was_read(vlm: VLM):
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    with attach(model, Third(keep=1.0)) as run:
        assert "no prompt" in str(run.report)
        generate(model, inputs, tokens=2)
        (read,) = run.report.prompts
    length = inputs["input_ids"].shape[1]
    assert read.tokens == [length] * 4 and read.kept == read.visual == [
        sum(row) for row in (inputs["input_ids"] == IMAGE)
    ]
    # One more token was generated since, and layers with a window are full.
    assert read.flops == read.stock_flops and read.cache == read.stock_cache
    with attach(model, Third(keep=0.5), late(vlm), Cached()) as run:
        out = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        (read,) = run.report.prompts
        column = run.engine.current.tokens[-1].visual
    assert read.kept == column.sum(1).tolist() and sum(read.kept) < sum(read.visual) // 2
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert read.cache == held < read.stock_cache and 0 < read.flops < read.stock_flops and read.select_seconds > 0
    assert 0 < read.padded < 1
    text = str(run.report)
    assert f"{sum(read.kept)} of {sum(read.visual)}" in text and "GFLOP by formula" in text
    run.report.to_dict()
