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
from vision_attn.mllm.rows import hide, row_scores, row_values
from vision_attn.mllm.tokens import Tokens


@dataclasses.dataclass
class Rows:
    """Some last rows of one call of one attention layer.

    Args:
        layer: from 0.
        layers: how many the text model has.
        prompt: what is known of the prompt.
        reading: it is being read; otherwise what follows it.
        tokens: those of the prompt, which the keys begin with but where a sliding window has passed some.
        gone: how many of these have left a sliding window.
        heads: query heads.
        edited: bool `[batch, 1, rows, 1]`: the rows that the method edits. What it makes of others is thrown away.
        notes: the method's own, as long as the prompt lives.
    """

    layer: int
    layers: int
    prompt: Any
    reading: bool
    tokens: Tokens
    gone: int
    heads: int
    edited: torch.Tensor
    notes: dict[Any, Any]

    def of_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """The part of `[batch, heads, rows, keys]` over the `n` keys of the prompt, `[groups, heads * rows, n]` or one
        head in each group where heads hold different tokens. A view, so that a method can write there."""
        shape, n = self._of_prompt
        return x.view(*shape, x.shape[-1]).narrow(-1, 0, n - self.gone)

    @functools.cached_property
    def _of_prompt(self) -> tuple[tuple[int, int], int]:
        batch, rows, column = *self.edited.shape[::2], self.tokens.column
        return ((batch * self.heads, rows) if column.ndim == 3 else (batch, self.heads * rows)), column.shape[-1]

    def at_prompt(self, x: torch.Tensor, flip: bool = False) -> torch.Tensor:
        """`[groups, m, n]` as in `of_prompt` from `[batch, m, length]` over the columns of the prompt, 0 at padding; or
        `[groups, n, m]`. Made once per `x` and tokens, not once per token that follows."""
        made, key = self.prompt.notes.setdefault("at prompt", {}), (id(self.tokens), id(x), flip)
        if key not in made:
            columns = token_columns(self.tokens)
            if self.tokens.column.ndim == 3:
                columns = columns.repeat_interleave(self.heads // columns.shape[1], 1)
            index = columns.masked_fill(columns < 0, x.shape[-1])[:, :, None].expand(-1, -1, x.shape[1], -1)
            padded = F.pad(x, (0, 1))[:, None].expand(-1, index.shape[1], -1, -1)
            found = padded.gather(-1, index).flatten(0, 1)
            made[key] = self.tokens, x, found.mT if flip else found  # the first two so that no other gets their id
        found = made[key][-1]
        return (found[:, self.gone :] if flip else found[..., self.gone :]) if self.gone else found

    @property
    def image(self) -> torch.Tensor:
        """Bool `[groups, 1, n]`: which keys of the prompt are visual."""
        if "image" not in self.prompt.notes:
            self.prompt.notes["image"] = self.prompt.asked[:, None]
        return self.at_prompt(self.prompt.notes["image"])


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

    def acts(self, layer: int, layers: int, notes: dict[Any, Any]) -> bool:
        """In this layer, of so many, it changes rows of what follows the prompt."""
        return True

    def scores(self, rows: Rows, s: torch.Tensor) -> torch.Tensor:
        """New scaled scores from those, float32 `[batch, heads, rows, keys]`, or the same changed in place; what is not
        seen is masked afterwards."""
        return s

    def weights(self, rows: Rows, w: torch.Tensor) -> torch.Tensor:
        """New weights from those after the softmax, float32 `[batch, heads, rows, keys]`, 0 where nothing is seen; or
        the same changed in place."""
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
        group = [(m, m.whole(number, len(layers))) for m in methods if number in m.where(len(layers))]
        if group:
            undo.append(listen(layer.self_attn, functools.partial(_edit, engine, number, group)))


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
                rows = Rows(number, len(layers), prompt, True, prompt.read, 0, q.shape[1], asking[:, None], notes)
                method.foresee(rows, w)
        if number == last:
            raise _Enough
        return compute(q, k, v, mask)

    n, undo = len(prompt.read), []
    masks = kwargs["attention_mask"]
    if isinstance(masks, dict):
        shorter = {kind: None if m is None else m[..., :n] for kind, m in masks.items()}
    else:
        shorter = masks[..., :n]
    try:
        for number in {number for numbers in wanted.values() for number in numbers}:
            undo.append(listen(layers[number].self_attn, functools.partial(look, number)))
        with unseen(engine), contextlib.suppress(_Enough):
            engine.text(**{**kwargs, "past_key_values": None, "use_cache": False, "attention_mask": shorter})
        engine.read_besides(len(prompt.asked), [n if number <= last else 0 for number in range(len(layers))])
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
    engine: Any, layer: int, methods: list[tuple[RowEdit, bool]],
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, compute: Compute,
) -> torch.Tensor:  # fmt: skip
    prompt, queries = engine.current, q.shape[2]
    if prompt is None or engine.branching or not any(prompt.visual):
        return compute(q, k, v, mask)
    plan = _plan(engine, layer, methods, q, k)
    if not plan.rows:
        return compute(q, k, v, mask)
    count = plan.count
    s = row_scores(q if count == queries else q[:, :, queries - count :], k, scale)
    w = hide(plan.changed(plan.scores, s), mask, queries).softmax(-1)
    if count > 1:
        w = w.nan_to_num()  # rows of padding see nothing
    new = row_values(plan.changed(plan.weights, w), v).transpose(1, 2)
    if plan.every and count == queries:
        return new
    out = compute(q, k, v, mask)
    old = out[:, queries - count :]
    keep = functools.reduce(torch.logical_or, (rows.edited for rows in plan.rows)).transpose(1, 2)
    return torch.cat([out[:, : queries - count], torch.where(keep, new.to(out.dtype), old)], 1)


@dataclasses.dataclass
class _Plan:
    """What is done in one call of a layer: to how many last rows, whether all of them are edited, and by what."""

    count: int
    every: bool
    rows: list[Rows]
    scores: list[tuple[Callable[[Rows, torch.Tensor], torch.Tensor], Rows]]
    weights: list[tuple[Callable[[Rows, torch.Tensor], torch.Tensor], Rows]]

    def changed(self, steps: list[tuple[Callable[[Rows, torch.Tensor], torch.Tensor], Rows]], x: torch.Tensor) -> Any:
        for step, rows in steps:
            x = step(rows, x) if self.every else torch.where(rows.edited, step(rows, x.clone()), x)
        return x


def _plan(
    engine: Any, layer: int, methods: list[tuple[RowEdit, bool]], q: torch.Tensor, k: torch.Tensor
) -> _Plan:  # fmt: skip
    """The same for all calls after the prompt: what a token costs is mostly the number of small steps."""
    prompt, reading, count = engine.current, engine.reading, q.shape[2]
    made = prompt.notes.setdefault("plans", {})
    if not reading and (layer, count) in made:
        plan = made[layer, count]
        for rows in plan.rows:
            rows.gone = _gone(rows.tokens, prompt.later, k.shape[2])
        return plan
    own = [(method, whole, prompt.notes.setdefault(id(method), {})) for method, whole in methods]
    tokens, asking = (prompt.tokens if reading else prompt.cached)[layer], None
    if reading:
        count = 1
        if any(whole for _, whole in methods):
            count, asking = _asking(prompt, tokens)
    else:
        own = [each for each in own if each[0].acts(layer, engine.count, each[-1])]
    pictures = torch.tensor(prompt.visual, device=q.device) > 0
    place = torch.arange(count, device=q.device)
    last = (pictures[:, None] & (place >= (count - 1 if reading else 0)))[:, None, :, None]
    group, gone = [], _gone(tokens, 0 if reading else prompt.later, k.shape[2])
    for method, whole, notes in own:
        edited = last | asking[:, None] if whole and reading else last
        rows = Rows(layer, engine.count, prompt, reading, tokens, gone, q.shape[1], edited, notes)
        group.append((method, rows))
    scores, weights = (
        [(getattr(method, step), rows) for method, rows in group if getattr(type(method), step) is not plain]
        for step, plain in (("scores", RowEdit.scores), ("weights", RowEdit.weights))
    )
    plan = _Plan(count, all(prompt.visual) and (count == 1 or not reading), [r for _, r in group], scores, weights)
    if not reading:
        made[layer, count] = plan
    return plan


def _gone(tokens: Tokens, later: int, keys: int) -> int:
    n = tokens.column.shape[-1]
    return min(max(n + later - keys, 0), n)


def _asking(prompt: Any, tokens: Tokens) -> tuple[int, torch.Tensor]:
    """How many last tokens hold all words after the last image and the one before them, and bool `[batch, so many, 1]`,
    which of them are such words."""
    asking = question(prompt).gather(1, tokens.column) & tokens.valid
    first = asking.int().argmax(1)[asking.any(1)]
    count = min(len(tokens) - int(first.min()) + 1, len(tokens)) if len(first) else 1
    return count, asking[:, len(tokens) - count :, None]
