"""Steering: rows of attention are changed before or after the softmax, and heads are made louder.

The kernel of the model computes every row. Methods that edit rows get the scores of those rows alone, recomputed from
queries and keys, and what comes of them is put in place: the cost is that of the rows, never of a map of all pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vision_attn.mllm.around import token_columns
from vision_attn.mllm.interface import Compute, listen, switch
from vision_attn.mllm.method import Method
from vision_attn.mllm.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some last rows of one call of one attention layer.

    Args:
        layer: from 0.
        layers: how many the text model has.
        prompt: what is known of the prompt.
        reading: it is being read; otherwise what follows it.
        tokens: of the prompt, those among the keys, which they begin with but where a sliding window has passed them.
        keys: how many there are.
        heads: query heads.
        edited: bool `[batch, 1, rows, 1]`: the rows that the method edits. What it makes of others is thrown away.
        notes: the method's own, as long as the prompt lives.
    """

    layer: int
    layers: int
    prompt: Any
    reading: bool
    tokens: Tokens
    keys: int
    heads: int
    edited: torch.Tensor
    notes: dict[Any, Any]

    def at_keys(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, 1 or heads, 1, keys]` from `[batch, length]` over the columns of the prompt; 0 at other keys. And
        `[batch, 1 or heads, keys, n]` from `[batch, length, n]`.

        Made once per `x` and tokens, with zeros added as the cache grows.
        """
        made, n = self.prompt.notes.setdefault("at keys", {}), self.tokens.column.shape[-1]
        gone = n + (0 if self.reading else self.prompt.later) - self.keys  # from a sliding window
        key = id(self.tokens), id(x)
        if key not in made:
            padded = torch.cat([x, x.new_zeros(len(x), 1, *x.shape[2:])], 1)
            columns = token_columns(self.tokens)
            batch = torch.arange(len(x), device=x.device)[:, None, None]
            found = padded[batch, columns.masked_fill(columns < 0, x.shape[1])]
            if found.shape[1] > 1:
                found = found.repeat_interleave(self.heads // found.shape[1], 1)
            found = found[:, :, None] if x.ndim == 2 else found
            made[key] = [self.tokens, x, found, n, found]  # the first two so that no other gets their id
        *_, settled, width, last = made[key]
        if gone <= 0 and width == self.keys:  # as in another layer of this call
            return last
        dim = 3 if x.ndim == 2 else 2
        if gone > 0:
            settled = settled.narrow(dim, min(gone, n), max(n - gone, 0))
        more = self.keys - settled.shape[dim]
        out = F.pad(settled, (0, more) if dim == 3 else (0, 0, 0, more))
        if gone <= 0:
            made[key][3:] = [self.keys, out]
        return out

    @property
    def image(self) -> torch.Tensor:
        """Bool `[batch, 1 or heads, 1, keys]`: the visual keys."""
        return self.at_keys(self.prompt.asked)

    @property
    def question(self) -> torch.Tensor:
        """Bool `[batch, 1 or heads, 1, keys]`: the words of the prompt after its last image."""
        return self.at_keys(question(self.prompt))


@dataclasses.dataclass(frozen=True)
class RowEdit(Method):
    """Changes rows of attention: those of all tokens after the prompt, and while it is read the last one, or those of
    all words after the last image.

    Several of them see the same rows: all change the scores, in the order given, and then all the weights. They are
    silent while a second branch runs, and rows of a batch without an image stay as they are.
    """

    def where(self, layers: int) -> tuple[int, ...]:
        """The layers, of so many, whose rows it wants."""
        raise NotImplementedError

    def install(self, engine: Any, undo: list[Callable[[], None]]) -> None:
        """Hook what else of the model it wants to see."""

    def whole(self, layer: int, layers: int) -> bool:
        """In this layer, of so many, it wants the rows of all words after the last image while the prompt is read, and
        the one before them, which is not `edited`."""
        return False

    def ahead(self, layers: int) -> tuple[int, ...]:
        """The layers whose rows, as for `whole`, it wants to see before the prompt is read: another pass through the
        text model, up to the last of them, in which nothing is edited and no layer drops tokens."""
        return ()

    def foresee(self, rows: Rows, w: torch.Tensor) -> None:
        """Look at the weights of such a layer."""

    def scores(self, rows: Rows, s: torch.Tensor) -> torch.Tensor:
        """New scaled scores from those, float32 `[batch, heads, rows, keys]`; what is not seen is masked afterwards."""
        return s

    def weights(self, rows: Rows, w: torch.Tensor) -> torch.Tensor:
        """New weights from those after the softmax, float32 `[batch, heads, rows, keys]`, 0 where nothing is seen."""
        return w


def question(prompt: Any) -> torch.Tensor:
    """Bool `[batch, length]`: the words after the last image of each row; nothing in rows without one."""
    if "question" not in prompt.notes:
        place = torch.arange(1, prompt.length + 1, device=prompt.asked.device)
        last = (prompt.asked * place).amax(1, keepdim=True)
        prompt.notes["question"] = prompt.real & (place > last) & (last > 0)
    return prompt.notes["question"]


def by_column(x: torch.Tensor, tokens: Tokens, length: int) -> torch.Tensor:
    """`[batch, length]` over the columns of a prompt from `[batch, n]` over tokens; 0 where there is none."""
    index = tokens.column.masked_fill(~tokens.valid, length)
    return x.new_zeros(len(x), length + 1).scatter(1, index, x)[:, :length]


def edit_rows(engine: Any, methods: list[RowEdit], undo: list[Callable[[], None]]) -> None:
    """Put row edits into the attention of the text model."""
    undo.append(switch(engine.config))
    engine.preparing.append(functools.partial(_look_ahead, engine, methods))
    for method in methods:
        method.install(engine, undo)
    layers = engine.model.get_decoder().layers
    for number, layer in enumerate(layers):
        group = [method for method in methods if number in method.where(len(layers))]
        if not group:
            continue
        wholes = [method.whole(number, len(layers)) for method in group]
        undo.append(listen(layer.self_attn, functools.partial(_edit, engine, number, group, wholes)))


def _look_ahead(engine: Any, methods: list[RowEdit], kwargs: dict[str, Any]) -> None:
    """Show methods what they want to see before the prompt is read, from the arguments of the text model."""
    layers, prompt = engine.model.get_decoder().layers, engine.current
    wanted = {method: method.ahead(len(layers)) for method in methods}
    last = max((number for numbers in wanted.values() for number in numbers), default=None)
    if last is None or not any(prompt.visual):
        return

    def look(number: int, module: Any, q, k, v, mask, scale: float, compute: Compute) -> torch.Tensor:
        span, asking = _asking(prompt, prompt.read)
        w = hide(row_scores(q[:, :, q.shape[2] - span :], k, scale), mask, q.shape[2]).softmax(-1).nan_to_num()
        for method, numbers in wanted.items():
            if number in numbers:
                notes = prompt.notes.setdefault(id(method), {})
                rows = Rows(number, len(layers), prompt, True, prompt.read, n, q.shape[1], asking[:, None], notes)
                method.foresee(rows, w)
        if number == last:
            raise _Enough
        return compute(q, k, v, mask)

    n, undo = len(prompt.read), []
    masks = kwargs["attention_mask"]
    shorter = {kind: m[..., :n] for kind, m in masks.items()} if isinstance(masks, dict) else masks[..., :n]
    try:
        for number in {number for numbers in wanted.values() for number in numbers}:
            undo.append(listen(layers[number].self_attn, functools.partial(look, number)))
        with unseen(engine), contextlib.suppress(_Enough):
            engine.text(**{**kwargs, "past_key_values": None, "use_cache": False, "attention_mask": shorter})
    finally:
        for each in undo:
            each()


class _Enough(Exception):
    """What was wanted of a pass was seen."""


@contextlib.contextmanager
def unseen(engine: Any) -> Iterator[None]:
    """What runs inside is seen by no method, and afterwards all is as it was."""
    names = ("current", "reading", "branching", "idle")
    before = {name: getattr(engine, name) for name in names}
    engine.current, engine.reading, engine.branching, engine.idle = None, False, True, True
    try:
        yield
    finally:
        vars(engine).update(before)


def _edit(
    engine: Any, layer: int, methods: list[RowEdit], wholes: list[bool],
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, compute: Compute,
) -> torch.Tensor:  # fmt: skip
    prompt = engine.current
    if prompt is None or engine.branching or not any(prompt.visual):
        return compute(q, k, v, mask)
    reading, queries, pictured = engine.reading, q.shape[2], all(prompt.visual)
    count = queries
    if reading:
        count = 1
        if any(wholes):
            count, asking = _asking(prompt, prompt.tokens[layer])
    one, last = prompt.notes.setdefault("edited", {}), (reading, count)
    if last not in one:  # the last row, or all rows of a later call, of samples with an image
        pictures = torch.tensor(prompt.visual, device=q.device) > 0
        place = torch.arange(count, device=q.device)
        one[last] = (pictures[:, None] & (place >= (count - 1 if reading else 0)))[:, None, :, None]
    edited = [one[last] | asking[:, None] if whole and reading else one[last] for whole in wholes]
    tokens, keys, heads = prompt.tokens[layer] if reading else prompt.cached[layer], k.shape[2], q.shape[1]
    rows = [
        Rows(layer, engine.count, prompt, reading, tokens, keys, heads, own, prompt.notes.setdefault(id(method), {}))
        for method, own in zip(methods, edited, strict=True)
    ]
    every = count == 1 and pictured
    s = row_scores(q[:, :, queries - count :], k, scale)
    for method, own in zip(methods, rows, strict=True):
        s = _put(own, every, s, method.scores(own, s))
    w = hide(s, mask, queries).softmax(-1)
    if count > 1:
        w = w.nan_to_num()  # rows of padding see nothing
    for method, own in zip(methods, rows, strict=True):
        w = _put(own, every, w, method.weights(own, w))
    new = row_values(w.to(v.dtype), v).transpose(1, 2)
    if every and queries == 1:
        return new
    out = compute(q, k, v, mask)
    old = out[:, queries - count :]
    keep = functools.reduce(torch.logical_or, edited).transpose(1, 2)
    return torch.cat([out[:, : queries - count], torch.where(keep, new.to(out.dtype), old)], 1)


def _asking(prompt: Any, tokens: Tokens) -> tuple[int, torch.Tensor]:
    """How many last tokens hold all words after the last image and the one before them, and bool `[batch, so many, 1]`,
    which of them are such words."""
    asking = question(prompt).gather(1, tokens.column) & tokens.valid
    first = asking.int().argmax(1)[asking.any(1)]
    count = min(len(tokens) - int(first.min()) + 1, len(tokens)) if len(first) else 1
    return count, asking[:, len(tokens) - count :, None]


def _put(rows: Rows, every: bool, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return new if every or new is old else torch.where(rows.edited, new, old)


def row_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 `[batch, heads, rows, keys]`, without repeating the keys of grouped heads."""
    batch, heads, rows, width = q.shape
    grouped = (q.float() * scale).reshape(batch, k.shape[1], -1, width)
    return (grouped @ k.float().mT).view(batch, heads, rows, -1)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of `[batch, heads, rows, n]` and `[batch, 1 or heads, n, m]`, the second not repeated for the heads."""
    if b.shape[1] > 1:
        return a @ b
    return (a.flatten(1, 2) @ b[:, 0]).unflatten(1, a.shape[1:3])


def row_values(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, rows, head_dim]`."""
    batch, heads, rows, keys = w.shape
    return (w.reshape(batch, v.shape[1], -1, keys) @ v).view(batch, heads, rows, -1)


def hide(s: torch.Tensor, mask: Any, queries: int) -> torch.Tensor:
    """Scores `[batch, heads, rows, keys]` of the last rows of so many queries, with the mask that attention gets.

    No mask means causal while a prompt is read, where a static cache has more keys than there are queries, and that all
    is seen by a single query.
    """
    count, keys = s.shape[2:]
    if mask is None or mask.ndim == 2:
        if queries > 1:
            place = torch.arange(keys, device=s.device)
            s = s.masked_fill(place > place[queries - count : queries, None], -torch.inf)
        return s if mask is None else s.masked_fill(~mask[:, None, None, :keys].bool(), -torch.inf)
    mask = mask[:, :, queries - count : queries, :keys]
    return s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
