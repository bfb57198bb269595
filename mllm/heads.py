"""Heads made louder or softer, by what they say with the image and what they say without it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.method import Method
from vision_attn.mllm.steering import unseen
from vision_attn.mllm.tokens import shorten, take


@dataclasses.dataclass(frozen=True)
class HeadGain(Method):
    """Multiplies the outputs of heads by numbers that are fixed when the prompt is read."""

    last: ClassVar[int] = 1  # tokens at the end of the prompt whose head outputs it wants
    lockstep: ClassVar[bool] = False  # the words alone are read with the same gains in the layers before

    def layers_of(self, layers: int, family: str) -> tuple[int, ...]:
        """The layers, of so many in a family of that name, whose heads it wants."""
        raise NotImplementedError

    def gains(self, layer: int, pictured: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """`[batch, heads]` from the head outputs `[batch, last, heads, head_dim]` of the last tokens of the prompt,
        with the image and without. Rows without an image get 1."""
        raise NotImplementedError


class Gains:
    """The hooks of such a method: on what enters the output projection of its layers."""

    def __init__(self, engine: Any, method: HeadGain) -> None:
        self.engine, self.method = engine, method
        self.decoder = engine.model.get_decoder()
        self.layers = method.layers_of(len(self.decoder.layers), engine.family.name)
        self.calls: dict[int, tuple[tuple, dict[str, Any]]] = {}  # what layers get with the words alone, besides states
        self.words: dict[int, torch.Tensor] = {}  # head outputs of the words alone, at their last tokens
        self.at, self.hidden = 0, torch.empty(0)  # the words alone, as they enter a layer
        self.pictured: torch.Tensor | None = None  # head outputs with the image, while the words alone are in a layer
        self.gain = torch.empty(0)  # of the last layer that was decided

    def install(self) -> None:
        for number in self.layers:
            projection = self.decoder.layers[number].self_attn.o_proj
            self.engine.before(projection, functools.partial(self._project, number))
        self.engine.preparing.append(self._read_words)

    def _read_words(self, kwargs: dict[str, Any]) -> None:
        """Read the words of the prompt alone, from the arguments of the text model."""
        prompt = self.engine.current
        self.calls, self.words = {}, {}
        if not any(prompt.visual):
            return
        tokens, index = prompt.read.kept(~prompt.read.visual)
        numbers = self.engine._numbers(tokens.valid)
        given = {
            "inputs_embeds": take(kwargs["inputs_embeds"], index, 1),
            "position_ids": numbers.expand(*kwargs["position_ids"].shape[:-2], *numbers.shape),
            "attention_mask": kwargs["attention_mask"],
            "use_cache": False,
        }
        shorten(given, index, tokens, self.engine.config)
        handles = []
        for number in range(self.layers[0], len(self.decoder.layers)):
            layer = self.decoder.layers[number]
            handles.append(layer.register_forward_pre_hook(self._note_call(number), with_kwargs=True))
            if number in self.layers:
                handles.append(layer.self_attn.o_proj.register_forward_pre_hook(self._note_heads(number)))
        try:
            with unseen(self.engine):
                self.decoder(**given)
        finally:
            for handle in handles:
                handle.remove()
        self.at, count = self.layers[0], len(self.decoder.layers)
        self.engine.read_besides(len(index), [len(tokens)] * count)
        if self.method.lockstep:  # the layers with gains once more
            again = range(self.at, self.layers[-1] + 1)
            self.engine.read_besides(len(index), [len(tokens) * (number in again) for number in range(count)])

    def _note_call(self, number: int) -> Callable[..., None]:
        def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if number == self.layers[0]:
                self.hidden = hidden
            self.calls[number] = args[1:], {name: x for name, x in kwargs.items() if name != "hidden_states"}

        return note

    def _note_heads(self, number: int) -> Callable[..., None]:
        def note(module: Any, args: tuple) -> None:
            self.words[number] = self._last(number, args[0])

        return note

    def _last(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return self._heads(number, x[:, -self.method.last :])

    def _heads(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.decoder.layers[number].self_attn.head_dim))

    def _project(self, number: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before an output projection, `[batch, n, heads * head_dim]`."""
        engine, prompt, x = self.engine, self.engine.current, args[0]
        if self.pictured is not None:
            gain = self.gain = self.method.gains(number, self.pictured, self._last(number, x))
        elif prompt is None or engine.branching or not any(prompt.visual):
            return None
        else:
            notes = prompt.notes.setdefault(id(self.method), {})
            if engine.reading:
                images = torch.tensor(prompt.visual, device=x.device)[:, None] > 0
                notes[number] = torch.where(images, self._decide(number, self._last(number, x)), 1.0)
            gain = notes[number]
        return ((self._heads(number, x) * gain[:, None, :, None].to(x.dtype)).flatten(-2), *args[1:]), kwargs

    def _decide(self, number: int, pictured: torch.Tensor) -> torch.Tensor:
        """Gains of a layer, `[batch, heads]`."""
        if not self.method.lockstep:
            return self.method.gains(number, pictured, self.words[number])
        self.pictured = pictured
        try:
            with unseen(self.engine):
                for at in range(self.at, number + 1):
                    args, kwargs = self.calls[at]
                    out = self.decoder.layers[at](self.hidden, *args, **kwargs)
                    self.hidden = out if torch.is_tensor(out) else out[0]
        finally:
            self.pictured = None
        self.at = number + 1
        return self.gain
