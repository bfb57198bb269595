"""Items into files on this machine: one model open at a time, one bad item costs itself only."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.batching.items import Item
from vision_attn.apps.batching.manifest import (
    Manifest,
    OutputError,
    clear_partials,
    failed_before,
    file_names,
    in_the_way,
    is_done,
    written,
)
from vision_attn.apps.batching.tasks import TASKS, Made
from vision_attn.apps.files import atomic
from vision_attn.apps.job import dump


@dataclass(frozen=True)
class Place:
    """Where and how a worker works; plain values that travel between processes.

    Args:
        output: folder.
        device: auto, cpu, cuda, cuda:1.
        dtype: auto, float32, bfloat16, float16.
        batch: most items in one call of a model.
    """

    output: Path
    device: str = "auto"
    dtype: str = "auto"
    batch: int = 1


class Worker:
    """Makes items; the model of the last one stays open for the next."""

    def __init__(self, place: Place):
        self.place = place
        self.opened: tuple | None = None
        self.model: Any = None
        self.batch = place.batch

    def work(self, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Make items and yield an event for each, "done" or "failed", when its files are there.

        Raises:
            OutputError: results cannot be written any more.
        """
        for _, same in itertools.groupby(items, _together):
            waiting = list(same)
            while waiting:
                part, waiting = waiting[: self.batch], waiting[self.batch :]
                yield from self._part(part)

    def _part(self, items: list[Item]) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        try:
            self._open(items[0])
            start = time.perf_counter()
            made = TASKS[items[0].task].make(self.model, [item.settings for item in items])
        except Exception as error:
            if len(items) == 1:
                yield _event("failed", items[0], error=_said(error), seconds=round(time.perf_counter() - start, 3))
                return
            small = out_of_memory(error)
        else:
            share = (time.perf_counter() - start) / len(items)
            for item, one in zip(items, made, strict=True):
                yield self._kept(item, one, share)
            return
        # Out of the except block, whose traceback holds the tensors of the call that failed.
        half = -(-len(items) // 2)
        if small:
            self.batch = min(self.batch, half)
            _free()
        for part in (items[:half], items[half:]):
            yield from self._part(part)

    def _open(self, item: Item) -> None:
        task = TASKS[item.task]
        key = task.opened(item.settings)
        if key == self.opened:
            return
        self.model = self.opened = None
        _free()
        self.model = task.open(item.settings, self.place.device, self.place.dtype)
        self.opened = key
        self.batch = self.place.batch

    def _kept(self, item: Item, made: Made, seconds: float) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            with written():
                store(item, made, self.place.output)
        except OutputError:
            raise
        except Exception as error:  # an encoder that refuses, for example
            return _event("failed", item, error=_said(error), seconds=round(seconds, 3))
        seconds += time.perf_counter() - start
        files = [path.name for path in item.paths(self.place.output).values()]
        return _event("done", item, seconds=round(seconds, 3), files=files, **(made.told or {}))


def store(item: Item, made: Made, output: Path) -> None:
    """Write the files of an item so that it is done when its last one is there, and never looks done before."""
    paths = item.paths(output)
    for path in reversed(paths.values()):
        path.unlink(missing_ok=True)
    record = {"id": item.name, "task": item.task, **made.record, "hash": item.hash}
    with atomic(paths[item.endings[0]]) as partial:
        partial.write_text(dump(record, indent=2) + "\n", encoding="utf-8")
    if made.write:
        made.write(paths)


def out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the machine."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))
    )


def _together(item: Item) -> Any:
    """What items that may be made in one call share; unique for items that are made alone."""
    task = TASKS[item.task]
    return (item.task, task.together(item.settings)) if task.together else (item.task, item.name)


def _event(kind: str, item: Item, **more: Any) -> dict[str, Any]:
    return {"event": kind, "id": item.name, "row": item.row, "hash": item.hash, **more}


def _said(error: BaseException) -> str:
    if out_of_memory(error):
        return "out of memory; ask for a smaller size or fewer frames, or a GPU with more memory"
    text = error.message if isinstance(error, click.ClickException) else str(error).strip()
    expected = isinstance(error, (click.ClickException, ValueError, TypeError, OSError, ImportError, RuntimeError))
    return text if expected and text else f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Survey:
    """What a job has to do: items by what was found of them in the folder."""

    todo: list[Item] = field(default_factory=list)
    done: list[Item] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # name -> error, of items that are not tried again
    blocked: list[Path] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


def survey(items: Sequence[Item], output: Path, shard: tuple[int, int], retry: bool, overwrite: bool) -> Survey:
    """Look which items of this shard are done, which failed before, and which have files of others in their way.

    Args:
        retry: try again what failed.
        overwrite: files of others will be replaced.
    """
    found = Survey(items=[item for item in items if (item.row - 1) % shard[1] == shard[0]])
    before = {} if retry else failed_before(output)
    for item in found.items:
        if is_done(item, output):
            found.done.append(item)
            continue
        blocking = None if overwrite else in_the_way(item, output)
        if blocking:
            found.blocked.append(blocking)
        elif item.hash in before:
            found.failed[item.name] = before[item.hash]
        else:
            found.todo.append(item)
    # Rows that share a model follow each other, so that each model is opened once; then those of one call.
    order: dict[Any, int] = {}

    def turn(item: Item) -> tuple[int, int]:
        keys = (TASKS[item.task].opened(item.settings), _together(item))
        return tuple(order.setdefault(key, len(order)) for key in keys)

    found.todo.sort(key=turn)
    return found


def run(
    found: Survey,
    place: Place,
    shard: tuple[int, int],
    events: Callable[[list[Item], Place], Iterator[dict[str, Any]]] | None = None,
    each: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Make what is to do, and keep the manifest and failures.jsonl; call it while `manifest.alone`.

    Args:
        events: makes items and yields an event for each, in any order; `Worker.work` on this machine unless given.
        each: called with every event.

    Returns:
        Counts: items, done, skipped, failed, seconds.

    Raises:
        OutputError: results cannot be written any more. What is done stays.
    """
    names = file_names(shard)
    manifest = Manifest(place.output / names["manifest"])
    start = time.perf_counter()
    clear_partials(found.todo, place.output, shard)
    errors = dict(found.failed)
    made = 0
    manifest.add({"event": "start", "items": len(found.items), "todo": len(found.todo), "shard": list(shard)})
    stream = events(found.todo, place) if events else Worker(place).work(found.todo)
    try:
        with closing(stream):
            for event in stream:
                manifest.add(event)
                if event["event"] == "failed":
                    errors[event["id"]] = event["error"]
                else:
                    made += 1
                each(event)
    finally:
        _write_failures(place.output / names["failures"], found.items, errors)
    counts = {
        "items": len(found.items),
        "done": made,
        "skipped": len(found.done),
        "failed": len(errors),
        "seconds": round(time.perf_counter() - start, 3),
    }
    manifest.add({"event": "end", **counts})
    return counts


def _write_failures(path: Path, items: list[Item], errors: dict[str, str]) -> None:
    """Rows that failed, with the error, to be given as a job file; no file when there are none."""
    with written():
        if not errors:
            path.unlink(missing_ok=True)
            return
        rows = [dump(item.failure(errors[item.name])) for item in items if item.name in errors]
        with atomic(path) as partial:
            partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
