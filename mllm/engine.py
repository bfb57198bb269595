"""Drops visual tokens while a stock transformers model reads a prompt, and keeps masks and positions right afterwards.

Two forward pre-hooks do most of it: one on the multimodal model, which sees the ids of the prompt, and one on its text
model, which every family calls with `inputs_embeds`, a mask, positions and the cache. Cuts inside the text model add a
pre-hook on each layer (`cuts.py`). Nothing of the model is replaced but, for methods that look into the vision tower,
`get_image_features` of the instance (`towers.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vision_attn.hosts import AttachError
from vision_attn.mllm.around import Around, stand_around
from vision_attn.mllm.contrast import Contrast
from vision_attn.mllm.families import Family
from vision_attn.mllm.heads import Gains, HeadGain
from vision_attn.mllm.interface import PREFIX
from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune
from vision_attn.mllm.report import Read, cache_bytes, kv_bytes, prefill_flops
from vision_attn.mllm.selection import choose, watch_for
from vision_attn.mllm.steering import RowEdit, edit_rows
from vision_attn.mllm.tokens import Tokens, later_mask, real_tokens, same_visual, shorten, take, take_positions
from vision_attn.mllm.towers import TowerWatch


@dataclasses.dataclass
class Prompt:
    """What is known of a prompt since it was read.

    Args:
        length: columns of the prompt before anything was dropped, padding included.
        read: the tokens that entered the text model.
        tokens: the tokens that each layer worked on.
        cached: the tokens in the cache of each layer; as `tokens` but where the cache was shortened, and then `column`
            and `visual` are `[batch, kv_heads, n]`.
        compact: positions were renumbered.
        texts: real tokens of each row before anything was dropped, long `[batch]`.
        visual: visual tokens of each row before anything was dropped.
        seconds: host time spent on choosing what stays.
        asked: bool `[batch, length]`, the visual tokens before anything was dropped.
        real: bool `[batch, length]`, what is no padding.
        ids: long `[batch, length]`; None where the prompt came as embeddings.
        stored: layer -> bool `[batch, kv_heads, n]`, which of `tokens` its shortened cache holds.
        other_flops: of passes over the prompt besides the one that its cache comes from.
        remade: features were changed where tokens were dropped.
        later: tokens after the prompt in the cache, those of the running call included.
        notes: id of a method -> what it keeps as long as the prompt lives; and what is kept for all of them, by name.
    """

    length: int
    read: Tokens
    tokens: list[Tokens]
    cached: list[Tokens]
    compact: bool
    texts: torch.Tensor
    visual: list[int]
    seconds: float = 0.0
    asked: torch.Tensor | None = None
    real: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    stored: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    other_flops: float = 0.0
    remade: bool = False
    later: int = 0
    notes: dict[Any, Any] = dataclasses.field(default_factory=dict)


class Engine:
    """State and hooks of one attached model."""

    def __init__(self, model: Any, family: Family, methods: list[Any], positions: str, visual_mask: Any) -> None:
        self.model, self.family, self.positions = model, family, positions
        self.base = model.base_model
        self.text = getattr(self.base, family.text)
        self.config = model.config.get_text_config()
        self.count = len(model.get_decoder().layers)
        self.input = next((m for m in methods if isinstance(m, InputPrune)), None)
        self.layer = next((m for m in methods if isinstance(m, LayerPrune)), None)
        self.cache = next((m for m in methods if isinstance(m, CachePrune)), None)
        self.around = [m for m in methods if isinstance(m, Around)]
        self.rows = [m for m in methods if isinstance(m, RowEdit)]
        self.gains = [m for m in methods if isinstance(m, HeadGain)]
        self.preparing: list[Callable[[dict[str, Any]], None]] = []  # get the arguments of a call that reads a prompt
        self.textual = any(m.text for m in self.around)  # prompts without images matter too
        self.visual_mask = visual_mask
        self.prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()
        self.current: Prompt | None = None
        self.reading = False  # the current call of the text model reads a prompt
        self.prepared: Any = None  # the mask that was prepared outside of the text model, after shortening
        self.entered: torch.Tensor | None = None  # the embeddings that entered the text model
        self.watch: TowerWatch | None = None
        self.reads: deque[Read] = deque(maxlen=1000)
        self.contrast = next((m for m in methods if isinstance(m, Contrast) and m.contrasts), None)
        self.share = True  # a second branch keeps the visual tokens that the main one keeps
        self.branching = self.idle = False  # a second branch is running; and nothing is dropped from it
        self.lender: Prompt | None = None  # the main prompt, whose choice holds in the second branch
        self.ids = self._mask = None
        self.listens = False  # to the attention of the text model
        self._undo: list[Callable[[], None]] = []

    @property
    def compact(self) -> bool:
        """Tokens that stay are numbered anew."""
        return self.positions == "compact" or (
            self.positions == "auto" and self.input is not None and not self.family.mrope
        )

    def install(self) -> None:
        """Put the hooks in. What fails here has changed nothing once `uninstall` was called."""
        from vision_attn.mllm.cuts import Cuts

        self.before(self.model, self._refuse)
        self.before(self.base, self._see_prompt)
        self.before(self.text, self._enter_text)
        if self.layer is not None or self.cache is not None:
            Cuts(self).install()
        self.after(self.text, self._leave_text)
        if self.text is not self.model.get_decoder():  # it generates by itself, from embeddings
            self.before(self.model.get_input_embeddings(), self._see_ids)
        forget_compiled()
        self.watch = None if self.input is None else watch_for(self.input, self.base, self.family)
        if self.watch is not None:
            self.watch.install(self._undo)
        if self.rows:
            edit_rows(self, self.rows, self._undo)
        for method in self.gains:
            Gains(self, method).install()
        if self.around:
            stand_around(self, self.around, self._undo)
        if self.contrast is not None:
            from vision_attn.mllm.branch import Branches

            Branches(self, self.contrast).install(self._undo)
        self.listens = self.config._attn_implementation.startswith(PREFIX)

    def before(self, module: Any, hook: Callable) -> None:
        """Register a forward pre-hook that is taken out with the others."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: Any, hook: Callable) -> None:
        """Register a forward hook that is taken out with the others."""
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)

    def uninstall(self) -> None:
        """Take everything out again. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        forget_compiled()
        self.prompts = WeakKeyDictionary()
        self.current = self.prepared = self.entered = self.ids = self._mask = None

    def _refuse(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise AttachError(
                "labels cannot be used while tokens are dropped, which is for inference only; detach first"
            )

    def _see_prompt(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """On the multimodal model: remember where the images are."""
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        self._mask = mask if torch.is_tensor(mask) and mask.ndim == 2 else None
        self.ids = ids
        if ids is not None:
            return
        given = kwargs.get("inputs_embeds")
        if given is not None and given.shape[1] > 1 and self.visual_mask is None:
            raise AttachError(
                "with inputs_embeds there are no ids to find the images by; pass visual_mask= to attach, bool [batch, "
                "length], or call the model with input_ids"
            )

    def _see_ids(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input"]
        if ids.shape[1] > 1:
            self.ids = ids

    def shows(self, kind: str) -> torch.Tensor:
        """Bool `[batch, length]`: where the ids of the prompt stand for an "image" or a "video"."""
        token = getattr(self.model.config, f"{kind}_token_id", None)
        return torch.zeros_like(self.ids, dtype=torch.bool) if token is None else self.ids == token

    def _visual(self, shape: torch.Size) -> torch.Tensor | None:
        """Bool `[batch, length]`, or None for a call without images."""
        if self.ids is None:
            visual = None if self.visual_mask is None else _repeated(self.visual_mask, shape[0])
        else:
            self.ids = _repeated(self.ids, shape[0])
            visual = self.shows("image") | self.shows("video")
        if visual is None or visual.shape != shape or shape[1] == 1 or not visual.any():
            return None
        return visual

    def _refuse_mask(self, embeds: torch.Tensor | None) -> None:
        """In a prompt that is not the one `visual_mask` is for, images cannot be told."""
        mask = self.visual_mask
        if self.ids is not None or mask is None or embeds is None or embeds.shape[1] == 1 or self.branching:
            return
        if embeds.shape[1] != mask.shape[1] or len(embeds) % len(mask):
            raise AttachError(
                f"visual_mask is for prompts of shape {list(mask.shape)}, and this one has {list(embeds.shape[:2])}; "
                "attach again with the mask of each prompt"
            )

    def _enter_text(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """On the text model: drop what is to be dropped from a prompt, and mend mask and positions of later calls."""
        kwargs = dict(kwargs)
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        self.current = None if cache is None else self.prompts.get(cache)
        self.reading = False
        if self.idle:
            return args, kwargs
        if self.current is not None:
            self._go_on(self.current, cache, kwargs)
            return args, kwargs
        if self.listens and not self.config._attn_implementation.startswith(PREFIX):
            raise AttachError(
                f"attention was set to {self.config._attn_implementation!r} while methods that look into it were "
                "attached, so that they see nothing; detach first, set it, and attach again"
            )
        visual = None if embeds is None else self._visual(embeds.shape[:2])
        if visual is None and embeds is not None and self.textual and not self.branching:
            visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if visual is None:
            self._refuse_mask(embeds)
            return args, kwargs
        if cache is not None and cache.get_seq_length() > 0:
            raise AttachError(
                "this prompt continues a cache that other calls filled, as with prefill_chunk_size, where each part "
                "would be pruned by itself; give the whole prompt at once"
            )
        self.reading = True
        self._read(visual, kwargs)
        if cache is not None:
            self.prompts[cache] = self.current
        return args, kwargs

    def _read(self, visual: torch.Tensor, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"]
        valid = real_tokens(self._mask if self._mask is not None else kwargs.get("attention_mask"), visual)
        if (self.rows or self.gains) and not valid[:, -1].all():
            raise AttachError(
                "prompts end with padding, and the rows that are changed are those of the last words; pad on the left, "
                "as with tokenizer.padding_side = 'left'"
            )
        tokens = Tokens.of_prompt(valid, visual)
        layers = [tokens] * self.count
        texts, images = valid.sum(1), tokens.visual.sum(1).tolist()
        prompt = Prompt(visual.shape[1], tokens, layers, list(layers), self.compact, texts, images)
        self.current = prompt
        prompt.asked, prompt.real, prompt.ids = visual, valid, self.ids
        if kwargs.get("position_ids") is None:  # the text model would number the shortened prompt
            kwargs["position_ids"] = self._numbers(valid)
        if self.input is None:
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = tokens.mask()
        else:
            with self.choosing():
                keep, made = self.lent(tokens), embeds
                if keep is None:
                    keep, made = choose(self, tokens, embeds)
                prompt.remade, embeds = made is not embeds, made
            tokens, index = tokens.kept(keep)
            prompt.read, prompt.tokens, prompt.cached = tokens, [tokens] * self.count, [tokens] * self.count
            numbers = self._numbers(tokens.valid) if self.compact else take_positions(kwargs["position_ids"], index)
            kwargs |= {"inputs_embeds": take(embeds, index, 1), "position_ids": numbers}
            shorten(kwargs, index, tokens, self.config)
            if kwargs.get("deepstack_visual_embeds") is not None:
                stays = keep[visual]
                kwargs["deepstack_visual_embeds"] = [part[stays] for part in kwargs["deepstack_visual_embeds"]]
                kwargs["visual_pos_masks"] = tokens.visual
        self.prepared, self.entered = kwargs["attention_mask"], kwargs["inputs_embeds"]
        if not self.branching:
            for prepare in self.preparing:
                prepare(kwargs)

    def lent(self, tokens: Tokens, layer: int | None = None) -> torch.Tensor | None:
        """Bool `[batch, n]`: in a second branch, the `tokens` that the main prompt kept, at a layer or on entry; None
        where the choice is its own."""
        if self.lender is None:
            return None
        kept = self.lender.read if layer is None else self.lender.tokens[layer]
        return same_visual(kept, self.lender.asked, tokens, self.current.asked) | (tokens.valid & ~tokens.visual)

    def lent_heads(self, tokens: Tokens, layer: int, keep: torch.Tensor) -> torch.Tensor:
        """What the cache of a layer is to hold, bool `[batch, kv_heads, n]`: `keep`, or in a second branch what that of
        the main prompt holds."""
        if self.lender is not None:
            theirs, mine = self.lender.tokens[layer], self.current.asked
            held = (self.lender.stored[layer] & theirs.visual[:, None]).unbind(1)
            heads = [dataclasses.replace(theirs, visual=visual) for visual in held]
            words = tokens.valid & ~tokens.visual
            keep = torch.stack([same_visual(head, self.lender.asked, tokens, mine) | words for head in heads], 1)
        self.current.stored[layer] = keep
        return keep

    @contextlib.contextmanager
    def choosing(self) -> Iterator[None]:
        """Count the time of what happens inside as spent on choosing tokens."""
        start = time.perf_counter()
        yield
        self.current.seconds += time.perf_counter() - start

    def _leave_text(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """On the text model: note what was read."""
        prompt = self.current
        if prompt is None or not self.reading or self.branching:
            return
        rows, last, cache = len(prompt.visual), prompt.tokens[-1], used_cache(kwargs, output)
        if cache is not None:
            self.prompts[cache] = prompt
        self.reads.append(
            Read(
                rows=rows,
                visual=prompt.visual,
                kept=last.visual.sum(1).tolist(),
                tokens=[len(tokens) for tokens in prompt.tokens],
                length=prompt.length,
                padded=1 - last.valid.float().mean().item(),
                flops=rows * prefill_flops(self.config, [len(tokens) for tokens in prompt.tokens]),
                stock_flops=rows * prefill_flops(self.config, [prompt.length] * self.count),
                other_flops=prompt.other_flops,
                cache=0 if cache is None else cache_bytes(cache),
                stock_cache=0 if cache is None else rows * kv_bytes(self.config, prompt.length, self.entered.dtype),
                select_seconds=prompt.seconds,
            )
        )

    def read_besides(self, rows: int, tokens: list[int], noted: bool = False) -> None:
        """Count another pass over the current prompt, of so many rows, and tokens in each layer.

        Args:
            noted: the prompt was read, and is in the report.
        """
        flops = rows * prefill_flops(self.config, tokens)
        if noted:
            self.reads[-1] = dataclasses.replace(self.reads[-1], other_flops=self.reads[-1].other_flops + flops)
        else:
            self.current.other_flops += flops

    def _numbers(self, valid: torch.Tensor) -> torch.Tensor:
        """Positions counted from the first real token of each row."""
        return (valid.long().cumsum(1) - 1).clamp(min=0) + self.family.first_position

    def _go_on(self, prompt: Prompt, cache: Any, kwargs: dict[str, Any]) -> None:
        """A later call with the cache of a prompt: generated tokens, or another turn."""
        embeds = kwargs.get("inputs_embeds")
        tokens, new = prompt.cached[0], (kwargs["input_ids"] if embeds is None else embeds).shape[1]
        after = cache.get_seq_length() - tokens.valid.shape[1]  # tokens in the cache that followed the prompt
        positions = kwargs.get("position_ids")
        if positions is not None and new > 1:
            # With a shortened cache, `generate` takes the end of the prompt for new, and feeds it again.
            text = positions if positions.ndim == 2 else positions[0]
            if positions.ndim == 3 and len(positions) < 4:  # no row of text positions: they are these less an offset
                text = text - self.base.rope_deltas
            again = int(prompt.texts.max()) + self.family.first_position + after - int(text[:, 0].max())
            if again > 0:
                if prompt.compact:
                    raise AttachError(
                        "a pruned cache cannot be continued with renumbered positions; start a new cache, or attach "
                        "with positions='original'"
                    )
                kwargs["inputs_embeds"] = kwargs["inputs_embeds"][:, again:]
                kwargs["position_ids"] = positions = positions[..., again:]
                new -= again
            visual = self._visual(text.shape)
            if visual is not None and visual[:, max(again, 0) :].any():
                raise AttachError(
                    "a later part of a prompt has images, as with prefill_chunk_size or in another turn; each part "
                    "would be pruned by itself, so give the whole prompt at once"
                )
        if prompt.compact or positions is None:
            first = (prompt.read.valid.sum(1) if prompt.compact else prompt.texts)[:, None] + after
            step = torch.arange(new, device=first.device)
            kwargs["position_ids"] = first + step + self.family.first_position
        prompt.later = after + new
        kwargs["attention_mask"] = later_mask(kwargs.get("attention_mask"), tokens, after, new)


def forget_compiled() -> None:
    """Drop what torch.compile made: it does not look whether modules got hooks since, and would go on without them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` seen before `generate` repeated them for beams and several answers."""
    return rows if count % len(rows) else rows.repeat_interleave(count // len(rows), 0)


def used_cache(kwargs: dict[str, Any], output: Any) -> Any:
    """The cache of a call of the text model, which makes one where it gets none; None without."""
    given = kwargs.get("past_key_values")
    return getattr(output, "past_key_values", None) if given is None else given
