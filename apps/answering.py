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

from vision_attn.apps.ask import EXAMPLE
from vision_attn.apps.files import atomic, check_new
from vision_attn.mllm.loading import Loaded, load
from vision_attn.mllm.method import CachePrune, InputPrune, LayerPrune, Method
from vision_attn.mllm.registry import make, methods

DROPS = (InputPrune, LayerPrune, CachePrune)
LARGEST = 2048  # pixels along a side of a picture


def list_methods() -> list[str]:
    """A line per method: name, what it does, its options; those that drop tokens first."""
    known = sorted(methods().items(), key=lambda item: (not issubclass(item[1], DROPS), item[0]))
    lines = []
    for name, cls in known:
        kind = "--prune" if issubclass(cls, DROPS) else "--method"
        lines.append(f"{kind:<8} {name:<16} {(cls.__doc__ or '').split(chr(10))[0]}")
        lines += [f"{'':<25} {', '.join(map(_shown, _options(cls)))}"] if _options(cls) else []
    return lines


def _options(cls: type[Method]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.init]


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
    except (ValueError, SyntaxError):
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
    try:
        return make(name, **options)
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"{name}: {error}") from error


def answer(image: str, question: str, asked: dict[str, Any]) -> None:
    """Check what was asked, load, answer, draw, print."""
    attached = build(asked["prunes"], asked["steers"], asked["keep"], asked["settings"])
    if asked["compare"] and not attached:
        raise click.UsageError("--compare needs a method; add for example --prune fastv --keep 0.2.")
    output = asked["output"]
    if output is not None:
        if output.suffix != ".png":
            raise click.UsageError(f"-o: got {output.name!r}; the name must end in .png.")
        check_new([output], asked["overwrite"])
    picture = None if _example(image) is not None else _read(image)
    from vision_attn.devices import resolve_device, resolve_dtype

    number = None if asked["dtype"] == "auto" else asked["dtype"]
    try:
        resolve_dtype(number, resolve_device(asked["device"]), built_in=False)
    except ValueError as error:
        raise click.UsageError(f"--{error}") from error
    with _loading_bars(asked["progress"]):
        loaded = load(asked["model"], device=asked["device"], dtype=number)
    there = None
    if picture is None:
        picture, there = _draw_example(_example(image), loaded)
    inputs = loaded.inputs(picture, question)
    if loaded.built_in:
        _check_words(loaded, inputs, question)

    rows = [()] * (asked["compare"] or not attached) + [tuple(attached)] * bool(attached)
    found = [_answer(loaded, inputs, row, asked["tokens"]) for row in rows]
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


def _answer(loaded: Loaded, inputs: dict[str, Any], attached: tuple[Method, ...], tokens: int) -> dict[str, Any]:
    """One answer; with nothing attached, that of the untouched model."""
    from vision_attn.mllm import attach

    drops = any(isinstance(method, DROPS) for method in attached)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(attach(loaded.model, *attached)) if attached else None
        output = loaded.generate(inputs, tokens)
        prompt = run.engine.prompts[output.past_key_values] if drops else None
        report = None if run is None else run.report
    return {
        "name": " + ".join(method.name for method in attached) or "untouched",
        "methods": [] if report is None else report.methods,
        "answer": loaded.text(output.sequences),
        "tokens": output.sequences.shape[1],
        "seconds": round(time.perf_counter() - start, 3),
        "report": None if report is None else report.to_dict(),
        "text": None if report is None else str(report),
        "prompt": prompt,
        "attached": attached,
        "drops": drops,
    }


def _example(image: str) -> int | None:
    """The number in `example:3`; None for a file."""
    name, colon, number = image.partition(":")
    if name != EXAMPLE or Path(image).exists():
        return None
    if colon and not number.isdecimal():
        raise click.UsageError(f"IMAGE: got {image!r}; write {EXAMPLE}:0, {EXAMPLE}:1, ...")
    return int(number or 0)


def _draw_example(number: int, loaded: Loaded) -> tuple[np.ndarray, list[str]]:
    """A picture of the shapes world in which about half of what usually is there is missing; and what is there."""
    from vision_attn.shapes.crowd import CELLS, KINDS, draw_crowd, sample_crowd

    crowd = sample_crowd(np.random.default_rng((7, number)), 0.5)
    cell = loaded.model.config.vision_config.image_size // CELLS if loaded.built_in else 96
    picture = draw_crowd(crowd, np.random.default_rng((8, number)), cell)
    return picture, [KINDS[kind] for kind in crowd.kinds]


def _read(image: str) -> np.ndarray:
    from vision_attn.images import read_image

    return read_image(image, largest=LARGEST)


def _check_words(loaded: Loaded, inputs: dict[str, Any], question: str) -> None:
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
