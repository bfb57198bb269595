"""A job of small pictures, the processes that run it, and what it left in its folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

COLOURS, SHAPES, WAYS = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle"), ("left", "right", "up")
PRELOADED = [
    "av",
    "diffusers.pipelines.wan.pipeline_wan",
    "transformers.models.umt5.modeling_umt5",
    "transformers.tokenization_utils_tokenizers",
    "vision_attn.apps.sampling",
    "vision_attn.diffusion.loading",
]
WAIT = 900  # seconds for one run, because other work may pause this machine


def write_jobs(path: Path, count: int) -> Path:
    """Rows of one picture in one step each; every eighth asks for a smaller one."""
    with path.open("w") as file:
        for n in range(count):
            row = {"prompt": f"a {COLOURS[n % 4]} {SHAPES[n % 3]} moves {WAYS[n // 12 % 3]}", "frames": 1, "steps": 1}
            if n % 8 == 7:
                row |= {"height": 32, "width": 32}
            file.write(json.dumps(row) + "\n")
    return path


def pictures(folder: Path) -> dict[str, bytes]:
    """Name and bytes of every picture, each decoded to the last pixel."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        if not path.name.startswith("."):
            with Image.open(path) as image:
                image.load()
            found[path.name] = path.read_bytes()
    return found


def hidden(folder: Path) -> list[str]:
    """Temporary files that nobody removed; locks stay, held by nobody."""
    return sorted(path.name for path in folder.rglob(".*") if not path.name.startswith(".lock"))


def _command(arguments: list[str], log: str, setup: Callable[[], None] | None) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if setup:
        setup()
    from vision_attn.apps.cli import main

    code = main(["batch", *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def processes():
    """A function that starts `vision-attn batch` in a process of its own, with everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = []

    def start(*arguments: object, log: Path, setup: Callable[[], None] | None = None):
        process = context.Process(target=_command, args=([str(each) for each in arguments], str(log), setup))
        process.start()
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.join()


def finish(process, log: Path) -> int:
    """The exit code of a process."""
    process.join(WAIT)
    assert process.exitcode is not None, f"still running: {log.read_text()[-2000:]}"
    return process.exitcode


def made_by(folder: Path) -> list[str]:
    """The items that the manifests say were made, as often as they say it."""
    lines = [line for path in sorted(folder.glob("manifest*.jsonl")) for line in path.read_text().splitlines()]
    return [event["id"] for event in map(json.loads, lines) if event["event"] == "done"]
