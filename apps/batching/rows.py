"""Rows of a job file, read and checked one by one: what is wrong is named by row and column before anything runs."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.option_types import nearest
from vision_attn.apps.pattern_options import PerAxis, Sink

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".txt": "text"}
SHOWN = 20  # problems in one message
NUMBERED = ("id", "keep")  # texts that may be written as a number


@dataclass(frozen=True)
class Row:
    """`number` counts rows from 1, `line` the lines of the file; `values` are as they were read, by column."""

    number: int
    line: int
    values: dict[str, Any]


class RowError(ValueError):
    """What is wrong in one place of a row."""

    def __init__(self, row: Row, column: str, text: str):
        super().__init__(text)
        self.row, self.column, self.text = row, column, text

    def __str__(self) -> str:
        return f"row {self.row.number} (line {self.row.line}), column {self.column}: {self.text}"


def refuse(source: str, problems: list[RowError]) -> None:
    """Raise click.UsageError with every problem, if there is any; what is wrong in many rows is said once."""
    if not problems:
        return
    same: dict[tuple[str, str], list[RowError]] = {}
    for problem in problems:
        same.setdefault((problem.column, problem.text), []).append(problem)
    lines = [f"  {each[0]}" + f" (and in {len(each) - 1} more rows)" * (len(each) > 1) for each in same.values()]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  and {len(lines) - SHOWN} more"]
    rows = len({problem.row.number for problem in problems})
    count = f"{rows} rows are" if rows > 1 else "one row is"
    raise click.UsageError("\n".join([f"{source}: {count} wrong; nothing was started.", *lines]))


def read(source: str, form: str | None = None, column: str = "prompt") -> list[Row]:
    """The rows of a file; `-` reads stdin.

    Args:
        source: a file ending in .jsonl, .csv or .txt.
        form: "jsonl", "csv" or "text", where the name does not say it. Without either, stdin is JSONL when it starts
            with a brace, else text.
        column: where the lines of a text go.

    Raises:
        click.UsageError: a file that cannot be read, is empty, or is not of that form.
    """
    path = Path(source)
    named = source != "-"
    if named and form is None and path.suffix.lower() not in FORMATS:
        raise click.UsageError(
            f"JOBS: the name {path.name!r} does not say what it is; end it in .jsonl, .csv or .txt, or add --format."
        )
    try:
        data = path.read_bytes() if named else sys.stdin.buffer.read()
    except OSError as error:
        raise click.UsageError(f"JOBS {source}: {error.strerror}; give a .jsonl, .csv or .txt file, or -.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = error.start - data.rfind(b"\n", 0, error.start)
        raise click.UsageError(
            f"JOBS {source}: not UTF-8 text (row {line}, column {at}: byte {data[error.start]:#x}); save it as UTF-8."
        ) from error
    if not text.strip():
        raise click.UsageError(f"JOBS {source}: empty; give one row per line.")
    form = form or (FORMATS[path.suffix.lower()] if named else "jsonl" if text.lstrip().startswith("{") else "text")
    problems: list[RowError] = []
    rows = list({"jsonl": _jsonl, "csv": _csv, "text": _text}[form](text, problems, column))
    refuse(f"JOBS {source}", problems)
    if not rows:
        raise click.UsageError(f"JOBS {source}: row 1 is missing, there is only the line of column names.")
    return rows


def _text(text: str, problems: list[RowError], column: str) -> Iterable[Row]:
    lines = [(at, line.strip()) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, (at, line) in enumerate(lines, 1):
        yield Row(number, at, {column: line})


def _jsonl(text: str, problems: list[RowError], column: str) -> Iterable[Row]:
    # Only \n ends a line here: other line ends may be inside of strings.
    lines = [(at, line) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, (at, line) in enumerate(lines, 1):
        row = Row(number, at, {})
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs)
        except json.JSONDecodeError as error:
            problems.append(RowError(row, str(error.colno), f"no JSON: {error.msg}"))
        except (ValueError, RecursionError) as error:
            problems.append(RowError(row, "1", f"JSON that is too large ({str(error).splitlines()[0]})"))
        else:
            if not isinstance(pairs, _Pairs):
                shown = line.strip()
                shown = shown if len(shown) < 40 else shown[:37] + "..."
                problems.append(RowError(row, "1", f'got {shown}; write an object, such as {{"{column}": ...}}'))
                continue
            names = [_name(key) for key, _ in pairs]
            for twice in sorted({name for name in names if names.count(name) > 1}):
                problems.append(RowError(row, twice, "is there twice; keep one"))
            yield Row(number, at, dict(zip(names, (value for _, value in pairs), strict=True)))


class _Pairs(list):
    """An object of JSON, with keys that come twice."""


def _csv(text: str, problems: list[RowError], column: str) -> Iterable[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names, number, line = None, 0, 1
    while True:
        try:
            line = reader.line_num + 1
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(RowError(Row(number + 1, line, {}), "1", f"no CSV: {error}; check its quotes"))
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [_name(cell) for cell in cells]
            head = Row(0, line, {})
            for at, name in enumerate(names, 1):
                if not name:
                    problems.append(RowError(head, str(at), "has no name; write one in the first line"))
                elif names.index(name) + 1 < at:
                    problems.append(RowError(head, name, "is there twice; keep one"))
            if problems:
                return
            continue
        number += 1
        row = Row(number, line, dict(zip(names, cells)))  # noqa: B905 compared below
        if len(cells) > len(names):
            problems.append(
                RowError(
                    row,
                    str(len(names) + 1),
                    f"{len(cells)} cells under {len(names)} names; put text with commas in quotes",
                )
            )
        elif len(cells) < len(names):
            problems.append(RowError(row, names[len(cells)], f"the row ends after {len(cells)} of {len(names)} cells"))
        yield row


def _name(text: str) -> str:
    return text.strip().replace("-", "_")


def known_column(name: str, columns: Iterable[str]) -> str | None:
    """What to say of a column that is not there; None where it is."""
    if name in columns:
        return None
    hint = " Are the cells separated by commas?" if ";" in name or "\t" in name else ""
    return f"unknown column{nearest(name, columns)}{hint} Allowed: {', '.join(columns)}."


def convert(kind: click.ParamType, value: Any, name: str) -> Any:
    """A cell as the type of its column; raises ValueError that says what was got and what is allowed. None, and
    nothing at all, is a cell that was left out."""
    if isinstance(value, str):
        value = value.strip()
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("has half a character (a lone surrogate); write it again") from None
    if value is None or value == "":
        return None
    if isinstance(value, _Pairs):
        raise ValueError("got an object; give one value")
    if isinstance(kind, Names):
        return kind.convert(value, None, None)
    if isinstance(value, list):
        if not isinstance(kind, PerAxis):
            raise ValueError(f"got a list, {value!r}; give one value")
        value = ",".join(map(_plain, value))
    elif not isinstance(value, str):
        if isinstance(kind, click.types.StringParamType) and (name not in NUMBERED or isinstance(value, bool)):
            raise ValueError(f"got {_plain(value)}; give text in quotes")
        value = _plain(value)
    if isinstance(kind, Sink):
        value = {"true": "yes", "false": "no"}.get(value.lower(), value)
        if value == "no":
            return False
    try:
        found = kind.convert(value, None, None)
    except click.BadParameter as error:
        raise ValueError(error.message.rstrip(".")) from None
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"got {value}; give a finite number")
    return found


class Names(click.ParamType):
    """A list: JSON's own, or a text with `between` between the entries."""

    name = "list"

    def __init__(self, between: str):
        self.between = between

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        entries = value if isinstance(value, list) else str(value).split(self.between)
        if not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"got {value!r}; give a list of texts")
        return tuple(entry.strip() for entry in entries if entry.strip())


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
