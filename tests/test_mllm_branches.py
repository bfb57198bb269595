"""Second branches: what is generated equals both prompts read by the stock model, one row and one branch at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from test_mllm_engine import Cached, Late, Third  # noqa: E402
from test_mllm_input import video  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402
from vlm_models import IMAGE, PRUNED, TEXT, VLM, VLMS, VOCABULARY, single  # noqa: E402

from vision_attn.mllm.attachment import attach  # noqa: E402
from vision_attn.mllm.method import InputPrune, LayerPrune, top  # noqa: E402
from vision_attn.mllm.methods.agla import AGLA, masked_image  # noqa: E402
from vision_attn.mllm.methods.damro import DAMRO  # noqa: E402
from vision_attn.mllm.methods.dola import DoLa  # noqa: E402
from vision_attn.mllm.methods.fastervlm import FasterVLM  # noqa: E402
from vision_attn.mllm.methods.gift import GIFT  # noqa: E402
from vision_attn.mllm.methods.icd import ICD  # noqa: E402
from vision_attn.mllm.methods.m3id import M3ID  # noqa: E402
from vision_attn.mllm.methods.opera import OperaPenalty  # noqa: E402
from vision_attn.mllm.methods.pai import PAI  # noqa: E402
from vision_attn.mllm.methods.vcd import VCD  # noqa: E402
from vision_attn.mllm.methods.vhr import VHR  # noqa: E402
from vision_attn.mllm.report import prefill_flops  # noqa: E402

EVERY = pytest.mark.parametrize("vlm", VLMS.values(), ids=lambda vlm: vlm.name)
WORDS = (7, 41, 20)
CLOSE = dict(atol=1e-4, rtol=1e-4)
Prompts = list[dict[str, Any]]


pytestmark = pytest.mark.usefixtures("inference")


def rows_of(vlm: VLM) -> list[list[int | str]]:
    if vlm.name == "InstructBlip":  # every row has an image
        return [[3, "image", 4], [5, "image", 2]]
    return [[3, "image", 4], [5, "image", 2, "image", 3], [6]]


def split(vlm: VLM, rows: list[Any], batch: dict[str, Any]) -> Prompts:
    """The rows of a batch as prompts of their own, without padding."""
    return [single(types.SimpleNamespace(inputs=lambda _: batch, images=vlm.images), rows, i) for i in range(len(rows))]


def read(model: torch.nn.Module, prompt: dict[str, Any], answer: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens of the answer, vocabulary]` of the stock model before each of them."""
    prompt, ids = dict(prompt), prompt["input_ids"]
    if "inputs_embeds" in prompt:
        del prompt["input_ids"]
        model = getattr(model, "language_model", model) if hasattr(model, "qformer") else model
    elif "qformer_input_ids" in prompt:  # generate() of InstructBLIP hands embeddings to its text model
        made = model.get_image_features(
            prompt["pixel_values"], prompt["qformer_input_ids"], prompt["qformer_attention_mask"]
        ).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = made.flatten(0, 1)
        model, prompt = model.language_model, {"inputs_embeds": embeds}
    elif not (ids == IMAGE).any():
        names = ("input_ids", "attention_mask", "token_type_ids")
        prompt = {name: prompt[name] for name in names if name in prompt}
        model = getattr(model, "language_model", model) if hasattr(model, "qformer") else model
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
    cache = DynamicCache(config=model.config.get_text_config())
    logits = [model(**prompt, past_key_values=cache, use_cache=True).logits[:, -1]]
    place = prompt["inputs_embeds"].shape[1] if "inputs_embeds" in prompt else ids.shape[1]  # also where it was pruned
    place += type(model).__name__.startswith("PaliGemma")
    offset = getattr(model.base_model, "rope_deltas", None)
    for i, token in enumerate(answer[:-1]):
        at = torch.tensor([[place + i]])
        given = {"position_ids": at if offset is None else torch.stack([at, *[at + offset] * 3])}
        logits.append(model(input_ids=token[None, None], past_key_values=cache, use_cache=True, **given).logits[:, -1])
    return torch.cat(logits)


def noisy(pixels: torch.Tensor, steps: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Forward diffusion, one step after the other in closed form, from the definition."""
    kept = 1.0
    for i in range(steps + 1):
        kept *= 1 - ((0.005 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)) + 1e-5)
    noise = torch.randn(pixels.shape, generator=generator or torch.Generator().manual_seed(0))
    mixed = math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise
    if pixels.ndim == 5:  # tiles that fill up a row
        for row in range(len(pixels)):
            for tile in range(pixels.shape[1]):
                if not pixels[row, tile].any():
                    mixed[row, tile] = 0
    return mixed


def in_noise(vlm: VLM, rows: list[Any], batch: dict[str, Any]) -> Prompts:
    return split(vlm, rows, {**batch, "pixel_values": noisy(batch["pixel_values"], 900)})


def blind(vlm: VLM, rows: list[Any], batch: dict[str, Any]) -> Prompts:
    prompts = []
    for prompt in split(vlm, rows, batch):
        stays = prompt["input_ids"][0] != IMAGE
        names = ("input_ids", "attention_mask", "token_type_ids")
        prompts.append({name: prompt[name][:, stays] for name in names if name in prompt})
    return prompts


def confused(vlm: VLM, rows: list[Any], batch: dict[str, Any]) -> Prompts:
    prompts, words = [], torch.tensor([WORDS])
    for prompt in split(vlm, rows, batch):
        if "qformer_input_ids" in prompt:
            for name, value in (("qformer_input_ids", words), ("qformer_attention_mask", torch.ones_like(words))):
                prompt[name] = torch.cat([value, prompt[name]], 1)
        else:
            places = (prompt["input_ids"][0] == IMAGE).nonzero()
            at = int(places[-1]) + 1 if len(places) else 0
            closed = vlm.mrope or vlm.name == "Gemma3"  # where the model knows the token that closes an image
            at += closed and len(places) > 0
            for name, value in list(prompt.items()):
                if value.ndim == 2 and name not in ("image_sizes", "image_grid_thw", "pixel_values"):
                    new = words if name == "input_ids" else torch.full_like(words, name == "attention_mask")
                    prompt[name] = torch.cat([value[:, :at], new.to(value.dtype), value[:, at:]], 1)
        prompts.append(prompt)
    return prompts


def contrast(z: torch.Tensor, u: torch.Tensor, step: int) -> torch.Tensor:
    return torch.where(z >= z.max() + math.log(0.1), 2 * z - u, -torch.inf)


def grounded(z: torch.Tensor, u: torch.Tensor, step: int) -> torch.Tensor:
    c, u, g = z.log_softmax(-1), u.log_softmax(-1), math.exp(-0.3 * step)
    return torch.where(c >= c.max() + math.log(0.1), c + (1 - g) / g * (c - u), -torch.inf)


def halved(pixels: torch.Tensor) -> torch.Tensor:
    """A matcher that never finds anything in every other pixel."""
    return pixels * (torch.arange(pixels.shape[-1]) % 2)


def in_halves(vlm: VLM, rows: list[Any], batch: dict[str, Any]) -> Prompts:
    return split(vlm, rows, {**batch, "pixel_values": halved(batch["pixel_values"])})


def assembled(z: torch.Tensor, u: torch.Tensor, step: int) -> torch.Tensor:
    return torch.where(z >= z.max() + math.log(0.5), z + 2 * u, -torch.inf)


def attentive(z: torch.Tensor, u: torch.Tensor, step: int) -> torch.Tensor:
    c, u = z.log_softmax(-1), u.log_softmax(-1)
    return torch.where(c >= c.max() + math.log(0.1), 3 * (c - u) + u, -torch.inf)


METHODS: dict[str, tuple[Any, Callable, Callable]] = {
    "vcd": (VCD(steps=900), in_noise, contrast),
    "m3id": (M3ID(decay=0.3), blind, grounded),
    "icd": (ICD(instruction=WORDS), confused, contrast),
    "agla": (AGLA(matcher=halved), in_halves, assembled),
    "pai": (PAI(alpha=0, gamma=3), blind, attentive),
}


def scored(model: torch.nn.Module, batch: dict[str, Any], tokens: int = 4, **options: Any) -> tuple[Any, torch.Tensor]:
    out = model.generate(
        **batch, max_new_tokens=tokens, do_sample=False, output_scores=True, return_dict_in_generate=True, **options
    )
    return out.sequences[:, -tokens:], out_of_reach(torch.stack(out.scores))


def out_of_reach(scores: torch.Tensor) -> torch.Tensor:
    """What is cut has lost 10000."""
    return scores.masked_fill(scores < -5000, -torch.inf)


def allowed(model: torch.nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """Without the tokens that the generation config suppresses."""
    own = model.language_model if hasattr(model, "qformer") else model
    scores = scores.clone()
    scores[..., own.generation_config.suppress_tokens or []] = -torch.inf
    return scores


SAME_PATH = {"agla": ("Llava", "Idefics3"), "pai": ("Llava", "Qwen2_5_VL")}  # as VCD, and as M3ID
SHOWN = [(vlm, name) for vlm in VLMS.values() for name in METHODS if vlm.name in SAME_PATH.get(name, VLMS)]


@pytest.mark.parametrize("vlm, name", SHOWN, ids=[f"{name}-{vlm.name}" for vlm, name in SHOWN])
def test_both_branches_are_the_stock_model(vlm: VLM, name: str):
    """A ragged batch with one image, two images, and no image, which is left as it is."""
    method, other, combine = METHODS[name]
    model, rows = vlm.build(), rows_of(vlm)
    batch = vlm.inputs(rows)
    with attach(model, method):
        answers, scores = scored(model, batch)
    for i, (prompt, second) in enumerate(zip(split(vlm, rows, batch), other(vlm, rows, batch), strict=True)):
        z, u = read(model, prompt, answers[i]), read(model, second, answers[i])
        wanted = torch.stack([combine(*both, step + 1) for step, both in enumerate(zip(z, u, strict=True))])
        if "image" not in rows[i]:
            wanted = z
        else:
            assert (u - z).abs().max() > 0.01
        wanted = allowed(model, wanted)
        torch.testing.assert_close(scores[:, i], wanted, **CLOSE)
        some = wanted.isfinite().any(-1)  # suppressed tokens may be all that is left
        assert wanted.argmax(-1)[some].tolist() == answers[i][some].tolist()


@dataclasses.dataclass(frozen=True)
class Loud(InputPrune):
    """Keep the tokens with the largest features: other ones in a noisy image."""

    def select(self, image, keep: int) -> torch.Tensor:
        return image.features.norm(dim=1).argsort()[-keep:].sort().values


@dataclasses.dataclass(frozen=True)
class Busy(LayerPrune):
    """Keep the visual tokens with the largest states at layer 2."""

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (2,)

    def select(self, layer, notes) -> torch.Tensor:
        visual = layer.tokens.visual
        return top(layer.hidden.norm(dim=-1), visual, [n // 2 for n in visual.sum(1).tolist()])


@pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
def test_both_branches_keep_the_same_tokens(vlm: VLM):
    """Also where the branch has more words; a method of its own choice would keep others in a noisy image."""
    model, rows = vlm.build(), rows_of(vlm)
    batch, chosen = vlm.inputs(rows), {}
    for share in (True, False):
        with attach(model, Loud(keep=0.5), Busy(), VCD(steps=999), share_selection=share) as run:
            out = model.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
            main = run.engine.prompts[out.past_key_values]
            (branch,) = (prompt for prompt in run.engine.prompts.values() if prompt is not main)
            assert len(main.tokens[3]) < len(main.read) < main.length
            for at in (0, 3):
                chosen[share, at] = torch.equal(main.tokens[at].column, branch.tokens[at].column)
    assert chosen == {(True, 0): True, (True, 3): True, (False, 0): False, (False, 3): False}


@pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
def test_contrast_of_pruned_prompts(vlm: VLM):
    """Methods that choose by place keep the same in both branches: each equals its prompt pruned alone."""
    model, rows = vlm.build(), rows_of(vlm)
    batch, prune = vlm.inputs(rows), [Third(keep=0.6), Late(at=2), Cached()]
    with attach(model, *prune, ICD(instruction=WORDS), positions="original"):
        answers, scores = scored(model, batch)
    prompts = zip(split(vlm, rows, batch), confused(vlm, rows, batch), strict=True)
    with attach(model, *prune, positions="original"):
        for i, both in enumerate(prompts):
            if "image" in rows[i]:
                z, u = (read(model, prompt, answers[i]) for prompt in both)
                wanted = torch.stack([contrast(*pair, 0) for pair in zip(z, u, strict=True)])
                torch.testing.assert_close(scores[:, i], allowed(model, wanted), **CLOSE)


@pytest.mark.parametrize("family, name", [*((name, "m3id") for name in VLMS), ("Llava", "vcd"), ("Qwen3VL", "vcd")])
def test_beams(family: str, name: str):
    """The log-probability of every beam is that of its tokens under the contrast, read without beams."""
    method, other, combine = METHODS[name]
    vlm, tokens = VLMS[family], 5
    model, rows = vlm.build(), rows_of(vlm)[:2]
    batch = vlm.inputs(rows)
    options = dict(num_beams=3, num_return_sequences=3, length_penalty=0.0, return_dict_in_generate=True)
    with attach(model, method):
        out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, output_scores=True, **options)
    answers = out.sequences[:, -tokens:].view(2, 3, tokens)
    found = out_of_reach(out.sequences_scores.view(2, 3))
    moved = False
    for i, (prompt, second) in enumerate(zip(split(vlm, rows, batch), other(vlm, rows, batch), strict=True)):
        for answer, score in zip(answers[i], found[i], strict=True):
            z, u = read(model, prompt, answer), read(model, second, answer)
            steps = [combine(*both, step + 1).log_softmax(-1) for step, both in enumerate(zip(z, u, strict=True))]
            total = sum(step[token] for step, token in zip(steps, answer, strict=True))
            torch.testing.assert_close(score, total, **CLOSE)
        moved |= len({tuple(answer[:2].tolist()) for answer in answers[i]}) > 1
    assert moved or name == "vcd"  # beams differ, so that a cache in the wrong order would show


@pytest.mark.parametrize("name", ["vcd", "m3id", "icd"])
@pytest.mark.parametrize("family", ["Llava", "Qwen2VL", "Gemma3", "PaliGemma"])
def test_however_it_is_generated(name: str, family: str):
    vlm, method = VLMS[family], METHODS[name][0]
    model, rows = vlm.build(), rows_of(vlm)
    batch = vlm.inputs(rows)
    offset = None
    with attach(model, method):
        _, wanted = scored(model, batch)
        if vlm.mrope:
            offset = model.model.rope_deltas.clone()
        for options in ({"cache_implementation": "static"}, {"use_cache": False}):
            torch.testing.assert_close(scored(model, batch, **options)[1], wanted, **CLOSE)
        torch.manual_seed(0)
        out = model.generate(
            **batch, max_new_tokens=3, do_sample=True, top_k=0, num_return_sequences=2, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        first = out_of_reach(out.scores[0])
        torch.testing.assert_close(first[::2], wanted[0], **CLOSE)
        torch.testing.assert_close(first[1::2], wanted[0], **CLOSE)
    answers, scores = out.sequences[:, -3:], out_of_reach(torch.stack(out.scores))
    others = METHODS[name][1](vlm, rows, batch)
    for i, prompt in enumerate(split(vlm, rows, batch)):
        for n in (2 * i, 2 * i + 1):
            if "image" in rows[i]:
                z, u = read(model, prompt, answers[n]), read(model, others[i], answers[n])
                mixed = [METHODS[name][2](*both, step + 1) for step, both in enumerate(zip(z, u, strict=True))]
                torch.testing.assert_close(scores[:, n], allowed(model, torch.stack(mixed)), **CLOSE)
    if vlm.mrope:
        assert offset.any()  # that of the main prompt


@pytest.mark.parametrize(
    "family, method",
    [(name, VCD(alpha=0, beta=0)) for name in VLMS]
    + [(name, method) for name in ("Llava", "Qwen3VL") for method in (M3ID(decay=0, beta=0), ICD(WORDS, 0, 0))],
)
def test_no_weight_is_no_change(family: str, method: Any):
    vlm = VLMS[family]
    model, batch = vlm.build(), vlm.inputs(rows_of(vlm))
    stock, plain = scored(model, batch)
    with attach(model, method):
        answers, scores = scored(model, batch)
    assert torch.equal(answers, stock)
    if isinstance(method, M3ID):
        scores, plain = scores.log_softmax(-1), plain.log_softmax(-1)
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "methods, passes",
    [
        ([VCD()], 2),
        ([ICD(WORDS)], 2),
        ([PAI(gamma=1.5)], 2),
        ([PAI(gamma=1)], 1),
        ([OperaPenalty(candidates=1), Third(keep=0.5)], 2),
        ([VCD(), Late()], 2),
        ([GIFT(saliency=(2,), layers=(1, 2))], 2),
        ([VHR(text_branch="plain")], 2),
        ([VHR(), M3ID()], 4),
    ],
    ids=lambda x: None if isinstance(x, int) else "-".join(type(method).__name__ for method in x),
)
def test_the_report_counts_every_pass(methods: list[Any], passes: int):
    """The layers of all passes over the prompt, added up one by one; every pass ends in one row of logits."""
    vlm, calls = VLMS["Llava"], []
    model, inputs = vlm.build(), vlm.inputs([[3, "image", 4], [5, "image", 2, "image", 3]])
    config = model.config.get_text_config()
    head = prefill_flops(config, [0] * 4)

    def watch(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:  # no token after the prompt
            calls.append(len(hidden) * (prefill_flops(config, [hidden.shape[1], 0, 0, 0]) - head))

    with attach(model, *methods) as run, contextlib.ExitStack() as stack:
        for layer in model.get_decoder().layers:
            stack.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
        model.generate(**inputs, max_new_tokens=2)
        (read,) = run.report.prompts
    assert (read.other_flops > 0) == (passes > 1) == ("in other ways" in str(run.report))
    assert read.flops + read.other_flops == pytest.approx(sum(calls) + 2 * passes * head)


@pytest.mark.parametrize("name", ["vcd", "m3id", "icd"])
@pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL", "Gemma3"])
def test_a_second_turn(name: str, family: str):
    vlm = VLMS[family]
    model, first = vlm.build(), single(vlm, [[3, "image", 4]], 0)
    more = torch.tensor([[11, 12, 13, 14]])
    with attach(model, METHODS[name][0]):
        out = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, more], 1)
        extra = torch.zeros(1, 7, dtype=torch.int)
        names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in first]
        second = {name: torch.cat([first[name], extra], 1) for name in names}
        second |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _, kept = scored(model, second, past_key_values=out.past_key_values)
        _, anew = scored(model, {**first, **second})
    torch.testing.assert_close(kept, anew, **CLOSE)


def test_what_cannot_be_contrasted_is_said():
    vlm = VLMS["Llava"]
    model, batch = vlm.build(), single(vlm, [[3, "image", 4]], 0)
    _, stock = scored(model, batch)
    for bad in (
        dict(alpha=-1),
        dict(alpha=True),
        dict(beta=2),
        dict(alpha=math.inf),
        dict(steps=1000),
        dict(steps=1.5),
    ):
        with pytest.raises(ValueError, match="VCD"):
            VCD(**bad)
    with pytest.raises(ValueError, match="give token ids"):
        ICD(instruction=())
    with pytest.raises(ValueError, match="the vocabulary has 120"):
        attach(model, ICD(instruction=(120,)))
    with pytest.raises(ValueError, match="VCD and M3ID both choose the next token"):
        attach(model, VCD(), M3ID())
    with attach(model, VCD()):
        with pytest.raises(ValueError, match="cannot be used with prompt lookup"):
            scored(model, batch, prompt_lookup_num_tokens=2)
        features = {"image": model.model.get_image_features(batch["pixel_values"])}
        given = {name: value for name, value in batch.items() if name != "pixel_values"}
        scored(model, given | {"mm_encoder_outputs": dict(features)})
        with pytest.raises(ValueError, match="they were not given to generate"):
            scored(model, given | {"mm_encoder_outputs": dict(features)})
        model.model.get_image_features(batch["pixel_values"] + 1)  # not those of the prompt
        with pytest.raises(ValueError, match="they were not given to generate"):
            scored(model, given | {"mm_encoder_outputs": dict(features)})
        handle = model.get_decoder().norm.register_forward_pre_hook(fail_late)
        with pytest.raises(RuntimeError, match="boom"):
            scored(model, batch)
        handle.remove()
    assert torch.equal(scored(model, batch)[1], stock)


def fail_late(module: Any, args: tuple) -> None:
    """In the branch, the second to read the prompt."""
    module.calls = getattr(module, "calls", 0) + 1
    if module.calls == 2:
        raise RuntimeError("boom")


def looked_at(model: torch.nn.Module, pixels: torch.Tensor, layer: int, cls: bool) -> tuple[Any, torch.Tensor]:
    """The output of the vision tower, and by full maps the attention of its patches, `[heads, tiles, patches]`."""
    tower = next(
        getattr(model.base_model, name) for name in ("vision_tower", "vision_model") if hasattr(model.base_model, name)
    )
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.config._attn_implementation = before
    maps = out.attentions[layer].transpose(0, 1)
    return out, maps[:, :, 0, 1:] if cls else maps.mean(2)


def patches_of(vlm: VLM, rows: list[Any], batch: dict[str, Any], model: torch.nn.Module, k: int) -> Prompts:
    """Prompts of embeddings, with the patches that are looked at most in the place of images."""
    base, prompts = model.base_model, []
    for prompt in split(vlm, rows, batch):
        ids, cls = prompt["input_ids"], vlm.tower == "cls"
        if "pixel_values" not in prompt:
            prompts.append(prompt)
            continue
        pixels = prompt["pixel_values"].flatten(0, -4)
        layer = -1 if vlm.name == "InternVL" or not cls else -2
        out, maps = looked_at(model, pixels, layer, cls)
        best = maps.mean(0).argsort(dim=-1, descending=True)[:, :k]
        if vlm.name == "InstructBlip":
            states = out[0][:, 1:][0][best]
            made = hf_qformer(model, states, prompt)
        elif vlm.name == "Idefics3":  # a token is a square of four patches
            scores = maps.mean(0).view(-1, 3, 2, 3, 2).mean((2, 4)).flatten(1)
            best = scores.argsort(dim=-1, descending=True)[:, :k]
            made = base.connector(out.last_hidden_state)
            made = torch.stack([image[order] for image, order in zip(made, best, strict=True)])
        else:
            states = out.hidden_states[layer][:, 1:] if cls else out.hidden_states[layer]
            states = torch.stack([image[order] for image, order in zip(states, best, strict=True)])
            made = base.multi_modal_projector(states)
            if vlm.name in ("LlavaNext", "LlavaOnevision"):
                made = torch.cat([made, base.image_newline.expand(len(made), 1, -1)], 1)
                made = made.unflatten(0, (rows[len(prompts)].count("image"), -1)).flatten(1, 2)
        parts, image = [], 0
        embeds = model.get_input_embeddings()(ids)[0]
        for place in range(ids.shape[1]):
            if ids[0, place] != IMAGE:
                parts.append(embeds[place : place + 1])
            elif ids[0, place - 1] != IMAGE:
                parts.append(made[image])
                image += 1
        prompts.append({"input_ids": ids, "inputs_embeds": torch.cat(parts)[None]})
    return prompts


def hf_qformer(model: torch.nn.Module, states: torch.Tensor, prompt: dict[str, Any]) -> torch.Tensor:
    """What the Q-Former of InstructBLIP makes of `states` `[1, patches, width]`."""
    queries = model.query_tokens
    mask = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), prompt["qformer_attention_mask"]], 1)
    out = model.qformer(
        input_ids=prompt["qformer_input_ids"], attention_mask=mask, query_embeds=queries, encoder_hidden_states=states
    )[0]
    return model.language_projection(out[:, : queries.shape[1]])


@pytest.mark.parametrize("family", ["Llava", "LlavaNext", "LlavaOnevision", "Idefics3", "InstructBlip"])
def test_damro(family: str):
    vlm = VLMS[family]
    model, rows, k = vlm.build(), rows_of(vlm), 3
    for name, weight in model.named_parameters():
        if "patch_embedding" in name or "position_embedding" in name:  # patches that differ
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    batch = vlm.inputs(rows)
    method = DAMRO(k=k, alpha=1.0, proxy=None if vlm.tower == "cls" else "received")
    with attach(model, Third(keep=0.4), method) if family == "Llava" else attach(model, method):
        answers, scores = scored(model, batch)
    others = patches_of(vlm, rows, batch, model, k)
    for i, prompt in enumerate(split(vlm, rows, batch)):
        with attach(model, Third(keep=0.4)) if family == "Llava" else contextlib.nullcontext():
            z = read(model, prompt, answers[i])
        wanted = z
        if "image" in rows[i]:
            u = read(model, others[i], answers[i])
            assert (z - u).abs().max() > 0.1
            wanted = torch.stack([contrast(*both, 0) for both in zip(z, u, strict=True)])
        torch.testing.assert_close(scores[:, i], allowed(model, wanted), **CLOSE)


def test_damro_with_merged_heads():
    """One softmax over the whole width ranks otherwise than the mean over heads."""
    vlm = VLMS["Llava"]
    model = vlm.build()
    batch = single(vlm, [[3, "image", 4]], 0)
    tower, found = model.model.vision_tower, {}
    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-3]
    layer = tower.encoder.layers[-2] if hasattr(tower, "encoder") else tower.vision_model.encoder.layers[-2]
    x = layer.layer_norm1(states[0])
    one = (layer.self_attn.k_proj(x) @ layer.self_attn.q_proj(x[0]) / x.shape[1] ** 0.5).softmax(0)[1:]
    order = one.argsort(descending=True)[:3]
    features = model.model.get_image_features(batch["pixel_values"]).pooler_output[0][order]
    for reduce in ("merged", "mean"):
        seen = []
        with attach(model, DAMRO(k=3, head_reduce=reduce)):
            handle = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
            )
            scored(model, batch, tokens=1)
            handle.remove()
        found[reduce] = torch.allclose(seen[1][4:7], features, atol=1e-5)
    assert found == {"merged": True, "mean": False}
    with pytest.raises(ValueError, match="has none; DAMRO\\(proxy='received'\\)"):
        attach(VLMS["Gemma3"].build(), DAMRO())
    with attach(model, DAMRO(k=37)), pytest.raises(ValueError, match="the image has 36 tokens"):
        scored(model, batch)
    for bad in (dict(k=0), dict(k=True), dict(head_reduce="max"), dict(proxy="given")):
        with pytest.raises(ValueError, match="DAMRO"):
            DAMRO(**bad)


def test_what_a_masked_image_keeps():
    """The share of pixels that stays is one minus half of the score."""
    relevance = torch.arange(200.0).view(2, 10, 10)
    found = masked_image(torch.ones(2, 3, 10, 10), relevance, torch.tensor([0.4, 1.0]), fill=-1)
    assert (found[0] == 1).sum() == 3 * 80 and (found[1] == 1).sum() == 3 * 50
    assert torch.equal(found[1, 0] == 1, relevance[1] >= 150)
    for bad in (torch.ones(1), torch.tensor([0.5, 1.5])):
        with pytest.raises(ValueError, match="score"):
            masked_image(torch.ones(2, 3, 10, 10), relevance, bad)
    with pytest.raises(TypeError, match="give a function"):
        AGLA(matcher=None)
    model, batch = VLMS["Llava"].build(), single(VLMS["Llava"], [[3, "image", 4]], 0)
    with attach(model, AGLA(matcher=lambda pixels: pixels[..., :3])), pytest.raises(ValueError, match="must stay"):
        scored(model, batch)


@EVERY
def test_dola(vlm: VLM):
    """Prompts without images too. Hidden states are those that the stock model gives out."""
    model, rows = vlm.build(), rows_of(vlm)
    batch, candidates = vlm.inputs(rows), (0, 2, 3)
    with attach(model, DoLa(layers=candidates)):
        answers, scores = scored(model, batch, tokens=2)
    own = model.language_model if vlm.name == "InstructBlip" else model
    chosen = set()
    for i, prompt in enumerate(split(vlm, rows, batch)):
        given = dict(prompt, output_hidden_states=True)
        out = model.generate(
            **given, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        states = out.hidden_states[0]
        last = out.logits[0][0].softmax(-1)
        early = [own.lm_head(own.get_decoder().norm(states[n][0, -1])).softmax(-1) for n in candidates]
        middles = [(last + other) / 2 for other in early]
        far = [
            (last * (last / m).log()).sum() / 2 + (other * (other / m).log()).sum() / 2
            for other, m in zip(early, middles, strict=True)
        ]
        best = early[far.index(max(far))]
        chosen.add(far.index(max(far)))
        wanted = torch.where(last >= 0.1 * last.max(), (last / best).log(), -torch.inf)
        torch.testing.assert_close(scores[0, i], allowed(model, wanted), atol=1e-3, rtol=1e-3)
        assert int(allowed(model, wanted).argmax()) == int(answers[i, 0])
    if vlm.name == "Llava":  # cached generation and static caches see the same layers
        with attach(model, DoLa(layers=candidates), Third(keep=0.5)):
            _, kept = scored(model, batch)
            _, static = scored(model, batch, cache_implementation="static")
            _, again = scored(model, batch, use_cache=False)
        torch.testing.assert_close(static, kept, **CLOSE)
        torch.testing.assert_close(again, kept, **CLOSE)


def test_candidates_of_dola():
    config = types.SimpleNamespace(tie_word_embeddings=False)
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: config))
    assert DoLa().early(32, model) == tuple(range(0, 16, 2))
    assert DoLa(layers="high").early(32, model) == tuple(range(16, 32, 2))
    assert DoLa(layers="high").early(48, model) == tuple(range(28, 48, 2))
    assert DoLa().early(48, model) == tuple(range(0, 20, 2))
    config.tie_word_embeddings = True
    assert DoLa().early(32, model) == tuple(range(2, 16, 2))
    assert DoLa().early(4, model) == (2,)
    for bad in ("middle", (), "lo"):
        with pytest.raises(ValueError, match="DoLa"):
            DoLa(layers=bad)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        attach(VLMS["Llava"].build(), DoLa(layers=(4,)))


def test_when_all_that_is_left_is_forbidden():
    """The likeliest of what was cut, not token 0."""
    model, batch = VLMS["Llava"].build(), single(VLMS["Llava"], [[3, "image", 4]], 0)
    (first, *_), scores = scored(model, batch, tokens=1)
    model.generation_config.suppress_tokens += first.tolist()
    second = int(allowed(model, scores[0, 0]).argmax())
    with attach(model, VCD(alpha=0, beta=1)):
        assert scored(model, batch, tokens=1)[0].tolist() == [[second]]


@EVERY
def test_attention_is_not_edited_in_a_branch(vlm: VLM):
    """The main prompt as edited alone, the noisy one as the stock model reads it."""
    model, rows, edit = vlm.build(), rows_of(vlm), PAI(alpha=2.0, gamma=1)
    batch = vlm.inputs(rows)
    with attach(model, edit, VCD(steps=900)):
        answers, scores = scored(model, batch, tokens=3)
    others = in_noise(vlm, rows, batch)
    for i, prompt in enumerate(split(vlm, rows, batch)):
        u = read(model, others[i], answers[i])
        with attach(model, edit):  # what it says of these answers, which it would not give itself
            forced = [[token] for token in answers[i].tolist()]
            own = model.language_model if vlm.name == "InstructBlip" else model
            start = prompt["input_ids"].shape[1]
            kept, own.generation_config.suppress_tokens = own.generation_config.suppress_tokens, None
            out = model.generate(
                **prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
                prefix_allowed_tokens_fn=lambda _, ids, forced=forced, start=start: forced[min(len(ids) - start, 2)],
            )  # fmt: skip
            own.generation_config.suppress_tokens = kept
            z = torch.cat(out.logits)
        assert out.sequences[0, -3:].tolist() == answers[i].tolist()
        wanted = torch.stack([contrast(*both, 0) for both in zip(z, u, strict=True)]) if "image" in rows[i] else z
        torch.testing.assert_close(scores[:, i], allowed(model, wanted), **CLOSE)


@pytest.mark.parametrize(
    "family, beams",
    [("Llava", 1)] + [pytest.param(*case, marks=pytest.mark.slow) for case in [("Qwen2VL", 2), ("Gemma3", 1)]],
)
def test_penalty_of_opera(family: str, beams: int):
    """Against the full maps of the last layer, one prompt and answer at a time."""
    vlm, tokens, weight, scale = VLMS[family], 12, 0.7, 300.0
    model, rows = vlm.build(), rows_of(vlm)[:2]
    eager = vlm.build()
    eager.set_attn_implementation("eager")
    for one in (model, eager):  # candidates are never placeholders
        one.lm_head.weight[VOCABULARY:] = one.lm_head.weight[: len(one.lm_head.weight) - VOCABULARY] / 100
    batch, seen = vlm.inputs(rows), []
    model.generation_config.suppress_tokens = None  # what is left of the candidates
    with attach(model, OperaPenalty(weight=weight, scale=scale, candidates=3)):
        out = model.generate(
            **batch, max_new_tokens=tokens, do_sample=False, num_beams=beams, num_return_sequences=beams,
            output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
    answers = out.sequences[:, -tokens:]
    for n, answer in enumerate(answers):
        prompt = split(vlm, rows, batch)[n // beams]
        z, total = read(model, prompt, answer), 0.0
        triangle = torch.zeros(tokens, tokens)
        for step in range(tokens):
            log_p = z[step].log_softmax(-1)
            scores = torch.full_like(log_p, -torch.inf)
            for token in log_p.topk(3).indices:
                row = head_max(eager, prompt, torch.cat([answer[:step], token[None]]))
                triangle[step] = 0
                triangle[step, : step + 1] = row[len(row) - step - 1 :]
                if step + 1 <= 10:
                    penalty = -row[: prompt["input_ids"].shape[1]][prompt["input_ids"][0] == IMAGE].sum()
                else:
                    columns = [(scale * triangle[j : step + 1, j]).double().prod() for j in range(step + 1)]
                    penalty = (1e-7 * max(columns)).clamp(max=1000).float()
                    seen.append(float(penalty))
                scores[token] = log_p[token] - weight * penalty
            row = head_max(eager, prompt, answer[: step + 1])
            triangle[step, : step + 1] = row[len(row) - step - 1 :]
            if beams == 1:
                torch.testing.assert_close(out_of_reach(out.scores[step])[n], scores, atol=1e-3, rtol=1e-3)
            total += scores.log_softmax(-1)[answer[step]]
        if beams > 1:
            torch.testing.assert_close(out.sequences_scores[n], total, atol=1e-3, rtol=1e-3)
    assert max(seen) > 1e-3


def head_max(model: torch.nn.Module, prompt: dict[str, Any], answer: torch.Tensor) -> torch.Tensor:
    """What the last token looks at in the last layer: the most of all heads, divided by its sum, float32 `[keys]`."""
    extra = torch.zeros_like(answer)[None]
    given = dict(prompt, input_ids=torch.cat([prompt["input_ids"], answer[None]], 1))
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in given:
            given[name] = torch.cat([given[name], extra.to(given[name].dtype)], 1)
    row = model(**given, output_attentions=True).attentions[-1][0, :, -1].amax(0)
    return row / row.sum()


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL", "LlavaOnevision"])
def test_a_video(family: str):
    """Beside an image, and with a method that looks into the vision tower and must not see the noise."""
    vlm = VLMS[family]
    model = vlm.build()
    batch = video(vlm, beside=True)
    with attach(model, VCD(steps=900)):
        _, scores = scored(model, batch, tokens=1)
    generator = torch.Generator().manual_seed(0)  # images first
    noise = {name: noisy(batch[name], 900, generator) for name in ("pixel_values", "pixel_values_videos")}
    z, u = (model(**given).logits[0, -1] for given in (batch, batch | noise))
    torch.testing.assert_close(scores[0, 0], allowed(model, contrast(z, u, 1)), **CLOSE)
    with attach(model, FasterVLM(keep=0.5), VCD(steps=900)):
        _, first = scored(model, batch)
        _, again = scored(model, batch)
    assert torch.equal(first, again)


@pytest.mark.parametrize("method", [DoLa(layers=(0, 2)), VCD()])
def test_assisted_decoding_is_refused(method: Any):
    """An assistant that guesses something else."""
    vlm = VLMS["Llava"]
    model, batch = vlm.build(), single(vlm, [[3, "image", 4]], 0)
    torch.manual_seed(5)
    assistant = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    assistant.generation_config.eos_token_id = None
    with attach(model, method), pytest.raises(ValueError, match="assisted decoding"):
        model.generate(**batch, max_new_tokens=6, do_sample=False, assistant_model=assistant)
