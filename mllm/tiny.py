"""The built-in vision-language model before training: a small LLaVA of stock parts, its words, and its questions."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vision_attn.shapes.crowd import CELL, CELLS, KINDS, WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
DESCRIBE = "describe the image"
PATCH = 4
# What `prompt` writes, from messages as other models take them.
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def ask(kind: int) -> str:
    """The question whether a kind is in the picture.

    >>> ask(0)
    'is there a red circle in the image ?'
    """
    return f"is there a {KINDS[kind]} in the image ?"


def prompt(question: str, image: bool = True) -> str:
    """The text that the model reads before it answers."""
    return f"user : {'<image> ' if image else ''}{question} assistant :"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or mark, in lower case; a sequence starts with `<s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = [*SPECIAL, *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", model_max_length=1024,
    )  # fmt: skip


def processor(cell: int = CELL) -> LlavaProcessor:
    """Pictures to pixels, and questions to ids with one `<image>` per patch."""
    side = {"height": CELLS * cell, "width": CELLS * cell}
    pictures = CLIPImageProcessor(
        do_resize=True, size=side, do_center_crop=False, crop_size=side, do_rescale=True, do_normalize=True,
        image_mean=[0.5] * 3, image_std=[0.3] * 3, do_convert_rgb=True,
    )  # fmt: skip
    words = tokenizer()
    return LlavaProcessor(
        pictures, words, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


def model(seed: int = 0, cell: int = CELL) -> LlavaForConditionalGeneration:
    """A `LlavaForConditionalGeneration` with random weights: 0.76 million parameters, 64 tokens per picture.

    >>> sum(p.numel() for p in model().parameters()) // 1000
    759
    """
    import torch

    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4, image_size=CELLS * cell,
        patch_size=PATCH, projection_dim=96,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=96, intermediate_size=288, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=SPECIAL.index("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(CELLS * cell // PATCH) ** 2,
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config)
    made.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return made


def pixels(pictures: list[np.ndarray]) -> Any:
    """What the processor makes of uint8 pictures of the right size, `[pictures, 3, height, width]`, but faster."""
    import torch

    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (stacked - 0.5) / 0.3
