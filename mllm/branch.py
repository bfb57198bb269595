"""Second branches: beside the main one, the same prompt is read in another way, and both logits make the next token.

A logits processor stands before all others, so that samplers, beams and penalties work on what comes of both.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vision_attn.hosts import AttachError
from vision_attn.mllm.contrast import Contrast, Step
from vision_attn.mllm.reading import Reading, Source, replace


class Branch:
    """One more reading of a prompt, with a cache of its own.

    Args:
        engine: of the attached model.
        reading: the prompt, read in another way.
        lender: what the engine knows of the main prompt, whose visual tokens are kept here too; None to choose again.
        active: bool `[rows]`, the main prompt has an image.
    """

    def __init__(self, engine: Any, reading: Reading, lender: Any, active: torch.Tensor) -> None:
        self.engine, self.reading, self.lender, self.active = engine, reading, lender, active
        self.given = reading.arguments()
        self.cache = self.given["past_key_values"] = DynamicCache(config=engine.config)
        self.ids: torch.Tensor | None = None  # what the main branch held when this one last read
        self.order: torch.Tensor | None = None  # long `[rows]`, where its rows stood before, if beams traded places

    @property
    def prompt(self) -> Any:
        """What the engine knows of this reading."""
        return self.engine.prompts[self.cache]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 `[rows, vocabulary]` after the prompt and what the main branch generated since: `ids` `[rows, n]`."""
        model = speaker(self.engine)
        with aside(self.engine, self.reading, self.lender):
            if self.ids is None:
                new, given = self.reading.ids, self.given
                inputs = model.prepare_inputs_for_generation(new, is_first_iteration=True, **given)
            else:
                self.order = self._order(ids)
                if self.order is not None:
                    self.cache.reorder_cache(self.order)
                count = ids.shape[1] - self.ids.shape[1]
                self.given = model._update_model_kwargs_for_generation({}, self.given, num_new_tokens=count)
                inputs = model.prepare_inputs_for_generation(
                    ids, next_sequence_length=count, is_first_iteration=count > 1, **self.given
                )
            out = model(**inputs, return_dict=True)
            read = self.engine.current
        if self.ids is None and self.engine.current is not None:
            whole = self.cache.get_seq_length()  # of what no method drops tokens from
            layers = [whole] * self.engine.count if read is None else list(map(len, read.tokens))
            self.engine.read_besides(len(ids), layers, noted=True)
        for name in ("mm_encoder_outputs", "inputs_embeds"):  # they are in the cache now
            self.given.pop(name, None)
        self.ids = ids.clone()
        return out.logits[:, -1].float()

    def peek(self, tokens: torch.Tensor) -> None:
        """Read one more token per row, long `[rows]`, for methods that look on, and forget it."""
        model, ids = speaker(self.engine), torch.cat([self.ids, tokens[:, None]], 1)
        with aside(self.engine, self.reading, self.lender):
            given = model._update_model_kwargs_for_generation({}, dict(self.given))
            given["past_key_values"] = cache = _branched_off(self.cache)
            self.engine.prompts[cache] = self.prompt
            inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, is_first_iteration=False, **given)
            model(**inputs, return_dict=True)

    def _order(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Where the rows of `ids` stood when last read, or None: beams trade places, within a sample, unseen."""
        before = self.ids
        if ids.shape[1] <= before.shape[1]:
            raise AttachError(
                "a second branch was asked for tokens it has read; assisted decoding and prompt lookup cannot be used "
                "with contrastive methods"
            )
        if torch.equal(ids[:, : before.shape[1]], before):
            return None
        same = (ids[:, None, : before.shape[1]] == before[None]).all(-1)
        sample = torch.arange(len(ids), device=ids.device) // self.reading.source.repeats
        same &= sample[:, None] == sample
        if not same.any(1).all():
            raise AttachError(
                "a second branch cannot follow: what is generated does not continue what was; assisted decoding and "
                "prompt lookup cannot be used with contrastive methods"
            )
        return same.int().argmax(1)


def _branched_off(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from this one and leaves it as it is: layers put what comes into new tensors."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise AttachError(f"a method that looks at candidates cannot go on from a {type(layer).__name__}")
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


class Branches:
    """What stands between a model and the choice of its next token, for one method."""

    def __init__(self, engine: Any, method: Contrast) -> None:
        self.engine, self.method = engine, method
        self.calls: dict[str, tuple[dict[str, Any], Any]] = {}  # of this generation, until its processor is made
        self.inside = False  # some models give videos to their own function for images
        self.kept: WeakKeyDictionary[Any, Branch] = WeakKeyDictionary()  # for another turn, by the main cache
        self.early: dict[int, torch.Tensor] = {}  # what enters some layers, at the last token

    def install(self, undo: list[Callable[[], None]]) -> None:
        engine = self.engine
        for name in ("get_image_features", "get_video_features"):
            if hasattr(engine.base, name):
                undo.append(replace(engine.base, name, functools.partial(self._encode, name)))
        undo.append(replace(speaker(engine), "_get_logits_processor", self._processors))
        self.method.watch(engine, undo)
        layers = engine.model.get_decoder().layers
        self.layers = self.method.early(len(layers), engine.model)
        for number in self.layers:
            engine.before(layers[number], functools.partial(self._see_layer, number))

    def _encode(self, name: str, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        """`get_image_features`, noting what it is called with and what it gives."""
        if self.engine.branching or self.inside:
            return plain(*args, **kwargs)
        self.inside = True
        try:
            out = plain(*args, **kwargs)
        finally:
            self.inside = False
        bound = inspect.signature(plain).bind(*args, **kwargs).arguments
        self.calls[name] = {**bound, **bound.pop("kwargs", {})}, out
        return out

    def _processors(self, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(plain).bind(*args, **kwargs).arguments
        config, given = bound["generation_config"], bound.get("model_kwargs") or {}
        if config.prompt_lookup_num_tokens is not None:
            raise AttachError(
                f"{type(self.method).__name__} cannot be used with prompt lookup: the tokens that it guesses would be "
                "read by one branch only; leave prompt_lookup_num_tokens out"
            )
        processors = plain(*args, **kwargs)
        encoded = given.get("mm_encoder_outputs") or {}  # others than those noted may have been given to generate()
        calls = {
            name: call
            for name, (call, out) in self.calls.items()
            if not encoded or encoded.get(name.split("_")[1]) is out
        }
        self.calls = {}
        repeats = max(config.num_beams or 1, config.num_return_sequences or 1)
        source = Source(self.engine, calls, repeats)
        processors.insert(0, _Processor(self, source, dict(given), beams=(config.num_beams or 1) > 1))
        return processors

    def _see_layer(self, number: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.engine.branching:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.early[number] = hidden[:, -1:].detach()


class _Processor(LogitsProcessor):
    def __init__(self, branches: Branches, source: Source, given: dict[str, Any], beams: bool) -> None:
        self.branches, self.source, self.given, self.beams = branches, source, given, beams
        self.branch: Branch | None = None
        self.active: torch.Tensor | None = None  # bool `[rows]`, those to change
        self.start = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        method, z = self.branches.method, scores.float()
        if self.active is None:
            self._begin(input_ids)
        if not self.active.any():
            return scores
        other = None if self.branch is None else self.branch.logits(input_ids).to(z.device)
        seen, self.branches.early = self.branches.early, {}
        if self.branches.layers and not seen:
            raise AttachError(
                f"{type(method).__name__} looks into the model once per token, and several were guessed at once; "
                "assisted decoding cannot be used with contrastive methods"
            )
        early = {number: speak(self.branches.engine, hidden) for number, hidden in seen.items()}
        step = Step(input_ids.shape[1] - self.start + 1, other, early, self.branch)
        mixed = method.combine(z, step)
        if self.beams:  # beams are compared by log-probability
            mixed = mixed.log_softmax(-1)
        return torch.where(self.active[:, None].to(z.device), mixed, z).to(scores.dtype)

    def _begin(self, ids: torch.Tensor) -> None:
        """Read the prompt in the other way, or go on from the turn before."""
        branches, engine, cache = self.branches, self.branches.engine, self.given.get("past_key_values")
        self.start = ids.shape[1]
        if branches.method.text:
            self.active = torch.ones_like(ids[:, 0], dtype=torch.bool)
            return
        self.branch = None if cache is None else branches.kept.get(cache)
        if self.branch is not None:
            self.active = self.branch.active
            return
        reading = Reading.of(self.source, ids, self.given)
        self.active = reading.tokens.visual.any(1)
        if not self.active.any():
            return
        prompt = engine.current
        lender = prompt if engine.share and prompt is not None and not prompt.remade else None
        with aside(engine, reading, lender):
            other = branches.method.other(reading)
        self.branch = Branch(engine, other, lender, self.active)
        if cache is not None:
            branches.kept[cache] = self.branch


def speaker(engine: Any) -> Any:
    """The model whose `generate` makes the tokens: InstructBLIP hands that to its text model."""
    return engine.text if hasattr(engine.text, "_get_logits_processor") else engine.model


def speak(engine: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 `[rows, vocabulary]` if the model ended with these states `[rows, 1, width]`."""
    logits = engine.model.get_output_embeddings()(engine.model.get_decoder().norm(hidden))[:, -1].float()
    softcap = getattr(engine.config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


@contextlib.contextmanager
def aside(engine: Any, reading: Reading, lender: Any) -> Iterator[None]:
    """While a second branch runs: methods know it by `engine.branching`; afterwards all is as it was.

    Qwen models keep an offset of positions between calls, so that is put back too.
    """
    names = ("current", "reading", "prepared", "entered", "ids", "_mask", "branching", "idle", "lender")
    before = {name: getattr(engine, name) for name in names}
    offset = getattr(engine.base, "rope_deltas", None)
    engine.branching, engine.idle, engine.lender = True, not reading.prune, lender
    try:
        yield
    finally:
        vars(engine).update(before)
        if hasattr(engine.base, "rope_deltas"):
            engine.base.rope_deltas = offset
