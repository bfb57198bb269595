"""Steering together: several methods, with tokens dropped at any stage, beams, caches of other kinds, later turns."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from test_mllm_steering import (  # noqa: E402
    CLOSE,
    Maps,
    at_projections,
    by_hand,
    entering,
    gift,
    pai,
    var,
    words_alone,
)  # fmt: skip
from vlm_models import ALONE, IMAGE, PRUNED, ROWS, VLM, VLMS, generate, prompt_of, single  # noqa: E402

from vision_attn import mllm  # noqa: E402

FEW = pytest.mark.parametrize("name", ["Llava", "Gemma3", "PaliGemma", "InstructBlip", "Qwen2_5_VL"])
PRUNE = [mllm.UniformPrune(keep=0.7), mllm.FastV(keep=0.7, layer=2)]
STEER = [mllm.PAI(alpha=0.8, gamma=1), mllm.GIFT(alpha=1.5), mllm.VAR(dims=(3, 9), tau=1.2, rho=0.2, p=0.4, floor=0.05)]


pytestmark = pytest.mark.usefixtures("inference")


def steered(model: Any, inputs: dict[str, Any], prune: list[Any], **options: Any) -> torch.Tensor:
    """All of `STEER` by the formulas; what enters layer 2 is not changed by any of them."""
    ids, repeats = inputs["input_ids"], options.get("num_beams", 1)
    found: dict[str, Any] = {}

    def edit(layer, s, w, image, question, at_keys):
        for each in parts:
            each.reading = edit.reading
            w = each(layer, s, w, image, question, at_keys)
        return w

    with mllm.attach(model, *prune) if prune else contextlib.nullcontext() as run:
        x = entering(model, 2, lambda: generate(model, inputs, tokens=2, **options))
        phi = x[..., [3, 9]].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
        far = phi > 1.2
        if run is not None:
            tokens = run.engine.current.tokens[2]
            column = tokens.column.masked_fill(~tokens.valid, ids.shape[1])
            far = torch.zeros(len(far), ids.shape[1] + 1, dtype=torch.bool).scatter(1, column, far)[:, :-1]
        images = (ids == IMAGE).repeat_interleave(repeats, 0)
        sinks = {2: far & inputs["attention_mask"].bool().repeat_interleave(repeats, 0)}
        parts = [pai(0.8, range(2, 4)), gift(1.5, 1, range(2, 4), found), var(0.4, 0.2, 0.05, sinks, images, [])]
        with Maps(model, ids, edit, repeats, run):
            return generate(model, inputs, tokens=4, **options)[1]


@pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
def test_rows_are_edited_where_tokens_are_dropped(vlm: VLM):
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    wanted = steered(model, inputs, PRUNE)
    with mllm.attach(model, *PRUNE, *STEER):
        _, found = generate(model, inputs, tokens=4)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
def test_heads_are_louder_where_tokens_are_dropped(vlm: VLM):
    model = vlm.build()
    with mllm.attach(model, *PRUNE, mllm.VHR()):
        _, found = generate(model, vlm.inputs(ROWS), tokens=3)
    for row in range(2):
        inputs = single(vlm, ROWS, row)
        with mllm.attach(model, *PRUNE):
            gains = by_hand(model, inputs, [1, 2, 3], 2.0, True)
            with at_projections(model, lambda at, x, gains=gains: x * gains[at][:, None] if at in gains else x):
                _, wanted = generate(model, inputs, tokens=3)
        torch.testing.assert_close(found[:, row : row + 1], wanted, **CLOSE)


@FEW
def test_beams(name: str):
    model, inputs = VLMS[name].build(), prompt_of(VLMS[name])
    wanted = steered(model, inputs, [], num_beams=3)
    with mllm.attach(model, *STEER):
        _, found = generate(model, inputs, tokens=4, num_beams=3)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", VLMS)
def test_a_static_cache_of_a_prompt_without_padding(name: str):
    """Where nothing is hidden, some models get no mask at all."""
    vlm = VLMS[name]
    model, one = vlm.build(), single(vlm, ALONE, 0)
    prune = [] if name == "InstructBlip" else PRUNE
    with mllm.attach(model, *prune, mllm.VHR(), mllm.GIFT(alpha=1.5, saliency=(2,), layers=(1,))):
        _, wanted = generate(model, one)
        _, static = generate(model, one, cache_implementation="static")
    torch.testing.assert_close(static, wanted, **CLOSE)


@FEW
def test_caches_kernels_and_lookup(name: str):
    """A static cache, the eager kernel, and guessing tokens ahead change nothing."""
    vlm = VLMS[name]
    model, inputs = vlm.build(), prompt_of(vlm)
    methods = [*STEER, mllm.VHR()]
    with mllm.attach(model, *methods):
        tokens, wanted = generate(model, inputs)
        _, static = generate(model, inputs, cache_implementation="static")
        torch.testing.assert_close(static, wanted, **CLOSE)
        one = single(vlm, ALONE, 0)
        alone, _ = generate(model, one, tokens=12)
        if name != "InstructBlip":  # its generate() gives embeddings to the text model
            guessed, _ = generate(model, one, tokens=12, prompt_lookup_num_tokens=3)
            assert torch.equal(guessed, alone)
    model.set_attn_implementation({"text_config": "eager"})
    with mllm.attach(model, *methods):
        torch.testing.assert_close(generate(model, inputs)[1], wanted, **CLOSE)


def test_a_later_turn_in_one_call_or_word_by_word():
    vlm = VLMS["Llava"]
    model, inputs, more = vlm.build(), vlm.inputs(ROWS), torch.tensor([[5, 6, 7]] * 3)
    found = []
    with mllm.attach(model, *STEER, mllm.VHR()):
        for parts in ([more], more.split(1, 1)):
            cache, mask = None, inputs["attention_mask"]
            out = model(**inputs, use_cache=True)
            for part in parts:
                cache, mask = out.past_key_values, torch.cat([mask, torch.ones_like(part)], 1)
                out = model(input_ids=part, attention_mask=mask, past_key_values=cache)
            found.append(out.logits[:, -1])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", VLMS)
def test_neutral_values_change_nothing(name: str):
    vlm = VLMS[name]
    model, inputs = vlm.build(), prompt_of(vlm)
    tokens, stock = generate(model, inputs)
    neutral = [mllm.PAI(alpha=0, gamma=1), mllm.GIFT(alpha=0), mllm.VAR(dims=(3,), tau=1.2, p=1), mllm.VHR(alpha=1)]
    with mllm.attach(model, *neutral):
        same, logits = generate(model, inputs)
    torch.testing.assert_close(logits, stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(same, tokens)


def test_pai_against_the_words_alone():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    options = dict(max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
    without = words_alone(model, inputs)().logits[:, -1].log_softmax(-1)
    with mllm.attach(model, mllm.PAI(alpha=0.8, gamma=1)):
        with_image = model(**inputs).logits[:, -1].log_softmax(-1)
    with mllm.attach(model, mllm.PAI(alpha=0.8, gamma=1.5, beta=0.2)):
        (scores,) = model.generate(**inputs, **options).scores
    wanted = 1.5 * (with_image - without) + without
    kept = with_image.exp() >= 0.2 * with_image.exp().max()
    spoken = torch.arange(wanted.shape[1]) < 90
    assert torch.equal(scores > -1e3, kept & spoken)
    torch.testing.assert_close(scores[kept & spoken], wanted[kept & spoken], **CLOSE)


def test_per_head_caches():
    """Heads that keep different tokens know which of them are visual."""
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    seen = []

    class Look(mllm.PAI):
        def scores(self, rows, s):
            if not rows.reading and rows.layer == 2:
                cached = rows.prompt.cached[2]
                assert cached.column.ndim == 3
                assert rows.of_prompt(s).shape == (len(s) * 6, 1, s.shape[-1] - rows.prompt.later)
                seen.append(torch.equal(rows.image[:, 0], cached.visual.repeat_interleave(2, 1).flatten(0, 1)))
            return super().scores(rows, s)

    with mllm.attach(model, mllm.KVPrune(keep=0.5, rows=4, pool=3), Look(alpha=0.8, gamma=1)):
        generate(model, inputs, tokens=3)
    assert seen == [True, True]


def test_no_map_of_all_pairs():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        pairs = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if torch.is_tensor(x) and x.ndim > 1 and min(x.shape[-2:]) >= 2048:
                    self.pairs += 1
            return out

    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs([[2048, "image", 8]])
    with mllm.attach(model, *STEER, mllm.VHR()), Largest() as largest:
        model(**inputs)
    assert not largest.pairs


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: mllm.PAI(alpha=-1), "at least 0"),
        (lambda: mllm.PAI(gamma=0.5), "at least 1"),
        (lambda: mllm.PAI(beta=2), "from 0 to 1"),
        (lambda: mllm.VHR(alpha=float("nan")), "finite"),
        (lambda: mllm.VHR(text_branch="none"), "reinforced"),
        (lambda: mllm.GIFT(alpha="5"), "at least 0"),
        (lambda: mllm.VAR(p=2), "from 0 to 1"),
        (lambda: mllm.VAR(tau=0), "above 0"),
        (lambda: mllm.attach(VLMS["Llava"].build(), mllm.PAI(layers=(9,))), "layers 0 to 3"),
        (lambda: mllm.attach(VLMS["Llava"].build(), mllm.VAR()), "find_sinks"),
        (lambda: mllm.attach(VLMS["Llava"].build(), mllm.VAR(dims=(48,))), "0 to 47"),
        (lambda: mllm.attach(VLMS["Llava"].build(), mllm.VHR(layers=(4,))), "layers 0 to 3"),
        (lambda: mllm.attach(VLMS["Llava"].build(), mllm.GIFT(saliency=(4,))), "layers 0 to 3"),
    ],
)
def test_bad_input(make: Any, match: str):
    with pytest.raises(ValueError, match=match):
        make()


def test_known_sinks():
    import transformers as hf

    from vision_attn.mllm.methods.var import known_dims

    vicuna = dict(hidden_size=4096, num_hidden_layers=32, vocab_size=32064)
    assert known_dims(hf.LlamaConfig(**vicuna)) == (1415, 2533)
    assert known_dims(hf.LlamaConfig(hidden_size=5120, num_hidden_layers=40, vocab_size=32000)) == (2100, 4743)
    assert known_dims(hf.LlamaConfig(**{**vicuna, "vocab_size": 128256})) is None
    qwen = dict(hidden_size=3584, num_hidden_layers=28)
    assert known_dims(hf.Qwen2VLConfig(text_config=qwen).text_config) == (458, 2570)
    assert known_dims(hf.Qwen2Config(**qwen)) is None
