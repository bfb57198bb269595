"""What is on the disk about a job: which items are done, one line per event, one process per shard."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vision_attn.apps.batching.items import Item
from vision_attn.apps.files import writable_folder
from vision_attn.apps.job import dump

_PARTIAL = re.compile(r"\.(?P<stem>.+?)(\.small)?\.\d+(\.\w+)$")


class OutputError(OSError):
    """The folder of results cannot be written any more: nothing that follows could be kept either."""


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Errors of the disk as `OutputError`; others as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT):
            raise OutputError(error.errno, os.strerror(error.errno), error.filename) from error
        raise


def file_names(shard: tuple[int, int]) -> dict[str, str]:
    """Manifest, failures and lock; each shard has its own, so that shared disks need no locks between machines."""
    part = "" if shard[1] == 1 else f".{shard[0]}-of-{shard[1]}"
    return {"manifest": f"manifest{part}.jsonl", "failures": f"failures{part}.jsonl", "lock": f".lock{part}"}


@contextlib.contextmanager
def alone(output: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Hold the folder, or this shard of it, until the block or the process ends.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """
    writable_folder(output)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows; files still appear whole, only work is done twice
        yield
        return
    with open(output / file_names(shard)["lock"], "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            who = lock.read().strip() or "another process"
            raise ValueError(
                f"{output}: {who} is working on {'it' if shard[1] == 1 else f'shard {shard[0]}/{shard[1]}'} already; "
                "wait for it, or share the rows with --shard 0/2 and --shard 1/2"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield


def is_done(item: Item, output: Path) -> bool:
    """All files are there, and the sidecar has the hash of the item."""
    paths = item.paths(output)
    return all(path.is_file() for path in paths.values()) and recorded_hash(paths[item.endings[0]]) == item.hash


def recorded_hash(sidecar: Path) -> str | None:
    """What the sidecar says; None for one that is none."""
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("hash") if isinstance(found, dict) else None


def in_the_way(item: Item, output: Path) -> Path | None:
    """A file where a result would go that belongs to other settings, or to somebody else."""
    paths = item.paths(output)
    sidecar = paths[item.endings[0]]
    if recorded_hash(sidecar) == item.hash:  # written before the rest: an item that was cut off
        return None
    return next((path for path in paths.values() if path.exists()), None)


def clear_partials(items: Iterable[Item], output: Path, shard: tuple[int, int]) -> None:
    """Remove what killed processes left of these items and this shard; call it while `alone`."""
    names = {item.name for item in items} | {Path(file_names(shard)["failures"]).stem}
    for path in output.iterdir():
        found = _PARTIAL.fullmatch(path.name)
        if found and found["stem"] in names:
            path.unlink(missing_ok=True)


class Manifest:
    """Events of a job, one JSON object per line, appended."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, event: dict[str, Any]) -> None:
        """One line with the time in front; a line that a killed process left unfinished is ended first."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = (dump({"time": now, **event}) + "\n").encode()
        with written(), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)


def failed_before(output: Path) -> dict[str, str]:
    """Hash -> error of the items whose last event, in the manifest of any shard, is a failure."""
    events: list[tuple[str, str, str, str]] = []
    for path in output.glob("manifest*.jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                event = json.loads(line)
                events.append((event["time"], event["hash"], event["event"], str(event.get("error"))))
            except (ValueError, KeyError, TypeError):  # the start of a run, or a line that was cut off
                continue
    last = {digest: (kind, error) for _, digest, kind, error in sorted(events)}
    return {digest: error for digest, (kind, error) in last.items() if kind == "failed"}
