"""What the tab *Generate* does behind its widgets: one prompt drawn to files, in a thread that can be stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import inspect
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LARGEST = 16  # times the pixels of the model's own video; more is left to the command line
PROMPT = 500  # characters
STRENGTH = 0.7  # share of the steps that FreeSwim repeats on the enlarged video
EVERY = 0.5  # seconds after which the page is told that a run goes on
Tell = Callable[[str, int, int], None]  # what is being done, steps done, steps in all (0: not known)

_one = threading.Lock()  # a pipeline with something attached serves one run; a stopped one ends with its step


class Stopped(Exception):
    """Somebody pressed Cancel, or left the page."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be drawn.

    Args:
        prompt: what to draw.
        negative: what to keep out.
        seed: of the noise.
        frames, height, width: in pixels; 1 frame is a picture.
        steps: of denoising. guidance: strength of the prompt.
        attention: a pattern by name. options: of it.
        extend: how a video longer than the model's own is drawn; "none" is the untouched model.
        compare: also draw with dense attention.
        enlarge: size of a second, larger video by FreeSwim, as a multiple; 1 for none.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    frames: int = 17
    height: int = 48
    width: int = 48
    steps: int = 20
    guidance: float = 3.0
    attention: str = "dense"
    options: dict[str, Any] | None = None
    extend: str = "none"
    compare: bool = False
    enlarge: int = 1


@functools.lru_cache(maxsize=1)
def load_pipeline(model: str | None, device: str, dtype: str) -> Any:
    """The pipeline, kept for the next run."""
    import diffusers.utils.logging
    import transformers.utils.logging

    from vision_attn.diffusion.loading import load

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    loaded = load(model, device=device, dtype=None if dtype == "auto" else dtype)
    return dataclasses.replace(loaded, info=_for_visitors(loaded.info))


def _for_visitors(info: Any) -> Any:
    """What is known of a model, without the folder on this machine: it would travel inside of the files."""
    return dataclasses.replace(info, source=Path(info.source).name) if Path(info.source).is_dir() else info


def own_settings(info: Any) -> dict[str, Any]:
    """Frames, height, width, steps and guidance that suit a model; common ones where it does not say."""
    common = {"frames": 81 if info.video else 1, "height": 480, "width": 832, "steps": 50, "guidance": 5.0}
    return {name: info.defaults.get(name) or value for name, value in common.items()}


def plan(asked: Asked, model: str | None, folder: Path) -> Any:
    """The job of `vision_attn.apps.job`, checked without the weights of the model.

    Raises:
        ValueError, click.UsageError: what cannot be drawn.
    """
    from vision_attn.apps import job as jobs
    from vision_attn.diffusion.lengths import tokens_of
    from vision_attn.diffusion.loading import inspect_model

    if not asked.prompt.strip():
        raise ValueError("The prompt is empty.\nDescribe what to draw, such as: a red circle moves right.")
    for name, text in (("prompt", asked.prompt), ("negative prompt", asked.negative)):
        if len(text) > PROMPT:
            raise ValueError(f"The {name} is {len(text)} characters long.\nAllowed: {PROMPT}.")
    info = inspect_model(model)
    suits = own_settings(info)
    own = [suits[name] for name in ("frames", "height", "width")]
    pixels = asked.frames * asked.height * asked.width * asked.enlarge**2
    if pixels > LARGEST * own[0] * own[1] * own[2]:
        raise ValueError(
            f"{asked.frames} frames of {asked.height} x {asked.width}, {asked.enlarge}x enlarged, are "
            f"{pixels / (own[0] * own[1] * own[2]):.0f} times the model's own {' x '.join(map(str, own))}.\n"
            f"This page draws up to {LARGEST} times; the command line has no limit."
        )
    if asked.enlarge > 1 and (info.family.name != "Wan" or asked.frames == 1):
        raise ValueError("FreeSwim enlarges videos of Wan models.\nChoose more frames and such a model, or enlarge 1x.")
    if asked.enlarge > 1 and int(STRENGTH * asked.steps) < 1:
        raise ValueError(f"Steps: got {asked.steps}, of which FreeSwim repeats {STRENGTH:.0%}.\nChoose 2 or more.")
    typed = {name: getattr(asked, name) for name in ("frames", "height", "width", "steps", "guidance")}
    info.grid(asked.frames, asked.height, asked.width)
    times = None
    if asked.extend == "ultravico" and asked.attention != "dense":
        raise ValueError(
            f"UltraViCo changes the same attention as {asked.attention}.\nChoose another extension, or dense attention."
        )
    if asked.extend != "none":
        if asked.frames <= own[0]:
            raise ValueError(
                f"{asked.frames} frames are no more than the model's own {own[0]}, so there is nothing to extend.\n"
                f"Choose more frames, or no extension."
            )
        times = tokens_of(info.token, asked.frames) / tokens_of(info.token, own[0])
        typed["frames"] = None
    sparse = asked.attention != "dense" or times is not None
    typed["negative"] = asked.negative.strip() or None
    return jobs.plan(
        _for_visitors(info), asked.attention, asked.options or {}, typed,
        dense_steps=None, dense_layers=None, with_dense=asked.compare and sparse, output=folder,
        times=times, extend=asked.extend,
    )  # fmt: skip


def draw(asked: Asked, model: str | None, device: str, dtype: str, folder: Path, tell: Tell) -> dict[str, Any]:
    """Draw, write the files, and return the record of `vision_attn.apps.job.run`.

    With `enlarge`, the record holds that of `vision_attn.apps.upscale` as `enlarged`; `notes` are warnings for people.

    Args:
        tell: called before every call of the denoiser and after every step; an exception that it raises ends the run,
            and `folder` is removed.
    """
    try:
        return _draw(asked, model, device, dtype, folder, tell)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _draw(asked: Asked, model: str | None, device: str, dtype: str, folder: Path, tell: Tell) -> dict[str, Any]:
    from vision_attn.apps import job as jobs

    job = plan(asked, model, folder)
    with _waited(tell):
        tell("Loading the model", 0, 0)
        loaded = load_pipeline(model, device, dtype)
        notes = []
        if job.info.built_in and (unknown := jobs.unknown_words(loaded, f"{asked.prompt} {asked.negative}")):
            words = sorted(word for word in loaded.pipe.tokenizer.get_vocab() if not word.startswith("<"))
            notes.append(f"The built-in model does not know {', '.join(unknown)}. It knows: {', '.join(words)}.")
        phase = _Phase(tell, job)
        with watched(loaded.pipe, phase.call):
            phase.name = "Warming up"
            arguments = jobs.prepare(job, loaded, asked.prompt, "")
            if "callback_on_step_end" in inspect.signature(type(loaded.pipe).__call__).parameters:
                arguments["callback_on_step_end"] = phase.step
            phase.name = "Drawing"
            record = jobs.run(job, loaded, arguments, asked.prompt, asked.seed, "")
            if asked.enlarge > 1:
                phase.name = f"Enlarging {asked.enlarge}x"
                record["enlarged"] = _enlarge(asked, job, loaded, record, phase.count)
    for made in (record, record.get("enlarged")):
        if made:
            _name_files(made)
    return {**record, "notes": notes}


def _name_files(record: dict[str, Any]) -> None:
    """Write the JSON file anew: it names the files beside it, and not where this machine kept them."""
    from vision_attn.apps.files import atomic
    from vision_attn.apps.job import dump

    names = {key: Path(path).name for key, path in record["files"].items()}
    said = {key: value for key, value in record.items() if key != "enlarged"}
    with atomic(Path(record["files"]["settings"])) as partial:
        partial.write_text(dump({**said, "files": names}, indent=2) + "\n", encoding="utf-8")


class _Phase:
    """Counts steps, over the sparse and the dense run."""

    def __init__(self, tell: Tell, job: Any) -> None:
        self.tell, self.name = tell, ""
        self.done, self.total = 0, (job.settings["steps"] or 0) * (2 if job.compare else 1)

    def call(self) -> None:
        self.tell(self.name, self.done, self.total)

    def step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.count(self.done + 1, self.total)
        return {}

    def count(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.call()


def _enlarge(asked: Asked, job: Any, loaded: Any, record: dict[str, Any], count: Callable) -> dict[str, Any]:
    from vision_attn.apps.upscale import draw as upscale
    from vision_attn.apps.upscale import read_video

    small = Path(record["files"]["video"])
    endings = {"video": ".large.mp4", "small video": ".small.mp4", "sheet": ".large.sheet.png",
               "settings": ".large.json"}  # fmt: skip
    paths = {kind: small.with_name(small.stem + ending) for kind, ending in endings.items()}
    settings = {
        "prompt": asked.prompt, "negative": asked.negative.strip() or None, "seed": asked.seed, "video": small.name,
        "strength": STRENGTH, "cache_steps": 2, "frames": None, "steps": asked.steps, "guidance": asked.guidance,
        "shift": None, "checkpoint": None,
    }  # fmt: skip
    made = upscale(loaded, read_video(small), None, None, asked.enlarge, settings, paths, count)
    paths["small video"].unlink()  # the video that was drawn, once more
    made["files"].pop("small video")
    return made


@contextlib.contextmanager
def watched(pipe: Any, look: Callable[[], None]) -> Iterator[None]:
    """Call `look` before every call of the pipeline's denoisers; what it raises ends the pipeline's call."""
    from vision_attn.diffusion.attachment import denoisers

    hooks = [module.register_forward_pre_hook(lambda *_: look()) for module in denoisers(pipe)[1].values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _waited(tell: Tell) -> Iterator[None]:
    """The one slot of the pipeline, as soon as a run that was stopped has ended."""
    while not _one.acquire(timeout=EVERY):
        tell("Waiting for the run before to end", 0, 0)
    try:
        yield
    finally:
        _one.release()


def background(work: Callable[[Tell], Any]) -> Iterator[tuple[str, Any]]:
    """Run `work(tell)` in a thread; yields ("told", (what, done, total)), and at the end ("result", its value).

    The last word is repeated every half second, so that whoever listens notices when nobody does. Closing the iterator
    makes the next `tell` raise `Stopped` inside of `work`; the thread then ends by itself.

    >>> list(background(lambda tell: 7))
    [('result', 7)]
    """
    news: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def tell(what: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Stopped
        news.put(("told", (what, done, total)))

    def run() -> None:
        try:
            news.put(("result", work(tell)))
        except Stopped:
            pass
        except BaseException as error:
            news.put(("raised", error))

    threading.Thread(target=run, daemon=True, name="vision-attn-draw").start()
    kind, value = "told", ("Starting", 0, 0)
    try:
        while True:
            with contextlib.suppress(queue.Empty):
                kind, value = news.get(timeout=EVERY)
                while kind == "told":  # only the last word counts
                    kind, value = news.get_nowait()
            if kind == "raised":
                raise value
            yield kind, value
            if kind == "result":
                return
    finally:
        stop.set()


def progress_html(what: str, done: int, total: int, started: float) -> str:
    """A bar with steps, seconds and what is left, as HTML.

    >>> progress_html("Drawing", 1, 4, time.monotonic())  # doctest: +ELLIPSIS
    '<progress style="width: 100%" aria-label="Drawing" value="1" max="4"></progress><p>Drawing: step 1 of 4, 0 s, ...'
    """
    passed = time.monotonic() - started
    text = f"{what}: " if total else f"{what}, "
    if total:
        text += f"step {done} of {total}, "
    text += f"{passed:.0f} s"
    if done:
        text += f", about {passed / done * (total - done):.0f} s left"
    place = f' value="{done}" max="{total}"' if total else ""
    return (
        f'<progress style="width: 100%" aria-label="{html.escape(what)}"{place}></progress><p>{html.escape(text)}</p>'
    )


def describe(record: dict[str, Any]) -> str:
    """What was drawn, as Markdown."""
    size = f"{record['frames']} x {record['height']} x {record['width']}"
    rows = [("", "time", "pairs computed"), (record["name"], f"{record['seconds']:.2f} s", share(record))]
    if "comparison" in record:
        rows.append(("dense", f"{record['dense_seconds']:.2f} s", "100%"))
    if "enlarged" in record:
        large = record["enlarged"]
        rows.append((f"FreeSwim to {large['height']} x {large['width']}", f"{large['seconds']:.2f} s", ""))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|")
    text = [f"**{size}, seed {record['seed']}, {record['steps']} steps**", "\n".join(lines)]
    if "comparison" in record:
        found = record["comparison"]
        psnr = "identical pixels" if found["psnr"] is None else f"PSNR {found['psnr']:.1f} dB"
        text.append(f"{found['speedup']:.2f}x as fast as dense; {psnr}, SSIM {found['ssim']:.3f} against it.")
    reports = [record[key] for key in ("report", "extend_report") if record.get(key)]
    text += [f"Warning: {note}" for report in reports for note in report.get("warnings", ())]
    return "\n\n".join([*text, *record["notes"]])


def share(record: dict[str, Any]) -> str:
    """The share of query-key pairs that was computed."""
    reports = [record[key] for key in ("report", "extend_report") if record.get(key)]
    kept = [each["kept"] for report in reports for each in report["denoisers"] if each.get("kept") is not None]
    return f"{min(kept):.1%}" if kept else "100%"
