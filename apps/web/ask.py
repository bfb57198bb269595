"""The tab *Ask*: a question about a picture, to a model as it is and with methods, and a small POPE run."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from vision_attn.apps.web import asking
from vision_attn.apps.web import pope as exam
from vision_attn.apps.web.asking import NONE
from vision_attn.apps.web.drawing import background, progress_html
from vision_attn.apps.web.page import HEAVY, Settings, kind, picture_input, read_picture

EXAMPLES = Path(__file__).parent / "examples"
PICTURES = (5, 50)  # of a POPE run: at least, at most
HELP = """A vision-language model answers twice: as it is, and with a method that drops visual tokens, or steers, or
both. The model that ships expects things that usually come together, and names some that are not there. It knows
coloured shapes only (`is there a red circle in the image?`, `describe the image`)."""
POPE = """**POPE**: is there a ... in the image? Half of the things asked for are absent: drawn at random, or popular,
or adversarial, which usually come with what is there. Pictures are of the shapes world, whose truth is known."""

_one = threading.Lock()  # a model with something attached serves one run


def answer(
    settings: Settings,
    image: str | None,
    question: str,
    prune: str,
    keep: float,
    steer: str,
    options: str,
    tokens: float,
) -> Iterator[list[Any]]:
    """Answer, and yield what the page shows: progress; answer, picture and words of the plain model and with the
    methods; the report.

    Raises:
        ValueError, click.UsageError: something that cannot be asked.
    """
    methods = asking.methods_of(prune, keep, steer, options)
    question = asking.check_question(question)
    picture = read_picture(image)

    def work(tell: asking.Tell) -> list[dict[str, Any]]:
        with asking.held(_one, tell):
            loaded = asking.load_model(settings.models.get("ask"), settings.device, settings.dtype)
            return asking.ask(loaded, picture, question, methods, int(tokens), tell)

    started = time.monotonic()
    for what, value in background(work):
        if what == "told":
            yield [progress_html(*value, started), *[gr.skip()] * 7]
        else:
            yield [f"<p>Done in {time.monotonic() - started:.0f} s.</p>", *_shown(value)]


def _shown(found: list[dict[str, Any]]) -> list[Any]:
    boxes = []
    for each in [*found, None][:2]:
        if each is None:
            boxes += [gr.Textbox("", label="With nothing attached there is no second answer"), None, None]
        else:
            name = "The model as it is" if not each["attached"] else f"With {each['name']}"
            label = f"{name}: {each['tokens']} tokens, {each['seconds']:.2f} s"
            picture = gr.Image(each["picture"], label=each["what"])
            boxes += [gr.Textbox(each["answer"] or "(nothing)", label=label), picture, each["words"]]
    text = found[-1]["text"]
    return [*boxes, f"```text\n{text}\n```" if text else "Choose a method to get its report."]


def pope(settings: Settings, prune: str, keep: float, steer: str, options: str, images: float) -> Iterator[list[Any]]:
    """Ask POPE's questions about `images` pictures, and yield progress, then a plot and a table of scores.

    Raises:
        ValueError, click.UsageError: methods that cannot be attached.
    """
    methods = asking.methods_of(prune, keep, steer, options)
    if images is None or images != int(images) or not PICTURES[0] <= images <= PICTURES[1]:
        raise ValueError(f"Pictures: got {images}.\nAllowed: whole numbers from {PICTURES[0]} to {PICTURES[1]}.")

    def work(tell: asking.Tell) -> exam.Scores:
        with asking.held(_one, tell):
            loaded = asking.load_model(settings.models.get("ask"), settings.device, settings.dtype)
            return exam.ask_all(loaded, methods, int(images), tell)

    started = time.monotonic()
    for what, value in background(work):
        if what == "told":
            yield [progress_html(*value, started), gr.skip(), gr.skip()]
        else:
            done = f"<p>Done in {time.monotonic() - started:.0f} s.</p>"
            yield [done, exam.plot(value), exam.table(value)]


def build(settings: Settings) -> None:
    """The widgets of the tab, inside an open Blocks."""
    own = settings.models.get("ask")
    built_in = asking.is_built_in(own)
    prunes, steers = asking.choices(built_in)
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = picture_input(height=260)
            question = gr.Textbox(
                "describe the image", label="Question", lines=2, max_length=asking.QUESTION, autofocus=False
            )
            prune = gr.Dropdown([NONE, *prunes], value="fastv", label="Drop visual tokens", info=asking.about("fastv"))
            keep = gr.Slider(0.02, 1, 0.25, step=0.01, label="Share of them that stays")
            steer = gr.Dropdown([NONE, *steers], value=NONE, label="Steer the answer", info=asking.about(NONE))
            options = gr.Textbox(
                "", label="Options of the methods", lines=2, max_lines=6, max_length=asking.OPTIONS,
                placeholder="one per line, such as alpha=0.5", info=asking.takes("fastv", NONE),
            )  # fmt: skip
            tokens = gr.Slider(1, 256, 64, step=1, label="Longest answer", info="tokens")
            with gr.Row():
                go = gr.Button("Ask", variant="primary", min_width=120)
                stop = gr.Button("Cancel", variant="stop", min_width=120)
        with gr.Column(scale=3, min_width=300):
            bar = gr.HTML("", elem_classes="progress")
            with gr.Row():
                plain, attached = (_answer_column(label) for label in ("The model as it is", "With the methods"))
            report = gr.Markdown(elem_classes="report")
    with gr.Accordion("POPE: does it see what is not there?", open=False):
        gr.Markdown(POPE)
        images = gr.Slider(*PICTURES, 10, step=1, label="Pictures", info="about six questions each, answered twice")
        with gr.Row():
            test = gr.Button("Test the model and the methods above", variant="primary", min_width=200)
            halt = gr.Button("Cancel", variant="stop", min_width=120)
        done = gr.HTML("", elem_classes="progress")
        plot = gr.Image(label="POPE", format="png", interactive=False, buttons=["download", "fullscreen"])
        table = gr.Markdown()

    methods = [prune, keep, steer, options]
    inputs = [image, question, *methods, tokens]
    outputs = [bar, *plain, *attached, report]
    run = go.click(
        kind(functools.partial(answer, settings)), inputs, outputs, api_name="ask", show_progress="hidden", **HEAVY
    )
    tested = test.click(
        kind(functools.partial(pope, settings)), [*methods, images], [done, plot, table], api_name="pope",
        show_progress="hidden", **HEAVY,
    )  # fmt: skip
    quiet: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    for button, event, place in ((stop, run, bar), (halt, tested, done)):
        button.click(lambda: "<p>Stopped.</p>", None, place, cancels=[event], **quiet)

    def describe(prune: str, steer: str) -> list[Any]:
        return [
            gr.Dropdown(info=asking.about(prune)),
            gr.Slider(interactive=asking.takes_keep(prune)),
            gr.Dropdown(info=asking.about(steer)),
            gr.Textbox(info=asking.takes(prune, steer)),
        ]

    def suggest(prune: str, steer: str) -> str:
        return asking.suggested(prune, steer) if built_in else ""

    gr.on([prune.change, steer.change], describe, [prune, steer], methods, **quiet)
    gr.on([prune.input, steer.input], suggest, [prune, steer], options, **quiet)
    rows = [
        ("crowd-9.png", "describe the image", "fastv", 0.25, NONE),
        ("crowd-9.png", "is there a green cross in the image?", NONE, 0.25, "vcd"),
        ("crowd-5.png", "describe the image", "holov", 0.5, "vhr"),
        ("crowd-5.png", "is there a blue square in the image?", "sparsevlm", 0.25, NONE),
        ("crowd-2.png", "describe the image", NONE, 0.25, "gift"),
    ]
    gr.Examples(
        [
            [str(EXAMPLES / name), asked, first, share, second, asking.suggested(first, second), 64]
            for name, asked, first, share, second in rows
        ],
        inputs,
        label="Examples",
        cache_examples=False,
        api_visibility="private",
    )


def _answer_column(label: str) -> list[Any]:
    with gr.Column(min_width=240):
        said = gr.Textbox(label=label, lines=2, interactive=False, buttons=["copy"])
        picture = gr.Image(
            label="What stays, or is looked at", format="png", interactive=False, buttons=["download", "fullscreen"]
        )
        words = gr.Gallery(
            label="Where each word looks", columns=3, height="auto", interactive=False, format="png",
            object_fit="contain", buttons=["download", "fullscreen"],
        )  # fmt: skip
    return [said, picture, words]
