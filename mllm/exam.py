"""What a model of the shapes world is asked: POPE's questions and captions of pictures whose truth is known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vision_attn.mllm import tiny
from vision_attn.mllm.mentions import Chair
from vision_attn.mllm.metrics import SPLITS, Question, pope_questions, says_yes
from vision_attn.shapes.crowd import CELL, CELLS, CONTEXTS, KINDS, Crowd, describe, draw_crowd, sample_crowd

Look = Callable[[np.ndarray, str], np.ndarray]
CHAIR = Chair([kind] for kind in KINDS)
LONGEST = 48  # tokens of a caption; seven things take 37


@dataclasses.dataclass(frozen=True)
class Exam:
    """Pictures and what is asked of them.

    Args:
        crowds: what is in each picture.
        pictures: uint8 `[height, width, 3]` each.
        splits: split of POPE -> its questions, of the pictures with at least three things; `image` is the number of a
            picture. Anchors, always there and clear to see, are asked last.
    """

    crowds: list[Crowd]
    pictures: list[np.ndarray]
    splits: dict[str, list[Question]]

    @property
    def questions(self) -> list[Question]:
        """The questions of all splits, each once."""
        return list(dict.fromkeys(question for split in self.splits.values() for question in split))

    @property
    def truth(self) -> list[set[str]]:
        """Names of the things in each picture."""
        return [{KINDS[kind] for kind in crowd.kinds} for crowd in self.crowds]


@functools.cache
def exam(images: int = 100, partners: float = 0.5, seed: int = 1000, cell: int = CELL) -> Exam:
    """Draw an exam.

    Args:
        images: how many pictures.
        partners: probability of each partner of an anchor, 0 to 1; models learn from pictures with 0.8.
        seed: of everything; pictures of a larger `cell` show the same things.

    >>> drawn = exam(images=20)
    >>> [question.text for question in drawn.splits["adversarial"][:2]]
    ['Is there a red circle in the image?', 'Is there a blue bar in the image?']
    """
    crowds = [sample_crowd(np.random.default_rng((seed, i)), partners) for i in range(images)]
    pictures = [draw_crowd(crowd, np.random.default_rng((seed, i, 1)), cell) for i, crowd in enumerate(crowds)]
    shown = {i: _asked(crowd) for i, crowd in enumerate(crowds)}
    return Exam(crowds, pictures, {split: pope_questions(shown, split, seed=seed) for split in SPLITS})


def _asked(crowd: Crowd) -> list[str]:
    """Things in the order in which they are asked for: partners, things without a context, the anchor."""
    context = [] if crowd.context is None else CONTEXTS[crowd.context].tolist()
    rank = {kind: 2 if context[:1] == [kind] else 0 if kind in context else 1 for kind in crowd.kinds}
    return [KINDS[kind] for kind in sorted(crowd.kinds, key=lambda kind: rank[kind])]


def blind(drawn: Exam) -> dict[str, Any]:
    """The answers of a rule that knows the context of a picture and sees nothing: what usually comes, is there."""
    usual = [{KINDS[kind] for kind in CONTEXTS[crowd.context]} for crowd in drawn.crowds]
    said = [question.object in usual[question.image] for question in drawn.questions]
    captions = []
    for crowd in drawn.crowds:
        kinds = CONTEXTS[crowd.context].tolist()
        captions.append(describe(Crowd(dict(enumerate(kinds)), {}, crowd.context)))
    return {"said": said, "margins": [float(yes) for yes in said], "captions": captions}


class Student:
    """A model that takes exams, with whatever is attached to it at that time.

    Args:
        model: a `LlavaForConditionalGeneration` with the words of `tiny.tokenizer`.
        batch: prompts at once.
    """

    def __init__(self, model: Any, batch: int = 50) -> None:
        self.model, self.batch, self.words = model, batch, tiny.tokenizer()
        vision = model.config.vision_config
        self.tokens = (vision.image_size // vision.patch_size) ** 2
        self.cell = vision.image_size // CELLS
        self.yes, self.no = self.words.convert_tokens_to_ids(["yes", "no"])

    def inputs(self, pictures: Sequence[np.ndarray], questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Arguments of `generate` for one question per picture."""
        texts = [tiny.prompt(question).replace("<image>", "<image> " * self.tokens) for question in questions]
        read = self.words(texts, return_tensors="pt", padding=True)
        dtype, device = next(self.model.parameters()).dtype, self.model.device
        ids, mask = read.input_ids.to(device), read.attention_mask.to(device)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny.pixels(pictures).to(device, dtype)}

    def _batches(
        self, pictures: list[np.ndarray], questions: list[str], look: Look | None
    ) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(questions), self.batch):
            part = slice(start, start + self.batch)
            shown = pictures[part] if look is None else list(map(look, pictures[part], questions[part]))
            yield self.inputs(shown, questions[part])

    def generate(self, inputs: dict[str, torch.Tensor], new: int, **options: Any) -> Any:
        """Greedy decoding of at most `new` tokens."""
        return self.model.generate(**inputs, do_sample=False, max_new_tokens=new, **options)

    def answer(self, drawn: Exam, look: Look | None = None) -> tuple[list[bool], list[float]]:
        """For each of `drawn.questions`, whether the answer is yes, and by how much: the logit of yes less that of no.

        Both are read off the scores from which the first token is chosen, so a second branch counts, and so does
        what rules tokens out; where both have a logit of minus infinity the margin is 0. `look` makes the picture that
        a question is answered from.
        """
        asked = drawn.questions
        texts = [tiny.ask(KINDS.index(question.object)) for question in asked]
        said, margins = [], []
        for inputs in self._batches([drawn.pictures[question.image] for question in asked], texts, look):
            out = self.generate(inputs, 1, output_scores=True, return_dict_in_generate=True)
            scores = out.scores[0].float()
            margins += (scores[:, self.yes] - scores[:, self.no]).nan_to_num(0, torch.inf, -torch.inf).tolist()
            said += [says_yes(text) for text in self.words.batch_decode(out.sequences[:, -1:])]
        return said, margins

    def caption(self, drawn: Exam, look: Look | None = None) -> list[str]:
        """A caption of every picture."""
        found = []
        for inputs in self._batches(drawn.pictures, [tiny.DESCRIBE] * len(drawn.pictures), look):
            out = self.generate(inputs, LONGEST)[:, inputs["input_ids"].shape[1] :]
            found += self.words.batch_decode(out, skip_special_tokens=True)
        return found
