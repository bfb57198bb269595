"""Second branches: what is generated equals both prompts read by the stock model, one row and one branch at a time."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache  # noqa: E402
from vlm_models import IMAGE, VLM, VLMS, single  # noqa: E402

from vision_attn.mllm.attachment import attach  # noqa: E402
from vision_attn.mllm.methods.icd import ICD  # noqa: E402
from vision_attn.mllm.methods.m3id import M3ID  # noqa: E402
from vision_attn.mllm.methods.vcd import VCD  # noqa: E402

EVERY = pytest.mark.parametrize("vlm", VLMS.values(), ids=lambda vlm: vlm.name)
WORDS = (7, 41, 20)
CLOSE = dict(atol=1e-4, rtol=1e-4)
Prompts = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


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
    if "qformer_input_ids" in prompt:  # generate() of InstructBLIP hands embeddings to its text model
        made = model.get_image_features(
            prompt["pixel_values"], prompt["qformer_input_ids"], prompt["qformer_attention_mask"]
        ).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = made.flatten(0, 1)
        model, prompt = model.language_model, {"inputs_embeds": embeds}
    elif not (ids == IMAGE).any():
        names = ("input_ids", "attention_mask", "token_type_ids")
        prompt = {name: prompt[name] for name in names if name in prompt}
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
    cache = DynamicCache(config=model.config.get_text_config())
    logits = [model(**prompt, past_key_values=cache, use_cache=True).logits[:, -1]]
    for i in range(len(answer) - 1):
        logits.append(model(input_ids=answer[None, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.cat(logits)


def noisy(pixels: torch.Tensor, steps: int) -> torch.Tensor:
    """Forward diffusion, one step after the other in closed form, from the definition."""
    kept = 1.0
    for i in range(steps + 1):
        kept *= 1 - ((0.005 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)) + 1e-5)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
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


METHODS: dict[str, tuple[Any, Callable, Callable]] = {
    "vcd": (VCD(steps=900), in_noise, contrast),
    "m3id": (M3ID(decay=0.3), blind, grounded),
    "icd": (ICD(instruction=WORDS), confused, contrast),
}


def scored(model: torch.nn.Module, batch: dict[str, Any], tokens: int = 4, **options: Any) -> tuple[Any, torch.Tensor]:
    out = model.generate(
        **batch, max_new_tokens=tokens, do_sample=False, output_scores=True, return_dict_in_generate=True, **options
    )
    return out.sequences[:, -tokens:], torch.stack(out.scores)


def allowed(model: torch.nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """Without the tokens that the generation config suppresses."""
    own = model.language_model if hasattr(model, "qformer") else model
    scores = scores.clone()
    scores[..., own.generation_config.suppress_tokens or []] = -torch.inf
    return scores


@EVERY
@pytest.mark.parametrize("name", METHODS)
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
        assert wanted.argmax(-1).tolist() == answers[i].tolist()
