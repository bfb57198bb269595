"""Every method on the built-in model: POPE, CHAIR, and what it costs.

    python -m vision_attn.mllm.evaluate --models runs/shapes-llava* --cache CACHE

A folder keeps the answers of every method and model, so that a run goes on where the last one stopped, and several may
share it. The table is written from what the folder holds: RESULTS.md, results/evaluation.csv and results/evaluation.png
beside this file. Models are the folders that `python -m vision_attn.mllm.train` writes, one per training seed; those
with the same number of tokens a picture are averaged.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vision_attn.mllm import tiny
from vision_attn.mllm.attachment import attach
from vision_attn.mllm.comparison import GREEDY, Row, taken
from vision_attn.mllm.exam import Exam, Look, Student, exam
from vision_attn.mllm.report import cache_bytes, prefill_flops

STALE = 1800  # seconds after which another run's claim on a cell no longer counts
ROUNDS = 10  # of timing
CUTS = ("vcd", "icd", "m3id", "damro", "pai", "dola", "agla")  # methods whose `beta` rules tokens out


@dataclasses.dataclass(frozen=True)
class Questions:
    """How the exam is drawn; `partners` is the probability of each partner of an anchor."""

    images: int = 150
    partners: float = 0.5
    seed: int = 1000

    def draw(self, cell: int, calibration: bool = False) -> Exam:
        return exam(self.images, self.partners, self.seed + calibration, cell)


class Cache:
    """The answers of every row and model, one JSON file each."""

    def __init__(self, folder: Path, questions: Questions) -> None:
        self.folder, self.questions = folder, questions

    def path(self, row: Row, model: str) -> Path:
        key = hashlib.sha256(f"{row.key()} {self.questions}".encode()).hexdigest()[:10]
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', row.name.lower()).strip('-')}-{key}" / f"{model}.json"

    def read(self, row: Row, model: str) -> dict[str, Any] | None:
        path = self.path(row, model)
        return json.loads(path.read_text()) if path.exists() else None

    def store(self, row: Row, model: str, record: dict[str, Any]) -> None:
        path = self.path(row, model)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(record))
        partial.replace(path)

    @contextlib.contextmanager
    def claim(self, row: Row, model: str) -> Iterator[bool]:
        """Whether the cell is ours to fill: no other run is at it."""
        path = self.path(row, model).with_suffix(".claim")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def fingerprint(folder: Path) -> str:
    """Name of a model in the cache: of its weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def load(folder: Path) -> Student:
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Student(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval())


def take(student: Student, row: Row, questions: Questions) -> dict[str, Any]:
    """Let a model take the exam in the way of a row: answers, captions, and what the first token costs."""
    drawn, methods = questions.draw(student.cell), row.built(student)
    look = None if row.look is None else functools.partial(row.look, student)
    start = time.process_time()
    with _with(student, methods):
        said, margins = student.answer(drawn, look)
        captions = student.caption(drawn, look)
    seconds = time.process_time() - start
    record = {"said": said, "captions": captions, "seconds": seconds, **cost(student, methods, drawn, look)}
    uncut = tuple(dataclasses.replace(m, beta=0.0) if m.name in CUTS else m for m in methods)
    if uncut != methods:  # tokens that are ruled out have no margin
        with _with(student, uncut):
            margins = student.answer(drawn)[1]
    record["margins"] = margins
    if row.name == GREEDY:
        record["calibration"] = student.answer(questions.draw(student.cell, calibration=True))[1]
    return record


def _with(student: Student, methods: tuple) -> contextlib.AbstractContextManager:
    return attach(student.model, *methods) if methods else contextlib.nullcontext()


def cost(student: Student, methods: tuple, drawn: Exam, look: Look | None = None) -> dict[str, Any]:
    """What reading one prompt and saying one word takes, alone in its batch.

    FLOPs follow by formula from the tokens that reach each layer of the text model, in every pass, those of second
    branches included; the vision tower is left out. Bytes are those of all caches that the passes filled, in float32.
    Times are those of the processor, median of rounds in which the untouched model takes turns.
    """
    layers, config = student.model.get_decoder().layers, student.model.config.get_text_config()
    picture = drawn.pictures[0]

    def generate(look: Look | None) -> None:
        shown = picture if look is None else look(picture, tiny.DESCRIBE)
        student.generate(student.inputs([shown], [tiny.DESCRIBE]), 1)

    passes: list[list[int]] = []
    last = [0]
    caches: dict[int, Any] = {}

    def watch(number: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden, cache = args[0] if args else kwargs["hidden_states"], kwargs.get("past_key_values")
        if not passes or number <= last[0]:
            passes.append([0] * len(layers))  # some methods run the first or the last layers only
        last[0], passes[-1][number] = number, hidden.shape[0] * hidden.shape[1]
        if cache is not None:
            caches[id(cache)] = cache

    times: dict[str, list[float]] = {"first": [], "plain_first": []}
    with _with(student, methods) as run:
        undo = [
            layer.register_forward_pre_hook(lambda *call, number=number: watch(number, *call), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        generate(look)
        for handle in undo:
            handle.remove()
        read = None if run is None else run.report.prompts[0]
    for _ in range(ROUNDS + 2):
        for name, attached, seen in (("plain_first", (), None), ("first", methods, look)):
            with _with(student, attached):
                start = time.process_time()
                generate(seen)
                times[name].append(time.process_time() - start)
    visual = student.tokens
    return {
        "kept": visual if read is None else read.kept[0],
        "flops": sum(prefill_flops(config, one) for one in passes),
        "cache": sum(map(cache_bytes, caches.values())),
        **{name: statistics.median(found[2:]) for name, found in times.items()},
    }


def main(argv: list[str] | None = None) -> int:
    from vision_attn.mllm.results import write

    default = Questions()
    parser = argparse.ArgumentParser(
        "vision_attn.mllm.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of the models")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--rows", nargs="+", default=[], help="take only rows whose names contain one of these")
    parser.add_argument("--again", action="store_true", help="take them again, for code that has changed")
    parser.add_argument("--images", type=int, default=default.images, help="pictures of the exam")
    parser.add_argument("--partners", type=float, default=default.partners, help="probability of each usual companion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of RESULTS.md and results/")
    parser.add_argument("--table", action="store_true", help="ask nothing; write the table from what is there")
    args = parser.parse_args(argv)
    if args.images < 10 or not 0 <= args.partners <= 1 or args.threads < 1:
        parser.error("--images must be at least 10, --partners from 0 to 1, --threads at least 1")
    models = [folder / "model" if (folder / "model").is_dir() else folder for folder in args.models]
    if missing := [str(folder) for folder in models if not (folder / "model.safetensors").exists()]:
        parser.error(f"no model.safetensors in {', '.join(missing)}; train one with python -m vision_attn.mllm.train")
    wanted = [row for row in taken() if not args.rows or any(name.lower() in row.name.lower() for name in args.rows)]
    if not wanted:
        parser.error(f"no row is called like {' or '.join(args.rows)}; there are: {', '.join(r.name for r in taken())}")
    torch.set_num_threads(args.threads)
    cache = Cache(args.cache, Questions(args.images, args.partners))
    failed = [] if args.table else fill(cache, models, wanted, args.again)
    print(write(args.out, cache, models))
    for name, error in failed:
        print(f"{name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def fill(cache: Cache, models: list[Path], rows: list[Row], again: bool = False) -> list[tuple[str, str]]:
    """Take what is missing: all rows with the first model, then with the next. Returns what failed, and how."""
    failed, begun = [], time.time()
    for folder in models:
        model, student = fingerprint(folder), None
        for row in tqdm(rows, desc=folder.parent.name, disable=None):
            path = cache.path(row, model)
            if path.exists() and not (again and path.stat().st_mtime < begun):
                continue
            with cache.claim(row, model) as ours:
                if not ours:
                    continue
                student = student or load(folder)
                try:
                    cache.store(row, model, take(student, row, cache.questions))
                except Exception as error:
                    traceback.print_exc()
                    failed.append((row.name, f"{type(error).__name__}: {error}"))
    return failed


if __name__ == "__main__":
    sys.exit(main())
