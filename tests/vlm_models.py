"""Tiny random vision-language models of the real transformers classes, with prompts for them. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

IMAGE, VIDEO, START, END, PAD = 99, 98, 97, 96, 0
SIDE, PATCH = 24, 4  # pixels of an image and of a patch: 6 x 6 patches
VOCABULARY = 90  # ids of ordinary words are below this

TEXT = dict(
    vocab_size=120, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=3, head_dim=8, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TOWER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
)
PINPOINTS = [[24, 48], [48, 24], [48, 48]]
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def _llava() -> Any:
    tower = hf.CLIPVisionConfig(**TOWER, projection_dim=32)
    return hf.LlavaConfig(vision_config=tower, text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE)


def _llava_next() -> Any:
    tower, text = hf.CLIPVisionConfig(**TOWER, projection_dim=32), hf.LlamaConfig(**TEXT)
    return hf.LlavaNextConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )


def _onevision() -> Any:
    tower, text = hf.SiglipVisionConfig(**TOWER), hf.Qwen2Config(**TEXT)
    return hf.LlavaOnevisionConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


def _qwen(version: str) -> Any:
    patches = dict(patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=2, num_heads=4)
    tower = {
        "Qwen2VL": dict(patches, depth=2, embed_dim=32, mlp_ratio=2, hidden_size=48),
        "Qwen2_5_VL": dict(
            patches, depth=3, hidden_size=32, intermediate_size=64, out_hidden_size=48, window_size=16,
            fullatt_block_indexes=[1, 2],
        ),
        "Qwen3VL": dict(
            patches, depth=3, hidden_size=32, intermediate_size=64, out_hidden_size=48, num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
    }[version]  # fmt: skip
    rotary = ROTARY | ({"mrope_interleaved": True} if version == "Qwen3VL" else {})
    return getattr(hf, version + "Config")(text_config=dict(TEXT, rope_parameters=rotary), vision_config=tower, **IDS)


def _internvl() -> Any:
    tower = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    return hf.InternVLConfig(
        vision_config=tower, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )


def _shuffled(cls: str) -> Any:
    return getattr(hf, cls)(
        vision_config=TOWER, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=12, layer_types=layers, query_pre_attn_scalar=8)
    tower = hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    return hf.Gemma3Config(
        vision_config=tower, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=9, boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip


def _paligemma() -> Any:
    tower = hf.SiglipVisionConfig(**TOWER, projection_dim=48, vision_use_head=False)
    text = hf.GemmaConfig(**{**TEXT, "num_key_value_heads": 1})
    return hf.PaliGemmaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, projection_dim=48, hidden_size=48
    )


def _instructblip() -> Any:
    bridge = dict(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        encoder_hidden_size=32, cross_attention_frequency=1,
    )  # fmt: skip
    return hf.InstructBlipConfig(
        vision_config=TOWER, qformer_config=bridge, text_config=dict(TEXT, model_type="llama"), num_query_tokens=5,
        image_token_index=IMAGE,
    )  # fmt: skip


def _pixels(count: int, generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=generator)


def _stacked(images: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(sum(images), generator, 3, SIDE, SIDE)} if sum(images) else {}


def _tiled(images: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A base view and two tiles of a picture twice as wide as high."""
    if not sum(images):
        return {}
    sizes = torch.tensor([[SIDE, 2 * SIDE]] * sum(images))
    return {"pixel_values": _pixels(sum(images), generator, 3, 3, SIDE, SIDE), "image_sizes": sizes}


def _patches(images: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    if not sum(images):
        return {}
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * sum(images))
    return {"pixel_values": _pixels(sum(images) * 36, generator, 3 * 2 * PATCH**2), "image_grid_thw": grid}


def _padded(images: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images per row of the batch; empty places are zeros."""
    if not sum(images):
        return {}
    pixels = torch.zeros(len(images), max(images), 3, SIDE, SIDE)
    for row, count in enumerate(images):
        pixels[row, :count] = _pixels(count, generator, 3, SIDE, SIDE)
    return {"pixel_values": pixels}


def _bridged(images: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    words = torch.randint(3, VOCABULARY, (len(images), 4), generator=generator)
    return {**_stacked(images, generator), "qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}


@dataclasses.dataclass(frozen=True)
class VLM:
    """A family: how to build it, how many tokens an image takes in the prompt, and the arguments for images.

    Args:
        tokens: image tokens in the prompt, newline tokens included.
        newlines: how many of them are newline tokens.
        tower: "cls" or "no cls".
    """

    name: str
    config: Callable[[], Any]
    tokens: int
    images: Callable[[list[int], torch.Generator], dict[str, torch.Tensor]]
    newlines: int = 0
    tower: str = "no cls"

    @property
    def cls(self) -> str:
        return self.name + "ForConditionalGeneration"

    @property
    def mrope(self) -> bool:
        return self.name.startswith("Qwen")

    def build(self, **changes: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        config = self.config()
        for name, value in changes.items():
            setattr(config.text_config, name, value)
        model = getattr(hf, self.cls)(config).eval().requires_grad_(False)
        model.generation_config.eos_token_id = None  # random models end at random
        model.generation_config.pad_token_id = PAD
        model.generation_config.suppress_tokens = list(range(VOCABULARY, TEXT["vocab_size"]))  # no images in answers
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():  # the default spread of weights leaves attention almost flat
            if parameter.ndim > 1 and "embed" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter[0].numel() ** 0.5)
        return model

    def inputs(self, rows: list[list[int | str]], seed: int = 0, **more: Any) -> dict[str, Any]:
        """A left-padded batch: a number is so many words, "image" an image. Row `i` does not depend on the others."""
        prompts, pictures = [], {}
        for i, row in enumerate(rows):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            ids: list[int] = []
            for part in row:
                if part == "image":
                    ids += [START, *[IMAGE] * self.tokens, END]
                else:
                    ids += torch.randint(3, VOCABULARY, (part,), generator=generator).tolist()
            prompts.append(ids)
            own = self.images([row.count("image")], generator)
            for name, value in own.items():
                pictures.setdefault(name, []).append(value)
        if "pixel_values" in pictures and pictures["pixel_values"][0].ndim == 5 and self.images is _padded:
            most = max(row.count("image") for row in rows)
            full = torch.zeros(len(rows), most, 3, SIDE, SIDE)
            at = 0
            for i, row in enumerate(rows):
                if row.count("image"):
                    full[i, : row.count("image")] = pictures["pixel_values"][at][0]
                    at += 1
            merged = {"pixel_values": full}
        else:
            merged = {name: torch.cat(values) for name, values in pictures.items()}
        length = max(map(len, prompts))
        input_ids = torch.tensor([[PAD] * (length - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
        given = {"input_ids": input_ids, "attention_mask": mask, **merged}
        if self.mrope:
            given["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
        if self.name in ("Gemma3", "PaliGemma"):
            given["token_type_ids"] = (input_ids == IMAGE).int()
        return {**given, **more}


VLMS = {
    vlm.name: vlm
    for vlm in (
        VLM("Llava", _llava, 36, _stacked, tower="cls"),
        VLM("LlavaNext", _llava_next, 36 + 6 * 13, _tiled, newlines=6, tower="cls"),
        VLM("LlavaOnevision", _onevision, 36 + 6 * 13, _tiled, newlines=6),
        VLM("Qwen2VL", functools.partial(_qwen, "Qwen2VL"), 9, _patches),
        VLM("Qwen2_5_VL", functools.partial(_qwen, "Qwen2_5_VL"), 9, _patches),
        VLM("Qwen3VL", functools.partial(_qwen, "Qwen3VL"), 9, _patches),
        VLM("InternVL", _internvl, 9, _stacked, tower="cls"),
        VLM("Idefics3", functools.partial(_shuffled, "Idefics3Config"), 9, _padded),
        VLM("SmolVLM", functools.partial(_shuffled, "SmolVLMConfig"), 9, _padded),
        VLM("Gemma3", _gemma3, 9, _stacked),
        VLM("PaliGemma", _paligemma, 36, _stacked),
        VLM("InstructBlip", _instructblip, 5, _bridged, tower="cls"),
    )
}
PRUNED = [vlm for vlm in VLMS.values() if vlm.name != "InstructBlip"]
ROWS = [[3, "image", 4], [5, "image", 2, "image", 3], [6]]  # of a ragged batch
ALONE = [[3, "image", 4], [5, "image", 2]]  # InstructBLIP wants an image in every row


def prompt_of(vlm: VLM) -> dict[str, Any]:
    """The inputs of a ragged batch."""
    return vlm.inputs(ALONE if vlm.name == "InstructBlip" else ROWS)


def single(vlm: VLM, rows: list[list[int | str]], i: int) -> dict[str, Any]:
    """Row `i` of `vlm.inputs(rows)` as a batch of its own, without padding."""
    batch, counts = vlm.inputs(rows), [row.count("image") for row in rows]
    length = int(batch["attention_mask"][i].sum())
    own = {}
    for name, value in batch.items():
        if value.ndim == 2 and value.shape[:1] == (len(rows),) and name not in ("image_sizes", "image_grid_thw"):
            own[name] = value[i : i + 1, -length:] if value.shape[1] >= length else value[i : i + 1]
        elif vlm.images is _padded and counts[i]:
            own[name] = value[i : i + 1, : counts[i]]
        elif vlm.images is not _padded and counts[i]:
            each, before = value.shape[0] // sum(counts), sum(counts[:i])
            own[name] = value[before * each : (before + counts[i]) * each]
    return own


def generate(model: torch.nn.Module, inputs: dict[str, Any], tokens: int = 6, **options: Any) -> Any:
    """Greedy generation: `.sequences`, and the raw logits of every step stacked as `[steps, batch, vocabulary]`."""
    out = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits)
