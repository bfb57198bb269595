"""File names, and writing without ever leaving half a file under its final name."""

import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.option_types import example_number

PICTURES = (".png", ".svg", ".pdf")


def slug(prompt: str, length: int = 48) -> str:
    """A file name made of the words of a prompt, whole words up to `length` characters.

    >>> slug("A red circle, moving right!")
    'a-red-circle-moving-right'
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower().replace("_", " "))
    name = "-".join(words)[: length + 1]
    return (name if len(name) <= length else name[: max(name.rfind("-"), 0)] or name[:length]) or "prompt"


def check_ending(path: Path, *endings: str, option: str = "-o") -> None:
    """Raise click.UsageError for a name with another ending."""
    if path.suffix not in endings:
        *most, last = endings
        allowed = f"{', '.join(most)} or {last}" if most else last
        raise click.UsageError(f"{option}: got {path.name!r}; the name must end in {allowed}.")


def check_new(paths: Iterable[Path], overwrite: bool, option: str = "-o") -> None:
    """Raise ValueError for files that would be replaced, unless that was asked for."""
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(f"{there[0]}{more} already there; add --overwrite, or choose another {option}")


def writable_folder(folder: Path, option: str = "-o") -> Path:
    """Make the folder if needed and try to write in it; raises ValueError with the reason otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}; choose another {option}") from error
    return folder


def could_hold(folder: Path) -> None:
    """Raise ValueError for a folder that cannot be made or written; makes none."""
    folder = folder.absolute()
    writable_folder(next(path for path in (folder, *folder.parents) if path.exists()))


def check_table(path: Path, read: Callable[[Path], object]) -> None:
    """Raise click.UsageError or ValueError, before minutes of work, for a --csv that rows cannot be added to.

    Args:
        read: raises ValueError for a file that holds something else.
    """
    if path.is_dir():
        raise click.UsageError(f"--csv: {path} is a folder; name a file in it.")
    if path.exists():
        try:
            read(path)
        except ValueError as error:
            raise click.UsageError(f"--csv: {error}") from error
    writable_folder(path.parent, "--csv")


def add_rows(path: Path, header: str, rows: str) -> None:
    """Add lines to a table, which is replaced as a whole: it never holds half of them."""
    before = path.read_text() if path.exists() else header + "\n"
    with atomic(path) as partial:
        partial.write_text(before + rows)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder and with the same ending; it takes the final name when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and the final name stays as it was.
    """
    writable_folder(path.parent)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_still(image: str, largest: int) -> Any:
    """A file, no side above `largest` pixels, or the scene of `example:3`: uint8 `[height, width, 3]`."""
    number = example_number(image)
    if number is None:
        from vision_attn.images import read_image

        return read_image(image, largest=largest)
    import numpy as np

    from vision_attn.shapes import render
    from vision_attn.shapes.stills import sample_still

    scene = sample_still(np.random.default_rng((9, number)), height=96, width=96)
    return (255 * render(scene)[0]).round().astype(np.uint8)
