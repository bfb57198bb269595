"""Items: rows with every setting decided, a name for their files, and a hash that says whether a result is theirs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.batching.rows import Row, RowError, convert, known_column, refuse
from vision_attn.apps.batching.tasks import TASKS, Task, fingerprint
from vision_attn.apps.files import slug
from vision_attn.apps.generate import SEEDS
from vision_attn.apps.option_types import example_number, nearest

COMMON = {"task": click.STRING, "id": click.STRING}
IGNORED = ("error",)  # what failures.jsonl says beside the row
_ID = re.compile(r"\w[\w-]{0,99}")


@dataclass(frozen=True)
class Item:
    """One thing to make, in plain values that travel between processes.

    Args:
        row: its number in the job file, from 1.
        task: a key of `TASKS`.
        name: of its files, without ending.
        settings: of the task by column; files as absolute paths.
        hash: of everything that decides the result.
        endings: of its files; the sidecar first, the one that says that the item is done last.
    """

    row: int
    task: str
    name: str
    settings: dict[str, Any]
    hash: str
    endings: tuple[str, ...] = field(default=())

    def paths(self, output: Path) -> dict[str, Path]:
        """Its files by ending."""
        return {ending: output / f"{self.name}{ending}" for ending in self.endings}

    def failure(self, error: str) -> dict[str, Any]:
        """A row of failures.jsonl, which can be given as a job file."""
        return {"id": self.name, "task": self.task, **self.settings, "error": error}

    to_dict = asdict


def plan(
    rows: list[Row], source: str, *, task: str, given: dict[str, Any], seed: int = 0, dtype: str = "auto"
) -> list[Item]:
    """An item for every row; nothing is loaded.

    Args:
        rows: from `rows.read`.
        source: the job file, for messages; files are looked for beside it.
        task: of rows that do not say theirs.
        given: settings by column for rows that leave them out.
        seed: of the first row; row n gets `seed` + n - 1.
        dtype: asked for, which changes results and so the hash.

    Raises:
        click.UsageError: names every row and column that is wrong.
    """
    problems: list[RowError] = []
    items: list[Item] = []
    names: dict[str, Item] = {}
    folder = Path.cwd() if source == "-" else Path(source).absolute().parent
    seen: dict[Path, str] = {}
    for row in rows:
        try:
            item = _item(row, folder, task, given, seed, dtype, seen)
            same = names.setdefault(item.name.casefold(), item)
            if same is not item:
                named = "id" if row.values.get("id") else TASKS[item.task].needed[0]
                what = f"has the id of row {same.row}" if named == "id" else f"asks for the same as row {same.row}"
                raise RowError(row, named, f"{what} ({item.name}); give it another id or seed, or remove it")
        except RowError as error:
            problems.append(error)
        else:
            items.append(item)
    refuse("JOBS" if source == "-" else f"JOBS {source}", problems)
    return items


def _item(
    row: Row, folder: Path, task: str, given: dict[str, Any], seed: int, dtype: str, seen: dict[Path, str]
) -> Item:
    cells = {name: value for name, value in row.values.items() if name not in IGNORED}
    chosen = _cell(row, "task", click.STRING, cells.get("task")) or task
    if chosen not in TASKS:
        raise RowError(row, "task", f"unknown task {chosen!r}{nearest(chosen, TASKS)} Allowed: {', '.join(TASKS)}.")
    kind = TASKS[chosen]
    columns = {**COMMON, **kind.columns}
    for name in cells:
        unknown = known_column(name, columns)
        if unknown:
            # Of a column of another task, an empty cell says nothing.
            elsewhere = any(name in other.columns for other in TASKS.values())
            if elsewhere and cells[name] in (None, ""):
                continue
            raise RowError(row, name, unknown)
    typed = {name: _cell(row, name, columns[name], value) for name, value in cells.items() if name in columns}
    settings = {**{name: value for name, value in given.items() if name in kind.columns}}
    settings |= {name: value for name, value in typed.items() if value is not None and name not in COMMON}
    for name in kind.needed:
        if settings.get(name) is None:
            raise RowError(row, name, f"is empty; {chosen} needs it")
    if "seed" in kind.columns and "seed" not in settings:
        if seed + row.number - 1 > SEEDS:
            raise RowError(row, "seed", f"--seed {seed} counts past {SEEDS}, the largest seed")
        settings["seed"] = seed + row.number - 1
    prints = {name: _file(row, name, folder, settings, seen) for name in kind.files if name in settings}
    endings = _checked(row, kind, settings)
    decides = {**settings, **{name: value for name, value in prints.items() if value}, "task": chosen, "dtype": dtype}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=list).encode()).hexdigest()
    name = typed.get("id")
    if name is not None and not _ID.fullmatch(name):
        raise RowError(row, "id", f"got {name!r}; use up to 100 letters, digits, - and _: it names the files")
    if name is None:
        words = Path(settings["image"]).stem if "image" in settings else settings["prompt"]
        name = "-".join([slug(words, 40), *([str(settings["seed"])] if "seed" in settings else []), digest[:8]])
    return Item(row.number, chosen, name, settings, digest, endings)


def _cell(row: Row, name: str, kind: click.ParamType, value: Any) -> Any:
    try:
        return convert(kind, value, name)
    except ValueError as error:
        raise RowError(row, name, str(error)) from error


def _file(row: Row, name: str, folder: Path, settings: dict[str, Any], seen: dict[Path, str]) -> str | None:
    """Make the path absolute and return what the file holds, hashed; None for a picture of the built-in world."""
    if name == "image" and _tried(row, name, lambda: example_number(settings[name])) is not None:
        return None
    path = folder / Path(settings[name]).expanduser()
    settings[name] = str(path)
    if path in seen:
        return seen[path]

    def look() -> str:
        if path.is_dir():
            if name == "lora":
                return str(path)
            raise ValueError(f"{path} is a folder; name one file in it")
        try:
            digest = fingerprint(path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        _LOOKS.get(name, lambda path: None)(path)
        return digest

    seen[path] = _tried(row, name, look)
    return seen[path]


def _look_at_picture(path: Path) -> None:
    from vision_attn.images import read_image

    read_image(path, largest=64)


def _look_at_video(path: Path) -> None:
    from vision_attn.apps.upscale import first_frame

    first_frame(path)


_LOOKS = {"image": _look_at_picture, "video": _look_at_video}


def _checked(row: Row, kind: Task, settings: dict[str, Any]) -> tuple[str, ...]:
    return _tried(row, None, lambda: kind.check(settings), columns=list(kind.columns), settings=settings)


def _tried(
    row: Row,
    name: str | None,
    check: Callable[[], Any],
    columns: list[str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Any:
    try:
        return check()
    except (click.ClickException, ValueError, TypeError, ImportError, OSError, OverflowError) as error:
        text = error.message if isinstance(error, click.ClickException) else str(error)
        found = name or _place(text, columns or [], settings or {})
        raise RowError(row, found, _as_cell(text, found)) from error


def _place(text: str, columns: list[str], settings: dict[str, Any]) -> str:
    """The column that a message of the command line is about: the option it names, or else a word of it that is a
    column of this row."""
    named = [flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", text)]
    words = re.findall(r"[a-z_]+", text)
    for candidates, allowed in ((named, columns), (words, [*settings])):
        found = next((word for word in candidates if word in allowed), None)
        if found:
            return found
    return next((name for name in ("attention", "preset", "model") if name in settings), columns[0])


def _as_cell(text: str, column: str) -> str:
    """The message without the option in front, which the column has named already."""
    return re.sub(rf"^--{column.replace('_', '-')}:?\s+", "", text)
