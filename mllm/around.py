"""Methods that stand around the attention of a layer and see all of its rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from vision_attn.mllm.grids import Grid
from vision_attn.mllm.interface import Compute, listen, switch
from vision_attn.mllm.method import CachePrune, Method
from vision_attn.mllm.pictures import Pictures
from vision_attn.mllm.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one attention layer.

    Args:
        layer: from 0.
        prompt: what is known of the prompt.
        reading: it is being read; otherwise what follows it.
        columns: long `[batch, 1 or kv_heads, keys]`, which column each key is: of the padded prompt, and on from there
            for what follows it; -1 for padding, and where a static cache is empty.
        mask: as the attention gets it.
        scale: of the scores.
        compute: `(q, k, v, mask) -> [batch, queries, heads, head_dim]`, what happens without the method.
        notes: the method's own, as long as the prompt lives.
        views: of the pictures while the prompt is read, for methods that want `grids`.
    """

    layer: int
    prompt: Any
    reading: bool
    columns: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    compute: Compute
    notes: dict[Any, Any]
    views: Sequence[Grid] = ()

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, rows, length]` over columns from `[batch, heads, rows, keys]`; 0 where there is no key."""
        length = self.prompt.length + (0 if self.reading else self.prompt.later)
        columns = self.columns.repeat_interleave(x.shape[1] // self.columns.shape[1], 1)
        index = columns.masked_fill(columns < 0, length)[:, :, None].expand(x.shape)
        return x.new_zeros(*x.shape[:-1], length + 1).scatter(-1, index, x)[..., :length]

    def at_keys(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, rows, keys]` from `[batch, heads, rows, length]` over columns; 0 where there is no key."""
        columns = self.columns.repeat_interleave(x.shape[1] // self.columns.shape[1], 1)[:, :, None]
        index = columns.masked_fill((columns < 0) | (columns >= x.shape[-1]), x.shape[-1])
        return F.pad(x, (0, 1)).gather(-1, index.expand(*x.shape[:-1], -1))

    def image(self) -> torch.Tensor:
        """Bool `[batch, 1, 1, length]` over columns: the visual tokens that are still there, in any head."""
        there = self.spread(torch.ones_like(self.columns, dtype=torch.float32)[:, :, None]).amax(1) > 0
        asked = F.pad(self.prompt.asked, (0, there.shape[-1] - self.prompt.length))
        return (there & asked[:, None])[:, None]


@dataclasses.dataclass(frozen=True)
class Around(Method):
    """Computes the attention of some layers in another way, for prompts with and without images."""

    text: ClassVar[bool] = True
    anew: ClassVar[bool] = False  # computes rows by itself, so that what is done to them before is lost
    grids: ClassVar[bool] = False  # it wants to know where the tokens lie in their pictures

    def where(self, layers: int) -> tuple[int, ...]:
        """The layers, of so many, that it stands around."""
        raise NotImplementedError

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`[batch, queries, heads, head_dim]` from queries `[batch, heads, queries, head_dim]` and keys and values
        `[batch, kv_heads, keys, head_dim]`."""
        raise NotImplementedError


def stand_around(engine: Any, methods: list[Around], undo: list[Callable[[], None]]) -> None:
    """Put methods around the attention of the text model. They are silent while a second branch runs."""
    methods = sorted(methods, key=lambda method: not method.anew)  # these inside, the others see what they do
    edits = [method.name for method in (*engine.rows, *methods[1:]) if getattr(method, "anew", True)]
    if engine.cache is not None and type(engine.cache).attend is not CachePrune.attend:
        edits.append(engine.cache.name)
    if edits and methods[0].anew:
        raise ValueError(
            f"{type(methods[0]).__name__} computes rows of attention anew, and {', '.join(edits)} would edit the same "
            "ones; attach one of them"
        )
    undo.append(switch(engine.config))
    modules = [layer.self_attn for layer in engine.model.get_decoder().layers]
    pictures = Pictures(engine, undo) if any(method.grids for method in methods) else None

    def attention(method: Around, layer: int, module: Any, q, k, v, mask, scale: float, compute: Compute):
        prompt = engine.current
        if prompt is None or engine.branching:
            return compute(q, k, v, mask)
        columns = key_columns(prompt, layer, k.shape[2], engine.reading)
        notes = prompt.notes.setdefault(id(method), {})
        views = pictures.views(prompt) if method.grids and engine.reading else ()
        call = Call(layer, prompt, engine.reading, columns, mask, scale, compute, notes, views)
        return method.attend(call, q, k, v)

    for method in methods:
        for layer in method.where(len(modules)):
            undo.append(listen(modules[layer], functools.partial(attention, method, layer)))


def key_columns(prompt: Any, layer: int, keys: int, reading: bool) -> torch.Tensor:
    """Long `[batch, 1 or kv_heads, keys]`: which column each key of a layer is, as in `Call`."""
    tokens, later = (prompt.tokens[layer], 0) if reading else (prompt.cached[layer], prompt.later)
    column = token_columns(tokens)
    after = torch.arange(prompt.length, prompt.length + later, device=column.device)
    column = torch.cat([column, after.expand(*column.shape[:2], -1)], -1)
    gone = max(column.shape[-1] - keys, 0)  # from a sliding window
    return F.pad(column[..., gone:], (0, keys - column.shape[-1] + gone), value=-1)


def token_columns(tokens: Tokens) -> torch.Tensor:
    """Long `[batch, 1 or kv_heads, n]`: the column of each token of a prompt, -1 for padding."""
    column, valid = (x if x.ndim == 3 else x[:, None] for x in (tokens.column, tokens.valid))
    return column.masked_fill(~valid, -1)


def check_layers(name: str, layers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """The layers a method names, or all of `count`.

    Raises:
        ValueError: a layer that is not there.
    """
    if layers is None:
        return tuple(range(count))
    bad = [layer for layer in layers if not isinstance(layer, int) or not 0 <= layer < count]
    if bad:
        raise ValueError(f"{name}: layer {bad[0]!r}; the text model has layers 0 to {count - 1}")
    return tuple(layers)
