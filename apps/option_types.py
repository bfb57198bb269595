"""Values of options: what is wrong with one, in words, and what a shell offers for it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

EXAMPLE = "example"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """How a sentence about an unknown name ends: "; did you mean ...?", or a full stop when no name is close."""
    close = difflib.get_close_matches(name, list(allowed), 1, 0.67)  # cpu is not what gpu was meant to be
    return f"; did you mean {close[0]}?" if close else "."


class Choice(click.Choice):
    """One of some names; an unknown one is answered with the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"got {value!r}{nearest(str(value), self.choices)} Allowed: {', '.join(self.choices)}."

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Allowed: {', '.join(self.choices)}."


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            _refuse(self, "a whole number", value, param, ctx)


class Real(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = math.nan
        return number if math.isfinite(number) else _refuse(self, "a number", value, param, ctx)


def _refuse(kind: click.IntRange | click.FloatRange, what: str, value: Any, param: Any, ctx: Any) -> NoReturn:
    ends = []
    if kind.min is not None:
        ends.append(f"{'above' if kind.min_open else 'at least'} {kind.min}")
    if kind.max is not None:
        ends.append(f"{'below' if kind.max_open else 'at most'} {kind.max}")
    kind.fail(f"got {value}; give {what}{', ' if ends else ''}{' and '.join(ends)}.", param, ctx)


def offer(*names: str, file: bool = False) -> Callable[..., list[CompletionItem]]:
    """What a shell offers for an option: names, and files where `file`; for `shell_complete`."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file")] * file + found  # bash drops what stands before a file

    return complete


FILES = offer(file=True)
PICTURES = offer(f"{EXAMPLE}:0", file=True)


def example_number(image: str) -> int | None:
    """The number in `example:3`; None for a file."""
    name, colon, number = image.partition(":")
    if name != EXAMPLE or Path(image).exists():
        return None
    if colon and not number.isdecimal():
        raise click.UsageError(f"IMAGE: got {image!r}; write {EXAMPLE}:0, {EXAMPLE}:1, ...")
    return int(number or 0)
