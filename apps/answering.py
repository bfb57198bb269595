"""What `vision-attn ask` and `caption` do: methods from their options, answers side by side, and the report."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from vision_attn.apps.files import atomic, check_ending, check_new, could_hold
from vision_attn.apps.option_types import example_number
from vision_attn.apps.run_options import checked_device
from vision_attn.mllm.loading import Loaded, load
from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune, Method
from vision_attn.mllm.registry import make, methods

DROPS = (InputPrune, LayerPrune, CachePrune)
# What the options of methods are said to be -> what may be given.
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "tuple": (tuple, list),
    "None": (type(None),),
}
LARGEST = 2048  # pixels along a side of a picture


def list_methods() -> list[str]:
    """A line per method: name, what it does, its options; those that drop tokens first."""
    known = sorted(methods().items(), key=lambda item: (not issubclass(item[1], DROPS), item[0]))
    lines = []
    for name, cls in known:
        kind = "--prune" if issubclass(cls, DROPS) else "--method"
        lines.append(f"{kind:<8} {name:<16} {(cls.__doc__ or '').split(chr(10))[0]}")
        lines += [f"{'':<25} {', '.join(options_of(cls))}"] if _options(cls) else []
    return lines


def _options(cls: type[Method]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.init]


def options_of(cls: type[Method]) -> list[str]:
    """Options of a method with their defaults: `keep=0.5`, `layer=2`."""
    return list(map(_shown, _options(cls)))


def _shown(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.name}={field.default!r}"
    return field.name if field.default_factory is dataclasses.MISSING else f"{field.name}=..."


def build(
    prunes: tuple[str, ...], steers: tuple[str, ...], keep: str | None, settings: tuple[str, ...]
) -> list[Method]:
    """The methods that a command line asks for.

    Raises:
        click.UsageError: an unknown name, a kind at the wrong option, an option that no chosen method has, or a value
            that it refuses.
    """
    given: dict[str, dict[str, Any]] = {}
    for option, names in (("--prune", prunes), ("--method", steers)):
        for name in names:
            if name in given:
                raise click.UsageError(f"{option}: {name} is given twice.")
            if name not in methods():
                raise click.UsageError(f"{option}: {_refusal(name)} `--list` shows them.")
            if issubclass(methods()[name], DROPS) != (option == "--prune"):
                other = "--method" if option == "--prune" else "--prune"
                raise click.UsageError(f"{option}: {name} belongs to {other}; write {other} {name}.")
            given[name] = {}
    if keep is not None:
        chosen = [name for name in prunes if "keep" in _names(name)]
        if not chosen:
            raise click.UsageError("--keep needs a method that keeps a number of tokens, such as --prune holov.")
        for name in chosen:
            given[name]["keep"] = _value(keep)
    for setting in settings:
        left, equals, value = setting.partition("=")
        name, dot, option = left.rpartition(".")
        chosen = [each for each in given if each == name or (not dot and option in _names(each))]
        if not equals or not option or not value or (dot and name not in given):
            raise click.UsageError(
                f"--set {setting!r}: write OPTION=VALUE, or NAME.OPTION=VALUE of a method that is given."
            )
        if not chosen:
            raise click.UsageError(f"--set {setting!r}: none of the methods that are given has an option {option!r}.")
        for each in chosen:
            given[each][option] = _value(value)
    return [_make(name, options) for name, options in given.items()]


def _names(name: str) -> list[str]:
    return [field.name for field in _options(methods()[name])]


def _refusal(name: str) -> str:
    try:
        make(name)
    except ValueError as error:
        return f"{error}."
    return ""


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _make(name: str, options: dict[str, Any]) -> Method:
    needed = [
        field.name
        for field in _options(methods()[name])
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [field for field in needed if field not in options]
    if missing:
        raise click.UsageError(f"{name} needs {', '.join(missing)}; give it with --set, or use attach() in Python.")
    for option, value in options.items():
        kinds = next((str(each.type) for each in _options(methods()[name]) if each.name == option), "").split(" | ")
        if all(kind.partition("[")[0] in _KINDS for kind in kinds) and not any(_is(value, kind) for kind in kinds):
            raise click.UsageError(f"{name}: {option} takes {' | '.join(kinds)}; got {value!r}")
    try:
        return make(name, **options)
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"{name}: {error}") from error


def _is(value: Any, kind: str) -> bool:
    """Whether a value is what an annotation says, as far as `_KINDS` knows."""
    known = _KINDS[kind.partition("[")[0]]
    if kind.startswith("tuple[tuple") and isinstance(value, (tuple, list)):
        return all(isinstance(each, (tuple, list)) for each in value)
    return isinstance(value, known) and (bool in known or not isinstance(value, bool))


def answer(image: str, question: str, asked: dict[str, Any]) -> None:
    """Check what was asked, load, answer, draw, print."""
    attached = build(asked["prunes"], asked["steers"], asked["keep"], asked["settings"])
    if asked["compare"] and not attached:
        raise click.UsageError("--compare needs a method; add for example --prune fastv --keep 0.2.")
    output = asked["output"]
    if output is not None:
        check_ending(output, ".png")
        check_new([output], asked["overwrite"])
    picture = None if example_number(image) is not None else read_picture(image)
    number = None if asked["dtype"] == "auto" else asked["dtype"]
    checked_device(asked["device"], asked["dtype"])
    if output is not None:
        could_hold(output.parent)
    with _loading_bars(asked["progress"]):
        loaded = load(asked["model"], device=asked["device"], dtype=number)
    there = None
    if picture is None:
        picture, there = draw_example(example_number(image), loaded)
    inputs = loaded.inputs(picture, question)
    if loaded.built_in:
        check_words(loaded, inputs, question)

    rows = [()] * (asked["compare"] or not attached) + [tuple(attached)] * bool(attached)
    found = [reply(loaded, inputs, row, asked["tokens"]) for row in rows]
    if output is not None:
        from vision_attn.apps.kept import draw

        with atomic(output) as partial:
            partial.write_bytes(draw(loaded, picture, inputs, question, found))
    result = {"image": image, "question": question, "model": asked["model"], "there": there}
    shown = [{key: each[key] for key in ("methods", "answer", "tokens", "seconds", "report")} for each in found]
    if asked["as_json"]:
        click.echo(json.dumps({**result, "answers": shown, "file": None if output is None else str(output)}))
        return
    width = max(len(each["name"]) for each in found)
    for each in found:
        click.echo(f"{each['name']:<{width}}  {each['answer']}" if len(found) > 1 else each["answer"])
    if there is not None:
        click.echo(f"what is there: {', '.join(there)}")
    for each in found:
        if each["text"]:
            click.echo(each["text"])
    if output is not None:
        click.echo(str(output))


def reply(
    loaded: Loaded,
    inputs: dict[str, Any],
    attached: tuple[Method, ...],
    tokens: int,
    look: tuple[Method, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    """One answer; with nothing attached, that of the untouched model.

    Args:
        look: methods that watch and change nothing, such as `Capture`; no report of them.
        options: of `model.generate`.
    """
    from vision_attn.mllm import attach

    drops = any(isinstance(method, DROPS) for method in attached)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(attach(loaded.model, *attached, *look)) if attached or look else None
        output = loaded.generate(inputs, tokens, **options)
        prompt = run.engine.prompts[output.past_key_values] if drops else None
        report = dataclasses.replace(run.report, methods=run.report.methods[: len(attached)]) if attached else None
    return {
        "name": " + ".join(method.name for method in attached) or "untouched",
        "methods": [] if report is None else report.methods,
        "answer": loaded.text(output.sequences),
        "ids": output.sequences[0].tolist(),
        "tokens": output.sequences.shape[1],
        "seconds": round(time.perf_counter() - start, 3),
        "report": None if report is None else report.to_dict(),
        "text": None if report is None else str(report),
        "prompt": prompt,
        "attached": attached,
        "drops": drops,
    }


def draw_example(number: int, loaded: Loaded) -> tuple[np.ndarray, list[str]]:
    """A picture of the shapes world in which about half of what usually is there is missing; and what is there."""
    from vision_attn.shapes.crowd import CELLS, KINDS, draw_crowd, sample_crowd

    crowd = sample_crowd(np.random.default_rng((7, number)), 0.5)
    cell = loaded.model.config.vision_config.image_size // CELLS if loaded.built_in else 96
    picture = draw_crowd(crowd, np.random.default_rng((8, number)), cell)
    return picture, [KINDS[kind] for kind in crowd.kinds]


def read_picture(image: str | Path) -> np.ndarray:
    """A file as uint8 `[height, width, 3]`, no side longer than `LARGEST`."""
    from vision_attn.images import read_image

    return read_image(image, largest=LARGEST)


def check_words(loaded: Loaded, inputs: dict[str, Any], question: str) -> None:
    from vision_attn.shapes.crowd import WORDS

    words = loaded.processor.tokenizer
    unknown = [
        word for word in question.split() if words.unk_token_id in words(word, add_special_tokens=False).input_ids
    ]
    if unknown:
        raise click.UsageError(
            f"the built-in model does not know {', '.join(map(repr, unknown))}. Its words: "
            f"{' '.join(word for word in WORDS if word.isalpha())}. Ask it: is there a red circle in the image?"
        )


@contextlib.contextmanager
def _loading_bars(progress: bool | None):
    """Bars of transformers only where they are wanted."""
    from transformers.utils import logging

    shown = sys.stderr.isatty() if progress is None else progress
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
