"""File names, and writing without ever leaving half a file under its final name."""

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def slug(prompt: str, length: int = 48) -> str:
    """A file name made of the words of a prompt, whole words up to `length` characters.

    >>> slug("A red circle, moving right!")
    'a-red-circle-moving-right'
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower().replace("_", " "))
    name = "-".join(words)[: length + 1]
    return (name if len(name) <= length else name[: max(name.rfind("-"), 0)] or name[:length]) or "prompt"


def check_new(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise ValueError for files that would be replaced, unless that was asked for."""
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(f"{there[0]}{more} already there; add --overwrite, or choose another -o")


def writable_folder(folder: Path) -> Path:
    """Make the folder if needed and try to write in it; raises ValueError with the reason otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}; choose another -o") from error
    return folder


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
