"""The tab *Results*: the tables and plots that came with the package, as its commands wrote them."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from vision_attn.apps.web.page import Settings, kind


@dataclass(frozen=True)
class Result:
    """
    Args:
        files: what was measured, relative to a package folder, the largest table first.
        text: Markdown, made when it is asked for.
        picture: a file, or a function that draws one to a path.
        command: what writes it anew.
    """

    files: tuple[tuple[str, str], ...]
    text: Callable[[], str]
    picture: tuple[str, str] | Callable[[Path], Any] | None
    command: str


def place(package: str, name: str) -> Path:
    """A file of the package, in an installed wheel as in a checkout."""
    from importlib import import_module

    inside = "vision_attn" if package == "vision_attn" else f"vision_attn.{package}"
    return Path(next(iter(import_module(inside).__path__))) / name


def page(package: str, name: str) -> str:
    """A page of Markdown without links to files beside it, which a browser could not follow."""
    text = place(package, name).read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def _kernels() -> str:
    from vision_attn.kernels.bench.report import bench_table

    return f"# Attention kernels on a CPU\n\nTimes faster than dense attention of torch.\n\n{bench_table()}"


def _kernels_drawn(path: Path) -> None:
    import csv

    from vision_attn.kernels.bench.pictures import draw_results

    with place("kernels", "results/cpu.csv").open(newline="") as file:
        draw_results(list(csv.DictReader(file)), path)


def _ranks() -> str:
    from vision_attn.kernels.bench.parallel import table

    return f"# Attention over processes\n\n{table()}"


def _layers() -> str:
    from vision_attn.bench import bench_table

    return f"# Attention layers on maps\n\nTimes faster than timm's dense attention.\n\n{bench_table()}"


def _layers_drawn(path: Path) -> None:
    from vision_attn.bench import draw, read_csv

    draw(read_csv(place("vision_attn", "results/bench.csv")), path)


RESULTS = {
    "Kernels on a CPU": Result(
        (("kernels", "results/cpu.csv"),), _kernels, _kernels_drawn, "vision-attn bench kernels"
    ),
    "Kernels over processes": Result(
        (("kernels", "results/parallel/cpu.csv"),), _ranks, None, "vision-attn bench parallel"
    ),
    "Layers on maps": Result(
        (("vision_attn", "results/bench.csv"),), _layers, _layers_drawn, "vision-attn bench vision"
    ),
    "Classifiers by attention": Result(
        (("vision_attn", "results/attention.csv"),),
        lambda: page("vision_attn", "results/README.md"),
        None,
        "python -m vision_attn.train compare",
    ),
    "Diffusion": Result(
        (("diffusion", "results/evaluation.json"), ("diffusion", "results/timings.csv")),
        lambda: page("diffusion", "RESULTS.md"),
        ("diffusion", "results/evaluation.png"),
        "python -m vision_attn.diffusion.evaluate",
    ),
    "Vision-language models": Result(
        (("mllm", "results/evaluation.csv"),),
        lambda: page("mllm", "RESULTS.md"),
        ("mllm", "results/evaluation.png"),
        "python -m vision_attn.mllm.evaluate",
    ),
}


def show(name: str, folder: Path) -> tuple[str, str | None, list[str]]:
    """Text, the path of a picture or None, and the paths of the files, copied into a folder that may be served.

    Raises:
        ValueError: no such result.
    """
    if name not in RESULTS:
        raise ValueError(f"Result: got {name!r}.\nAllowed: {', '.join(RESULTS)}.")
    result, picture = RESULTS[name], None
    if callable(result.picture):
        picture = folder / "plot.png"
        result.picture(picture)
    elif result.picture:
        picture = Path(shutil.copy(place(*result.picture), folder))
    files = [shutil.copy(place(*each), folder) for each in result.files]
    return f"{result.text()}\n\nMade by `{result.command}`.", picture and str(picture), [str(each) for each in files]


def build(settings: Settings) -> None:
    """The widgets of the tab, inside an open Blocks."""

    @functools.cache  # they do not change, and every visitor sees the first
    def once(name: str) -> tuple[str, str | None, list[str]]:
        return show(name, Path(tempfile.mkdtemp(prefix="results-", dir=settings.folder)))

    @kind
    def answer(name: str) -> list[Any]:
        text, picture, files = once(name)
        return [text, gr.Image(picture, visible=picture is not None), gr.File(files, visible=True)]

    first = next(iter(RESULTS))
    gr.Markdown("What was measured with this code, as it ships; methods that do not help are in the tables too.")
    chosen = gr.Radio(list(RESULTS), value=first, label="Result")
    text = gr.Markdown(RESULTS[first].text())
    picture = gr.Image(
        label="Plot", visible=False, interactive=False, buttons=["download", "fullscreen"],
        alt_text="The numbers of the table, drawn",
    )  # fmt: skip
    files = gr.File(label="Numbers", visible=False, file_count="multiple")
    shown = [text, picture, files]
    Context.root_block.load(answer, chosen, shown, api_visibility="private", show_progress="hidden", queue=False)
    chosen.change(answer, chosen, shown, api_name="results", show_progress="minimal")
