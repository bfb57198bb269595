"""A prompt, and ways to read it otherwise: other pixels, no images, more words, fewer visual tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from vision_attn.hosts import AttachError
from vision_attn.mllm.tokens import Tokens, take, take_positions

PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")
BY_TOKEN = ("token_type_ids", "mm_token_type_ids", "inputs_embeds")  # arguments with one entry per token
Change = Callable[[str, dict[str, Any]], dict[str, Any]]  # name of a function, its arguments -> other arguments
STATE = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a prompt comes from.

    Args:
        engine: of the attached model.
        calls: what the images were encoded with: name of the function, its arguments.
        repeats: rows of the prompt per sample, more than 1 for beams and several answers.
    """

    engine: Any
    calls: dict[str, dict[str, Any]]
    repeats: int

    def visual(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool like `ids`: the placeholders of images and videos."""
        config = self.engine.model.config
        kinds = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return functools.reduce(torch.logical_or, [ids == kind for kind in kinds if kind is not None])

    def encode(self, change: Change, watched: bool = False) -> dict[str, Any]:
        """Encode the images again with changed arguments: modality -> output of the vision tower, for every sample.

        Args:
            change: what to encode.
            watched: methods that look into the tower see this too.
        """
        if not self.calls:
            raise AttachError(
                "a second branch needs the images, and they were not given to generate() with this prompt; pass "
                "pixel_values together with the whole prompt and a new cache"
            )
        base, found = self.engine.base, {}
        watch = None if watched else self.engine.watch
        if watch is not None:
            watch.inside = True  # it lets these images pass
        try:
            for name, call in self.calls.items():
                given = {**change(name, dict(call)), "return_dict": True}
                found[name.split("_")[1]] = getattr(base, name)(**given)
        finally:
            if watch is not None:
                watch.inside = False
        return found


@dataclasses.dataclass(frozen=True)
class Reading:
    """A left-padded batch of prompts, as a branch reads it.

    Args:
        source: where it comes from.
        ids: long `[rows, n]`.
        tokens: which of them are real, and which visual.
        positions: long `[rows, n]`, or `[axes, rows, n]`.
        given: the other arguments of the model, encoded images among them.
        prune: methods that drop tokens work on it, and keep what they keep in the main prompt.
    """

    source: Source
    ids: torch.Tensor
    tokens: Tokens
    positions: torch.Tensor
    given: dict[str, Any]
    prune: bool = True

    @staticmethod
    def of(source: Source, ids: torch.Tensor, kwargs: dict[str, Any]) -> Reading:
        """The prompt as `generate` reads it, from the ids and the other arguments."""
        mask = kwargs.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if valid.shape != ids.shape or not ids.shape[1]:
            raise AttachError("a second branch reads the whole prompt; give it as input_ids, with all earlier turns")
        positions = kwargs["position_ids"]
        positions = positions.expand(*positions.shape[:-2], *ids.shape)
        given = {name: value for name, value in kwargs.items() if name not in STATE}
        return Reading(source, ids, Tokens.of_prompt(valid, source.visual(ids)), positions, given)

    def arguments(self) -> dict[str, Any]:
        """What the model is called with, besides the ids."""
        return {
            **self.given,
            "attention_mask": None if self.tokens.whole else self.tokens.mask(),
            "position_ids": self.positions,
            "use_cache": True,
        }

    def _kept(self, keep: torch.Tensor) -> tuple[Reading, torch.Tensor]:
        """Only the tokens where `keep` (bool `[rows, n]`) is True, and where they stood; positions as they were."""
        tokens, index = self.tokens.kept(keep)
        given = dict(self.given)
        for name in BY_TOKEN:
            if given.get(name) is not None:
                given[name] = take(given[name], index, 1)
        ids = self.ids.gather(1, index) * tokens.valid  # no placeholder where there is padding
        tokens = Tokens.of_prompt(tokens.valid, tokens.visual)
        positions = take_positions(self.positions, index)
        return dataclasses.replace(self, ids=ids, tokens=tokens, positions=positions, given=given), index

    def without_images(self) -> Reading:
        """The words alone, their positions counted anew."""
        words, _ = self._kept(~self.tokens.visual)
        numbers = (words.tokens.valid.long().cumsum(1) - 1).clamp(min=0)
        given = {name: value for name, value in words.given.items() if name != "mm_encoder_outputs"}
        return dataclasses.replace(words, positions=numbers.expand(words.positions.shape), given=given)

    def with_images(self, change: Change, prune: bool = True) -> Reading:
        """Images encoded again from other arguments; without `prune` methods that drop tokens leave them alone."""
        engine, repeats = self.source.engine, self.source.repeats
        found = self.source.encode(change, watched=prune and engine.lender is None)
        if "inputs_embeds" in self.given:
            made = torch.cat(list(found["image"].pooler_output)).unflatten(0, (len(self.ids) // repeats, -1))
            embeds = self.given["inputs_embeds"]
            places = self.tokens.visual[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(places, made.repeat_interleave(repeats, 0).to(embeds.dtype))
            return dataclasses.replace(self, given={**self.given, "inputs_embeds": embeds}, prune=prune)
        if repeats > 1:
            found = engine.model._expand_multimodal_outputs(self.ids[::repeats], found, repeats)
        return dataclasses.replace(self, given={**self.given, "mm_encoder_outputs": found}, prune=prune)

    def with_fewer(self, found: dict[str, Any], spans: list[tuple[int, torch.Tensor]]) -> Reading:
        """Fewer tokens of every image.

        Args:
            found: the encoded images, those that stay.
            spans: for every image of the batch, or tile, in the order of the prompt: its tokens so far, and which of
                them stay, long, in their new order. Where positions count rows and columns each keeps its own.
        """
        engine, repeats = self.source.engine, self.source.repeats
        visual = self.tokens.visual[::repeats]
        rows, places = visual.nonzero(as_tuple=True)
        if sum(tokens for tokens, _ in spans) != len(rows):
            raise AttachError(
                f"the prompts have {len(rows)} tokens of images, and the images have {sum(n for n, _ in spans)}; give "
                "the images with the prompt, as the processor does"
            )
        keep = ~visual
        source = torch.arange(visual.shape[1], device=visual.device).repeat(len(visual), 1)
        at = 0
        for tokens, order in spans:
            row, place = int(rows[at]), places[at : at + tokens]
            keep[row, place[: len(order)]] = True
            source[row, place[: len(order)]] = place[order]
            at += tokens
        shorter, index = self._kept(keep.repeat_interleave(repeats, 0))
        positions = shorter.tokens.valid.long().cumsum(1).sub(1).clamp(min=0)
        if self.positions.ndim == 3:
            positions = take_positions(self.positions, source.repeat_interleave(repeats, 0).gather(1, index))
        if repeats > 1:
            found = engine.model._expand_multimodal_outputs(shorter.ids[::repeats], found, repeats)
        given = {**shorter.given, "mm_encoder_outputs": found}
        return dataclasses.replace(shorter, positions=positions, given=given, prune=False)

    def with_pixels(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Reading:
        """Other pixels; `change` gets the tensor that the processor made, of all images or videos of the batch."""

        return self.with_images(
            lambda name, call: {key: change(value) if key in PIXELS else value for key, value in call.items()}
        )

    def with_words(self, words: torch.Tensor) -> Reading:
        """More words, long `[n]`, right after the last image of every row and the tokens that close it."""
        ids, positions, given = [], [], {name: [] for name in BY_TOKEN if self.given.get(name) is not None}
        valid, visual = [], []
        count, length = len(words), self.ids.shape[1]
        for row in range(len(self.ids)):
            at = self._after_image(row)
            own = self.positions[..., row, :]
            first = own[..., at] if at < length else own.amax() + 1
            step = torch.arange(count, device=own.device)
            middle = torch.as_tensor(first, device=own.device)[..., None] + step
            positions.append(torch.cat([own[..., :at], middle.expand(*own.shape[:-1], -1), own[..., at:] + count], -1))
            ids.append(_insert(self.ids[row], at, words))
            valid.append(_insert(self.tokens.valid[row], at, torch.ones_like(words, dtype=torch.bool)))
            visual.append(_insert(self.tokens.visual[row], at, torch.zeros_like(words, dtype=torch.bool)))
            for name, rows in given.items():
                kind = self.given[name][row]
                rows.append(_insert(kind, at, kind.new_zeros(count, *kind.shape[1:])))
        return dataclasses.replace(
            self,
            ids=torch.stack(ids),
            tokens=Tokens.of_prompt(torch.stack(valid), torch.stack(visual)),
            positions=torch.stack(positions, -2),
            given={**self.given, **{name: torch.stack(rows) for name, rows in given.items()}},
        )

    def _after_image(self, row: int) -> int:
        """Column of the first token of a row after its last image; without an image, of its first real token."""
        visual = self.tokens.visual[row].nonzero()[:, 0]
        if not len(visual):
            return int(self.tokens.valid[row].int().argmax())
        at, config = int(visual[-1]) + 1, self.source.engine.model.config
        closing = {getattr(config, name, None) for name in ("vision_end_token_id", "eoi_token_index")}
        while at < self.ids.shape[1] and int(self.ids[row, at]) in closing:
            at += 1
        return at


def _insert(row: torch.Tensor, at: int, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:at], new.to(row.dtype), row[at:]])


def replace(owner: Any, name: str, wrapper: Callable) -> Callable[[], None]:
    """Put `wrapper(plain, ...)` in the place of a method of an instance; returns what undoes it."""
    plain = getattr(owner, name)
    had, own = name in vars(owner), vars(owner).get(name)
    # `generate` reads the signature to know which inputs were used, and `wraps` keeps it.
    vars(owner)[name] = functools.wraps(plain)(functools.partial(wrapper, plain))

    def undo() -> None:
        if had:
            vars(owner)[name] = own
        else:
            vars(owner).pop(name, None)

    return undo
