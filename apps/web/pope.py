"""POPE on pictures of the shapes world, for the tab *Ask*: the questions, a plot and a table of scores."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from vision_attn.apps.web.asking import Tell

if TYPE_CHECKING:
    from vision_attn.mllm.loading import Loaded
    from vision_attn.mllm.method import Method

Scores = dict[str, dict[str, dict[str, float]]]  # name -> split -> score -> value, 0 to 1
SHORT = 4  # tokens of an answer


def ask_all(loaded: Loaded, methods: tuple[Method, ...], images: int, tell: Tell) -> Scores:
    """Scores of POPE on the shapes world, without and with methods: name -> split -> `yes_no_scores`.

    Args:
        images: pictures; those with fewer than three things are not asked about.
    """
    from vision_attn.mllm import attach
    from vision_attn.mllm.exam import exam
    from vision_attn.mllm.metrics import says_yes, yes_no_scores
    from vision_attn.shapes.crowd import CELL, CELLS

    cell = loaded.model.config.vision_config.image_size // CELLS if loaded.built_in else 12 * CELL
    drawn = exam(images, cell=cell)
    rows: list[tuple[Method, ...]] = [(), methods][: 1 + bool(methods)]
    found, done = {}, 0
    for attached in rows:
        name = " + ".join(method.name for method in attached) or "as it is"
        said = {}
        with attach(loaded.model, *attached) if attached else contextlib.nullcontext():
            for question in drawn.questions:
                tell(f"Asking, {name}", done, len(rows) * len(drawn.questions))
                inputs = loaded.inputs(drawn.pictures[question.image], question.text)
                said[question] = says_yes(loaded.text(loaded.generate(inputs, SHORT).sequences))
                done += 1
        found[name] = {
            split: yes_no_scores([said[each] for each in asked], [each.label for each in asked])
            for split, asked in drawn.splits.items()
        }
    return found


def plot(found: Scores) -> np.ndarray:
    """Accuracy, false alarms and recall per split, with and without the methods, uint8 RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {
        "accuracy": "right answers",
        "false_positive_rate": "yes to absent things",
        "recall": "yes to what is there",
    }
    figure = Figure((9, 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    width = 0.8 / len(found)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for number, (name, splits) in enumerate(found.items()):
            places = np.arange(len(splits)) + (number - (len(found) - 1) / 2) * width
            bars = axes.bar(places, [scores[key] for scores in splits.values()], width, label=name,
                            color=("#2a78b8", "#e0532f")[number])  # fmt: skip
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.set_xticks(range(len(splits)), list(splits), fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def table(found: Scores) -> str:
    """The scores as Markdown."""
    keys = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "says yes"}
    lines = ["| | absent things | " + " | ".join(keys.values()) + " |", "|---|---|" + "---|" * len(keys)]
    for name, splits in found.items():
        for split, scores in splits.items():
            lines.append(f"| {name} | {split} | " + " | ".join(f"{scores[key]:.1%}" for key in keys) + " |")
    return "\n".join(lines)
