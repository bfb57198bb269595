"""What the tab *Ask* does behind its widgets: methods by name, and answers with what they look at."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import numpy as np

if TYPE_CHECKING:
    from vision_attn.mllm.loading import Loaded
    from vision_attn.mllm.method import Method

Tell = Callable[[str, int, int], None]  # what is being done, steps done, steps in all; an exception ends the run
NONE = "none"
QUESTION, OPTIONS = 500, 400  # characters
# Methods that no line of text can describe, and why.
NOT_HERE = {"agla": "it needs a matcher of pictures and questions, a Python object"}
# What methods need, or are better with, on the built-in model of four layers of six heads.
SUGGESTED = {
    "pyramid-drop": "keep=(0.5, 0.25, 0.125)\nlayers=(1, 2, 3)",
    "sparsevlm": "keep=(0.5, 0.25, 0.125)\nlayers=(1, 2, 3)",
    "schedule": "keep=(1.0, 0.5, 0.25, 0.125)",
    "kvprune": "rows=8",
    "task-kv": "recent=8\nmiddle=8",
    "zipvl": "recent=8\nprobes=16",
    "visual-heads": "heads=((0, 3), (1,), (2, 5), (4,))",
    "streaming-heads": "table=((0.9, 0.1, 0.2), (0.8, 0.7, 0.1), (0.3, 0.9, 0.6), (0.9, 0.2, 0.8))\nsink=2\nrecent=8",
    "icd": "instruction=(3, 3, 3, 3)",
    "act": "heads=((1, 0), (2, 3), (3, 5))",
    "gift": "alpha=1.0",
    "damro": "k=4",
    "zerotuning": "gamma=0.5",
}


def choices(built_in: bool) -> tuple[list[str], list[str]]:
    """Names of the methods that can be chosen: those that drop visual tokens, and the others."""
    from vision_attn.apps.answering import DROPS
    from vision_attn.mllm.comparison import LEFT_OUT
    from vision_attn.mllm.registry import methods

    out = {*NOT_HERE, *(LEFT_OUT if built_in else ())}
    known = sorted(name for name in methods() if name not in out)
    drops = [name for name in known if issubclass(methods()[name], DROPS)]
    return drops, [name for name in known if name not in drops]


def about(name: str) -> str:
    """What a method does, in a sentence."""
    from vision_attn.mllm.registry import methods

    if name not in methods():
        return "The model as it is."
    return " ".join((methods()[name].__doc__ or "").split("\n\n")[0].split()).replace("`", "")


def takes(*names: str) -> str:
    """The options of these methods with their defaults, but for the share that is kept."""
    from vision_attn.apps.answering import options_of
    from vision_attn.mllm.registry import methods

    found = []
    for name in names:
        if name in methods():
            own = [each for each in options_of(methods()[name]) if not (each.startswith("keep=") and takes_keep(name))]
            found.append(f"{name}: {', '.join(own) or 'none'}")
    return "; ".join(found) or "None without a method."


def takes_keep(name: str) -> bool:
    """Whether a method keeps one share of the visual tokens."""
    from vision_attn.mllm.registry import methods

    fields = {field.name: str(field.type) for field in dataclasses.fields(methods()[name])} if name in methods() else {}
    return fields.get("keep", "").startswith("float")


def suggested(prune: str, steer: str) -> str:
    """Options to start from on the built-in model, one per line."""
    lines = [(name, line) for name in (prune, steer) for line in SUGGESTED.get(name, "").splitlines()]
    return "\n".join(f"{name}.{line}" for name, line in lines)


def methods_of(prune: str, keep: float | None, steer: str, options: str | None) -> tuple[Method, ...]:
    """The methods that were chosen.

    Args:
        prune, steer: names, or "none".
        keep: share of the visual tokens that stays, where `prune` takes one.
        options: `name.option=value`, or `option=value`, one per line.

    Raises:
        click.UsageError: unknown names and options, and values that a method refuses.

    >>> methods_of("fastv", 0.5, "vhr", "layer=3")
    (FastV(keep=0.5, layer=3), VHR(alpha=2.0, layers=None, shallow=True, text_branch='reinforced'))
    """
    from vision_attn.apps.answering import build

    options = (options or "").strip()
    if len(options) > OPTIONS:
        raise click.UsageError(f"The options are {len(options)} characters long.\nAllowed: {OPTIONS}.")
    lines = tuple(line.strip() for line in options.splitlines() if line.strip())
    for name in (prune, steer):
        if name in NOT_HERE:
            raise click.UsageError(f"{name} cannot be chosen here: {NOT_HERE[name]}.\nUse attach() in Python.")
    given = [() if name in (NONE, "", None) else (name,) for name in (prune, steer)]
    if lines and not any(given):
        raise click.UsageError(f"The options are {lines[0]!r}, but there is no method.\nChoose one, or empty them.")
    share = None
    if takes_keep(prune) and not any(line.partition("=")[0].strip() in ("keep", f"{prune}.keep") for line in lines):
        if keep is None or not 0 < keep <= 1:
            raise click.UsageError(f"The share that stays is {keep}.\nAllowed: above 0, up to 1.")
        share = str(keep)
    try:
        return tuple(build(*given, share, lines))
    except click.UsageError as error:
        said = error.format_message()
        for flag, word in (("`--list` shows them.", ""), ("--set ", "options: "), ("--prune", "drop visual tokens"),
                           ("--method", "steer"), ("with options: ", "among the options")):  # fmt: skip
            said = said.replace(flag, word)
        raise click.UsageError(f"{said}\nOptions: {takes(prune, steer)}") from error


def check_question(question: str | None) -> str:
    """The question without space around it.

    Raises:
        ValueError: empty or too long.
    """
    question = (question or "").strip()
    if not question:
        raise ValueError("The question is empty.\nAsk something, such as: is there a red circle in the image?")
    if len(question) > QUESTION:
        raise ValueError(f"The question is {len(question)} characters long.\nAllowed: {QUESTION}.")
    return question


def is_built_in(model: str | None) -> bool:
    """Whether a model is one that ships with the package."""
    from vision_attn.mllm.loading import BUILT_IN

    return model is None or model in BUILT_IN


@functools.lru_cache(maxsize=1)
def load_model(model: str | None, device: str, dtype: str) -> Loaded:
    """The model, kept for the next question."""
    import transformers.utils.logging

    from vision_attn.mllm.loading import BUILT_IN, load

    transformers.utils.logging.disable_progress_bar()
    return load(model or BUILT_IN[0], device=device, dtype=None if dtype == "auto" else dtype)


@contextlib.contextmanager
def held(lock: threading.Lock, tell: Tell) -> Iterator[None]:
    """The lock of the model, as soon as a run that was stopped has ended."""
    while not lock.acquire(timeout=0.5):
        tell("Waiting for the run before to end", 0, 0)
    try:
        tell("Loading the model", 0, 0)
        yield
    finally:
        lock.release()


def ask(
    loaded: Loaded, picture: np.ndarray, question: str, methods: tuple[Method, ...], tokens: int, tell: Tell
) -> list[dict[str, Any]]:
    """The answers of the model as it is and, if there are any, with the methods: what `answering.reply` returns, and

    `picture` and `what`: the tokens that stay, or where the answer looks, uint8 RGB, and what that is; `words`:
    (picture, caption) per word of the answer, where the model looked when it chose it.

    Raises:
        ValueError, click.UsageError: words that the built-in model does not know; methods that do not fit the model.
    """
    from vision_attn.apps.answering import check_words, reply
    from vision_attn.mllm import Capture

    inputs = loaded.inputs(picture, question)
    if loaded.built_in:
        check_words(loaded, inputs, question)
    found = []
    for attached in ((), methods)[: 1 + bool(methods)]:
        look = Capture()
        name = " + ".join(method.name for method in attached) or "the model as it is"
        stop = _Told(tell, f"Answering with {name}" if attached else "Answering", tokens)
        each = reply(loaded, inputs, attached, tokens, (look,), stopping_criteria=[stop])
        found.append({**each, **_looks(loaded, picture, inputs, each, look.steps)})
    return found


class _Told:
    """A criterion of `generate` that never stops it, and tells how far it is; an exception of `tell` does."""

    def __init__(self, tell: Tell, what: str, tokens: int) -> None:
        self.tell, self.what, self.tokens, self.done = tell, what, tokens, 0

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        self.done += 1
        self.tell(self.what, min(self.done, self.tokens), self.tokens)
        return ids.new_zeros(len(ids), dtype=bool)


def _looks(loaded: Loaded, picture: np.ndarray, inputs: dict[str, Any], each: dict, steps: list[dict]) -> dict:
    """What is drawn of one answer."""
    import torch

    from vision_attn.apps.kept import as_seen, dimmed, kept
    from vision_attn.apps.overlay import overlay
    from vision_attn.apps.web.studying import enlarged
    from vision_attn.mllm.grids import grids, overview

    grid = overview(loaded.model, grids(loaded.model, inputs))
    seen = enlarged(as_seen(loaded, picture, inputs), 256)
    maps = [grid.of(torch.stack(list(step.values())).mean((0, 2, 3))[0]).float().cpu().numpy() for step in steps]
    if each["drops"]:
        layers = grid.of(kept(each["prompt"], inputs["input_ids"].shape[1])[:, 0]).numpy()
        share = (layers[-1] > 0).mean()
        drawn, what = dimmed(seen, layers.mean(0)), f"Kept to the last layer: {share:.0%}"
    else:
        drawn, what = overlay(seen, np.mean(maps, 0)), "It looks most where it is red"
    shown = []
    for word, places in words_of(loaded, each["ids"]):
        values = np.mean([maps[place] for place in places], 0)
        shown.append((overlay(seen, values), f"{word} · {values.sum():.0%}"))
    return {"picture": drawn, "what": what, "words": shown}


def words_of(loaded: Loaded, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, and the places of the tokens that make each."""
    words: list[tuple[str, list[int]]] = []
    before = ""
    for place in range(len(ids)):
        text = loaded.processor.tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
        new, before = text[len(before) :], text
        if not new.strip():
            continue
        if words and not new[0].isspace():
            words[-1] = (words[-1][0] + new, [*words[-1][1], place])
        else:
            words.append((new.strip(), [place]))
    return words
