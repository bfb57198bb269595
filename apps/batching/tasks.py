"""What a row can ask for: the columns of a task, what is checked without its model, and how it is made.

The columns are the options of the command of the same name, so a new option is a new column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vision_attn.apps import generate as generating
from vision_attn.apps.ask import ask
from vision_attn.apps.batching.rows import Names
from vision_attn.apps.caption import caption
from vision_attn.apps.option_types import example_number
from vision_attn.apps.pattern_options import NAMES
from vision_attn.apps.upscale import upscale

# Options that say something about the whole run, or that make no sense without somebody who looks.
_OF_THE_RUN = {"prompts", "prompts_file", "output", "overwrite", "json", "device", "dtype", "progress", "no_sink",
               "compare", "list", "checkpoint", "debug"}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """One result: `record` goes into the sidecar, `write` takes the paths by ending and writes the other files, and
    `told` is what the manifest says beside the names of the files."""

    record: dict[str, Any]
    write: Callable[[dict[str, Path]], None] | None = None
    told: dict[str, Any] | None = None


@dataclass(frozen=True)
class Task:
    """
    Args:
        columns: name -> click type of a cell.
        needed: columns without which a row says nothing; the lines of a text go into the first.
        files: columns that name a file.
        check: of the settings of a row, absolute paths in them; returns the endings of the files, the sidecar's first
            and the one that says that the item is done last. Raises click.UsageError or ValueError.
        opened: settings -> what decides which model is open.
        open: of settings, device and dtype.
        make: of an open model and settings of items; may be given several where `together` is the same.
        together: settings -> what items must share to be drawn in one call; None: always one by one.
    """

    columns: dict[str, click.ParamType]
    needed: tuple[str, ...]
    files: tuple[str, ...]
    check: Callable[[dict[str, Any]], tuple[str, ...]]
    opened: Callable[[dict[str, Any]], tuple]
    open: Callable[[dict[str, Any], str, str], Any]
    make: Callable[[Any, list[dict[str, Any]]], list[Made]]
    together: Callable[[dict[str, Any]], str] | None = None


def _columns(command: click.Command, **more: click.ParamType) -> dict[str, click.ParamType]:
    """Of a command: the long name of an option, or the name of an argument."""
    own = {max(param.opts, key=len).lstrip("-").replace("-", "_"): param.type for param in command.params}
    return {name: more.get(name, own.get(name)) for name in dict.fromkeys([*more, *own]) if name not in _OF_THE_RUN}


def _without(settings: dict[str, Any], *names: str) -> str:
    return json.dumps({key: value for key, value in settings.items() if key not in names}, sort_keys=True, default=str)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# generate

_plans: dict[str, Any] = {}  # of rows that differ in words and seed only
_infos: dict[str | None, Any] = {}


def _info(model: str | None) -> Any:
    if model not in _infos:
        from vision_attn.diffusion.loading import inspect_model

        _infos[model] = inspect_model(model)
    return _infos[model]


def _plan(settings: dict[str, Any]) -> Any:
    key = _without(settings, "prompt", "seed")
    if key not in _plans:
        given = {column: settings.get(column) for column in TASKS["generate"].columns}
        options = {name: given[name] for name in NAMES if given[name] is not None}
        typed = {name: given[name] for name in ("frames", "height", "width", "steps", "guidance", "negative")}
        named = {name: given[name] for name in ("preset", "dense_steps", "dense_layers", "times", "extend")}
        attention = given["attention"] or "dense"
        _plans[key] = generating.plan(
            _info(given["model"]), attention, options=options, typed=typed, compare=False, output=Path(), **named
        )
    return _plans[key]


def _check_generate(settings: dict[str, Any]) -> tuple[str, ...]:
    plan = _plan(settings)
    still = plan.settings["frames"] == 1 or not plan.info.video
    return (".json", ".png" if still else ".mp4")


def _open_generate(settings: dict[str, Any], device: str, dtype: str) -> Any:
    from vision_attn.diffusion.loading import load

    loaded = load(settings.get("model"), device=device, dtype=None if dtype == "auto" else dtype)
    if settings.get("lora"):
        from vision_attn.diffusion.lora import load_lora

        load_lora(loaded.pipe, settings["lora"])
    return loaded


def _make_generate(loaded: Any, batch: list[dict[str, Any]]) -> list[Made]:
    from vision_attn.apps import job as jobs
    from vision_attn.apps import media
    from vision_attn.apps.sampling import sample_batch

    plan = _plan(batch[0])
    arguments = jobs.prepare(plan, loaded, batch[0]["prompt"], "")
    prompts, seeds = ([each[name] for each in batch] for name in ("prompt", "seed"))
    made = []
    for settings, one in zip(batch, sample_batch(loaded, prompts, seeds, arguments, plan.attachment), strict=True):
        record = jobs.describe(plan, loaded, one, settings["prompt"], settings["seed"])
        if settings.get("lora"):
            record["lora"] = Path(settings["lora"]).name

        def write(paths: dict[str, Path], frames: Any = one.frames, record: dict[str, Any] = record) -> None:
            if ".png" in paths:
                media.write_picture(paths[".png"], frames[0], record)
            else:
                media.write_video(paths[".mp4"], frames, plan.info.defaults["fps"], record)

        reports = {
            name: one.reports[kind]
            for name, kind in (("report", "attention"), ("extend_report", "extension"))
            if kind in one.reports
        }
        unknown = jobs.unknown_words(loaded, settings["prompt"]) if loaded.info.built_in else []
        told = {"warning": f"the built-in model does not know {', '.join(unknown)}"} if unknown else None
        made.append(Made({**record, **reports}, write, told))
    return made


# upscale


def _check_upscale(settings: dict[str, Any]) -> tuple[str, ...]:
    height, width, times = (settings.get(name) for name in ("height", "width", "times"))
    if (height is None) != (width is None):
        raise click.UsageError(
            f"--{'height' if height is None else 'width'}: height and width go together; or use times."
        )
    if height is not None and times is not None:
        raise click.UsageError("--times and height with width both say the size; give one of them.")
    info = _info(settings.get("model"))
    if info.family.name != "Wan":
        raise click.UsageError(f"--model: upscale runs Wan pipelines, and {info.source} is {info.family.name}.")
    info.grid(settings.get("frames"), height, width)
    return (".json", ".small.mp4", ".mp4")


def _make_upscale(loaded: Any, batch: list[dict[str, Any]]) -> list[Made]:
    from vision_attn.apps.upscale import enlarge, read_video, write_videos

    (settings,) = batch
    # The command's own defaults.
    given = upscale.make_context("upscale", ["prompt", "-o", "."]).params | settings
    video = given["video"]
    clip = None if video is None else read_video(Path(video))
    asked = {
        name: given[name]
        for name in ("prompt", "strength", "frames", "steps", "guidance", "shift", "negative", "seed", "cache_device")
    } | {"cache_steps": given["cache_steps"] or None, "checkpoint": None}
    record, large, small, report = enlarge(
        loaded, clip, given["height"], given["width"], given["times"] or 2, asked, False
    )
    del record["checkpoint"]

    def write(paths: dict[str, Path]) -> None:
        write_videos(paths[".mp4"], paths[".small.mp4"], large, small, record)

    return [Made({**record, "report": report}, write)]


# ask and caption

_answering: dict[str, Any] = {}


def _methods(settings: dict[str, Any]) -> list[Any]:
    from vision_attn.apps.answering import build

    prunes, steers, options = (tuple(settings.get(name) or ()) for name in ("prune", "method", "set"))
    return build(prunes, steers, settings.get("keep"), options)


def _check_answer(settings: dict[str, Any]) -> tuple[str, ...]:
    from vision_attn.mllm.loading import inspect_model

    model = settings.get("model") or "shapes-llava"
    if model not in _answering:
        _answering[model] = inspect_model(model)
    _methods(settings)
    return (".json",)


def _open_answer(settings: dict[str, Any], device: str, dtype: str) -> Any:
    from vision_attn.mllm.loading import load

    return load(settings.get("model") or "shapes-llava", device=device, dtype=None if dtype == "auto" else dtype)


def _make_answer(loaded: Any, batch: list[dict[str, Any]]) -> list[Made]:
    from vision_attn.apps import answering
    from vision_attn.apps.job import versions

    (settings,) = batch
    question = settings.get("question") or settings.get("prompt") or "describe the image"
    there, number = None, example_number(settings["image"])
    if number is None:
        picture = answering.read_picture(settings["image"])
    else:
        picture, there = answering.draw_example(number, loaded)
    inputs = loaded.inputs(picture, question)
    if loaded.built_in:
        answering.check_words(loaded, inputs, question)
    found = answering.reply(loaded, inputs, tuple(_methods(settings)), settings.get("tokens") or 64)
    record = {
        "image": Path(settings["image"]).name,
        "question": question,
        "answer": found["answer"],
        "there": there,
        "tokens": found["tokens"],
        "model": settings.get("model") or "shapes-llava",
        "methods": found["methods"],
        "report": found["report"],
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    return [Made(record, told={"answer": found["answer"]})]


_LISTS = {"prune": Names(","), "method": Names(","), "set": Names(";")}
_ANSWER = {
    "files": ("image",),
    "check": _check_answer,
    "opened": lambda settings: ("answer", settings.get("model") or "shapes-llava"),
    "open": _open_answer,
    "make": _make_answer,
}
TASKS: dict[str, Task] = {
    "generate": Task(
        columns=_columns(generating.generate, prompt=click.STRING),
        needed=("prompt",),
        files=("lora",),
        check=_check_generate,
        opened=lambda settings: ("diffusion", settings.get("model"), settings.get("lora")),
        open=_open_generate,
        make=_make_generate,
        together=lambda settings: _without(settings, "prompt", "seed"),
    ),
    "upscale": Task(
        columns=_columns(upscale, video=click.STRING),
        needed=("prompt",),
        files=("video",),
        check=_check_upscale,
        opened=lambda settings: ("diffusion", settings.get("model"), None),
        open=_open_generate,
        make=_make_upscale,
    ),
    "caption": Task(columns=_columns(caption, image=click.STRING, **_LISTS), needed=("image",), **_ANSWER),
    "ask": Task(columns=_columns(ask, image=click.STRING, **_LISTS), needed=("image", "question"), **_ANSWER),
}
