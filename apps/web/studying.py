"""What the tab *Backbones* does behind its widgets: a model by name, and everything shown of one picture."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.apps.option_types import nearest
from vision_attn.apps.web import shapes_vit

BUILT_IN = ("nat_shapes", "biformer_shapes", shapes_vit.NAME)
LARGEST_MODEL = 400  # million parameters; more is left to the command line
NUMBERS = {
    "entropy": "entropy", "share": "of largest", "distance": "distance", "off_grid": "off grid", "sink": "on one key",
}  # fmt: skip


def check_name(name: Any, own: str | None) -> str:
    """The name of a model of timm; a folder only where it is the app's `own` model, from the command line.

    Raises:
        ValueError: no such model.
    """
    import timm

    import vision_attn.backbones  # noqa: F401

    name = str(name or "").strip()
    if name in BUILT_IN or name == own or (name and timm.is_model(name)):
        return name
    near = nearest(name, [*BUILT_IN, *timm.list_models()])
    raise ValueError(f"There is no model {name[:80]!r} in timm{near}\nTry {BUILT_IN[0]} or vit_tiny_patch16_224.")


@functools.lru_cache(maxsize=2)
def load_model(name: str, random: bool, device: str) -> Any:
    """The model, kept for the next picture.

    Raises:
        ValueError: too large, or no trained weights.
    """
    from vision_attn.apps.looking import load
    from vision_attn.devices import resolve_device

    if name == shapes_vit.NAME:
        return shapes_vit.load(random).to(resolve_device(device))
    if name not in BUILT_IN and not Path(name).is_dir():
        millions = _parameters(name) / 1e6
        if millions > LARGEST_MODEL:
            raise ValueError(
                f"{name} has {millions:.0f} million parameters; this page takes up to {LARGEST_MODEL}.\n"
                f"Run: vision-attn attention IMAGE --model {name} -o maps.png"
            )
    try:
        return load(name, resolve_device(device), random)
    except ValueError as error:
        if random:
            raise
        raise ValueError(f"{error}\nChoose random weights to see how it computes without them.") from error


def _parameters(name: str) -> int:
    import timm
    import torch

    try:
        with torch.device("meta"):
            return sum(each.numel() for each in timm.create_model(name).parameters())
    except (NotImplementedError, RuntimeError):  # some models compute with their weights while they are made
        return 0


@functools.lru_cache(maxsize=64)
def refused(name: str) -> str:
    """Why no pattern goes into a model, or nothing: it takes one, or only its weights can tell.

    Nothing is computed; the model is made without memory for its weights.
    """
    import timm
    import torch

    from vision_attn import Neighborhood, attach

    try:
        with torch.device("meta"):
            model = shapes_vit.build() if name == shapes_vit.NAME else timm.create_model(name)
    except (NotImplementedError, RuntimeError):
        return ""
    try:
        with attach(model, Neighborhood(1)):
            return ""
    except (TypeError, ValueError):
        return f"No pattern goes into {name}: they go into ViTs and Swins. Choose dense, or {shapes_vit.NAME}."


def study(
    picture: np.ndarray,
    model: Any,
    name: str,
    asked: dict[str, Any],
    pattern: Any = None,
    random: bool = False,
    top: int = 3,
) -> dict[str, Any]:
    """Everything the tab shows.

    Args:
        picture: uint8 RGB.
        model: from timm.
        name: to write above the maps.
        asked: method, query, layers, heads, target, as `vision_attn.apps.looking.look` takes them.
        pattern: to attach; None for the model alone.
        random: the weights are random, so labels mean nothing.
        top: how many labels.

    Returns:
        seen (what the model sees), sheet (the maps), pair (before and after, for a slider), layers (numbers per layer,
        with the pattern where there is one), labels (name -> probability, before and after), report (Markdown).
    """
    from vision_attn import attach
    from vision_attn.apps.looking import look
    from vision_attn.apps.overlay import ring
    from vision_attn.images import model_input

    x, seen = model_input(picture, model)
    result, sheet = look(picture, model, name, asked, untrained=random)
    found = {"labels": [_labels(model, x, top), None], "pair": _pair(seen, result, None, asked["query"])}
    lines = []
    if pattern is not None:
        with attach(model, pattern) as run:
            report = run.measure(x, repeats=3)
            found["labels"][1] = _labels(model, x, top)
        dense = result
        result, sheet = look(picture, model, name, asked, pattern, untrained=random)
        found["pair"] = _pair(seen, dense, result, asked["query"])
        lines += _report(report)
    layers = result["layers"]
    if not layers:  # saliency has none, and a model without softmax attention has none to give
        try:
            layers = look(picture, model, name, {**asked, "method": "attention", "query": "mean"}, pattern)[0]["layers"]
        except ValueError as error:
            lines.append(f"No numbers per head: {error}.")
    place = asked["query"]
    found["seen"] = ring(enlarged(seen), place) if isinstance(place, tuple) else enlarged(seen)
    return {**found, "sheet": sheet, "layers": layers, "report": "\n\n".join(lines)}


def enlarged(picture: np.ndarray, side: int = 384) -> np.ndarray:
    """A small picture pixel by pixel larger, so that browsers do not blur it."""
    factor = max(1, -(-side // max(picture.shape[:2])))
    return picture.repeat(factor, 0).repeat(factor, 1)


def entropy_picture(layers: list[dict[str, Any]]) -> np.ndarray | None:
    """Entropy of every head of every layer, as a share of the largest possible, uint8 RGB; None without layers."""
    if not layers:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = max(len(each["share"]) for each in layers)
    values = np.full((len(layers), heads), np.nan)
    for row, each in enumerate(layers):
        values[row, : len(each["share"])] = each["share"]
    figure = Figure((4.2 + 0.28 * heads, 1.6 + 0.3 * len(layers)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(layers)), [f"{each['layer']} {each['name']}" for each in layers], fontsize=8)
    axes.set_xticks(range(heads), range(heads), fontsize=8)
    axes.set_xlabel("head")
    if len(layers) * heads <= 160:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shown, label="entropy / largest possible")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def table(layers: list[dict[str, Any]]) -> list[list[Any]]:
    """One row per head: layer, head, and its numbers."""
    rows = []
    for each in layers:
        for head in range(len(each["entropy"])):
            values = [None if each[key] is None else round(each[key][head], 3) for key in NUMBERS]
            rows.append([f"{each['layer']} {each['name']}", head, *values])
    return rows


def _labels(model: Any, x: Any, top: int) -> dict[str, float] | None:
    import torch

    from vision_attn.classify import labels_of

    with torch.no_grad():
        out = model(x)
    if out.ndim != 2 or not 2 <= out.shape[1] == getattr(model, "num_classes", 0):
        return None
    values, index = out[0].float().softmax(0).topk(min(top, out.shape[1]))
    names = labels_of(model)
    return {names[i]: value for i, value in zip(index.tolist(), values.tolist(), strict=True)}


def _pair(seen: np.ndarray, before: dict, after: dict | None, query: Any) -> tuple[np.ndarray, np.ndarray]:
    """The last map of each over the picture; the picture itself where there is one run only."""
    from vision_attn.apps.overlay import overlay

    large, mark = enlarged(seen), query if isinstance(query, tuple) else None
    first, *second = (overlay(large, np.array(each["maps"][-1]["values"]), mark) for each in (before, after) if each)
    return (first, second[0]) if second else (large, first)


def _report(report: Any) -> list[str]:
    seconds, flops = report.seconds, report.flops
    density = [share for tower in report.towers for share in tower.density if share is not None]
    changed = sum(len(tower.modules) for tower in report.towers)
    parts = [f"**{changed} layers changed**"]
    if density:
        parts.append(f"{sum(density) / len(density):.1%} of the query-key pairs are computed")
    if flops:
        parts.append(f"{flops['before'] / 1e9:.3g} → {flops['after'] / 1e9:.3g} GFLOPs")
    if seconds:
        ratio = seconds["before"] / seconds["after"]
        before, after = (f"{seconds[key] * 1e3:.1f}" for key in ("before", "after"))
        parts.append(f"{before} → {after} ms on this machine ({ratio:.2f}x)")
    return ["; ".join(parts) + ".", *(f"Warning: {note}" for note in report.warnings)]
