"""ICD: what the model says when told to be confused counts against a word."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from vision_attn.mllm.contrast import Contrast, Step, contrast
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.reading import Reading


@dataclasses.dataclass(frozen=True)
class ICD(Contrast):
    """Instruction contrastive decoding: `(1 + alpha) z - alpha z'`, where `z'` are the logits after a disturbing
    instruction, with the same image.

    The instruction comes right after the last image, before the user's words. For InstructBLIP it goes before the
    words of the Q-Former, and the prompt of the text model stays. A second pass of the text model for every token.

    Args:
        instruction: its token ids, without special tokens: `tokenizer(INSTRUCTION, add_special_tokens=False).input_ids`
            with the sentence of the paper, or your own; for InstructBLIP from `processor.qformer_tokenizer`.
        alpha: weight, at least 0; 0 is the plain model, cut.
        beta: words less probable than this share of the best one are never said, 0 to 1.

    >>> ICD(instruction=(5, 6, 7)).alpha
    1.0

    Paper: Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding.
    """

    instruction: tuple[int, ...]
    alpha: float = 1.0
    beta: float = 0.1
    name: ClassVar[str] = "icd"

    INSTRUCTION: ClassVar[str] = (
        "You are a confused objects detector to provide a fuzzy overview or impression of the image."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "instruction", tuple(self.instruction))
        if not self.instruction or not all(isinstance(i, int) and i >= 0 for i in self.instruction):
            raise ValueError(
                f"ICD(instruction={self.instruction!r}): give token ids, as tokenizer(ICD.INSTRUCTION, "
                "add_special_tokens=False).input_ids does"
            )
        check_numbers(self, beta=(0, 1), alpha=(0, math.inf))

    def check(self, model: Any, family: Any) -> None:
        size = model.config.get_text_config().vocab_size
        if hasattr(model, "qformer"):
            size = model.config.qformer_config.vocab_size
        if max(self.instruction) >= size:
            raise ValueError(
                f"ICD: token {max(self.instruction)} of the instruction, and the vocabulary has {size}; tokenize it "
                "with the tokenizer of this model"
            )

    def other(self, reading: Reading) -> Reading:
        words = torch.tensor(self.instruction, device=reading.ids.device)
        if "inputs_embeds" not in reading.given:
            return reading.with_words(words)

        def disturbed(name: str, call: dict[str, Any]) -> dict[str, Any]:
            ids, mask = call["qformer_input_ids"], call.get("qformer_attention_mask")
            before = words.to(ids).expand(len(ids), -1)
            call["qformer_input_ids"] = torch.cat([before, ids], 1)
            if mask is not None:
                call["qformer_attention_mask"] = torch.cat([torch.ones_like(before).to(mask), mask], 1)
            return call

        return reading.with_images(disturbed)

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        return contrast(z, step.other, self.alpha, self.beta)
