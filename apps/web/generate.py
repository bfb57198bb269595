"""The tab *Generate*: videos and pictures from prompts, sparse next to dense, with files to keep."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vision_attn.apps.generate import EXTENDERS, SEEDS
from vision_attn.apps.web import drawing
from vision_attn.apps.web.page import HEAVY, Settings, kind
from vision_attn.apps.web.pattern_box import pattern_box, read_options

# The model's own options where these are empty and it has some.
PATTERNS = {
    "dense": "", "radial": "", "neighborhood": "", "sliding-tile": "", "window": "--size 3",
    "halo": "--block 2 --halo 1", "circle": "--radius 3", "streaming": "--window 48 --sink 8",
    "power-step": "--block 8 --window 16",
}  # fmt: skip
KEPT = 24  # results in the gallery
HELP = """A diffusion model draws from noise; the same seed is the same noise. The model that ships knows coloured
shapes, as in `a small red circle moves right`, and draws 17 frames of 48 x 48. Files carry their settings."""


def answer(
    settings: Settings,
    shown: list[tuple[str, str]],
    prompt: str,
    negative: str,
    seed: float,
    frames: float,
    height: float,
    width: float,
    steps: float,
    guidance: float,
    attention: str,
    options: str,
    extend: str,
    compare: bool,
    enlarge: float,
) -> Iterator[list[Any]]:
    """Draw, and yield what the page shows: progress, then videos, words, gallery and files.

    Args:
        shown: what the gallery holds, (path, caption).

    Raises:
        ValueError, click.UsageError: what cannot be drawn.
    """
    asked = drawing.Asked(
        prompt or "", negative or "", _whole("Seed", seed, 0, SEEDS), _whole("Frames", frames, 1, 2000),
        _whole("Height", height, 1, 8192), _whole("Width", width, 1, 8192), int(steps), float(guidance),
        attention, read_options(attention, options), extend, bool(compare), int(enlarge),
    )  # fmt: skip
    folder = settings.new_folder()
    work = functools.partial(drawing.draw, asked, _model(settings), settings.device, settings.dtype, folder)
    started = time.monotonic()
    for what, value in drawing.background(work):
        if what == "told":
            yield [drawing.progress_html(*value, started), *[gr.skip()] * 13]
        else:
            yield [f"<p>Done in {time.monotonic() - started:.0f} s.</p>", *show(value, shown)]


def _whole(name: str, value: float | None, least: int, most: int) -> int:
    if value is None or value != int(value) or not least <= value <= most:
        raise ValueError(f"{name}: got {value}.\nAllowed: whole numbers from {least} to {most}.")
    return int(value)


def _model(settings: Settings) -> str | None:
    return settings.models.get("generate")


def show(record: dict[str, Any], shown: list[tuple[str, str]]) -> list[Any]:
    """Values of the widgets but the first: result, dense and enlarged one, words, gallery (kept and shown), files."""
    files, large = record["files"], record.get("enlarged", {}).get("files", {})
    kind = "video" if "video" in files else "picture"
    sparse, dense = files[kind], files.get(f"dense {kind}")
    name = record["name"]
    caption = f"{record['prompt'][:60]} ({name}, seed {record['seed']})"
    new = [(path, f"{caption}{more}") for path, more in ((large.get("video"), ", enlarged"), (sparse, "")) if path]
    shown = [*new, *(each for each in shown if Path(each[0]).exists())][:KEPT]
    return [
        f"**{name}**: {record['seconds']:.1f} s, {drawing.share(record)} of the pairs computed",
        *_screen(sparse, kind),
        gr.Column(visible=dense is not None),
        f"**dense**: {record['dense_seconds']:.1f} s" if dense else "",
        *_screen(dense, kind),
        gr.Column(visible=bool(large)),
        large.get("video"),
        drawing.describe(record),
        shown,
        gr.Gallery(shown, visible=True),
        gr.File([*files.values(), *large.values()], visible=True),
    ]


def _screen(path: str | None, kind: str) -> list[Any]:
    """Values of a widget for a video and of one for a picture, only one of which is seen."""
    return [
        gr.Video(path if kind == "video" else None, visible=kind == "video"),
        gr.Image(path if kind == "picture" else None, visible=kind == "picture"),
    ]


def build(settings: Settings) -> None:
    """The widgets of the tab, inside an open Blocks."""
    from vision_attn.diffusion.loading import inspect_model

    info = inspect_model(_model(settings))
    own = drawing.own_settings(info)
    larger = "times; 1 leaves it out" + "; the built-in model adds shapes where there is room" * info.built_in
    first = "radial" if info.video else "dense"
    gr.Markdown(HELP)
    shown = gr.State([])
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                "a red circle moves right", label="Prompt", lines=2, max_length=drawing.PROMPT, autofocus=False
            )
            with gr.Row():
                frames = _number(own["frames"], "Frames", "4n+1; 1 is a picture", 1)
                seed = _number(0, "Seed", "0 to 4294967295", 0, SEEDS)
            with gr.Row():
                height, width = (_number(own[name], name.capitalize(), "pixels", 1) for name in ("height", "width"))
            attention, options = pattern_box(PATTERNS, first)
            compare = gr.Checkbox(True, label="Draw it with dense attention too, from the same noise")
            with gr.Accordion("More", open=False):
                negative = gr.Textbox(label="Keep out", max_length=drawing.PROMPT)
                steps = gr.Slider(1, 100, min(own["steps"], 100), step=1, label="Steps")
                guidance = gr.Slider(0, 15, own["guidance"], step=0.1, label="Guidance (strength of the prompt)")
                extend = gr.Dropdown(
                    list(EXTENDERS), value="none", label="Length extension", info="for more frames than the model's own"
                )
                enlarge = gr.Slider(1, 4, 1, step=1, label="Enlarge with FreeSwim", info=larger)
            with gr.Row():
                go = gr.Button("Draw", variant="primary")
                stop = gr.Button("Cancel", variant="stop")
        with gr.Column(scale=3, min_width=300):
            bar = gr.HTML("", elem_classes="progress")
            with gr.Row():
                with gr.Column(min_width=240):
                    drawn = _widgets("Result")
                with gr.Column(min_width=240, visible=False) as beside:
                    dense = _widgets("Dense")
            with gr.Column(visible=False) as below:
                gr.Markdown("**Enlarged** by FreeSwim")
                large = gr.Video(label="Enlarged", **_VIDEO)
            words = gr.Markdown()
            gallery = gr.Gallery(
                label="Drawn so far", height="auto", object_fit="contain", interactive=False, buttons=["download"],
                visible=False, elem_classes="drawn",
            )  # fmt: skip
            files = gr.File(
                label="Files of this run: settings are inside", file_count="multiple", interactive=False, visible=False
            )
    inputs = [
        prompt, negative, seed, frames, height, width, steps, guidance, attention, options, extend, compare, enlarge,
    ]  # fmt: skip
    outputs = [bar, *drawn, beside, *dense, below, large, words, shown, gallery, files]
    run = go.click(
        kind(functools.partial(answer, settings)), [shown, *inputs], outputs, api_name="generate",
        show_progress="hidden", **HEAVY,
    )  # fmt: skip
    stopped = functools.partial(str, "<p>Stopped; nothing was kept.</p>")
    stop.click(None, None, None, cancels=[run], api_visibility="private").then(
        stopped, None, bar, api_visibility="private", show_progress="hidden", concurrency_limit=None
    )  # through the queue, behind the last word of the run
    size = [own["height"], own["width"], own["steps"], own["guidance"]]
    rows = [["a red circle moves right", "", 0, own["frames"], *size, first, "", "none", True, 1]]
    if info.built_in:
        rows += [
            ["a blue square moves up", "circle", 1, 17, *size, "neighborhood", "--window 3,3,3", "none", True, 1],
            ["a big green triangle moves left", "", 2, 33, 48, 48, 10, 3.0, "radial", "", "riflex", False, 1],
            ["a yellow cross moves down", "", 3, 9, 48, 48, 10, 3.0, "dense", "", "none", False, 2],
            ["a white circle", "", 4, 1, *size, "circle", "--radius 4", "none", True, 1],
        ]
    titles = [f"{row[0]}, {row[8]}{_said(row)}" for row in rows]
    gr.Examples(rows, inputs, label="Examples", example_labels=titles, cache_examples=False)


def _said(row: list[Any]) -> str:
    more = [f"{row[3]} frames by {row[10]}"] if row[10] != "none" else ["a picture"] if row[3] == 1 else []
    return "".join(f", {each}" for each in [*more, *([f"{row[12]}x larger"] if row[12] > 1 else [])])


def _number(value: int, label: str, info: str, least: int, most: int | None = None) -> gr.Number:
    return gr.Number(value, label=label, info=info, minimum=least, maximum=most, precision=0, min_width=120)


_VIDEO = {"height": 340, "autoplay": True, "loop": True, "interactive": False, "show_label": False,
          "buttons": ["download"]}  # fmt: skip


def _widgets(label: str) -> list[Any]:
    """A title, and places for a video and for a picture."""
    buttons = ["download", "fullscreen"]
    picture = gr.Image(label=label, height=340, format="png", interactive=False, show_label=False, buttons=buttons,
                       visible=False, render=False)  # fmt: skip
    made = [gr.Markdown(), gr.Video(label=label, **_VIDEO), picture]
    picture.render()
    return made
