"""What `vision-attn attention` does once everything is checked: load, run, draw."""

import contextlib
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from vision_attn import attach
from vision_attn.analysis import head_importance, profile, record, rollout, saliency
from vision_attn.analysis.layer import Attention
from vision_attn.apps.overlay import columns, overlay, panel_size, ring, sheet
from vision_attn.classify import labels_of, load_classifier
from vision_attn.images import model_input

Panels = list[tuple[list[str], np.ndarray]]


def look(
    picture: np.ndarray,
    model: torch.nn.Module,
    name: str,
    asked: dict[str, Any],
    pattern: Any = None,
    untrained: bool = False,
    importance: bool = False,
    bar: bool = False,
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers for JSON, and the sheet as uint8 RGB."""
    x, seen = model_input(picture, model)
    with contextlib.ExitStack() as stack:
        if pattern is not None:
            stack.enter_context(attach(model, pattern))
        label, probability = (None, None) if untrained else _label(model, x)
        layers, maps = [], []
        if asked["method"] in ("attention", "rollout"):
            chosen, maps = _attention(model, x, asked)
            layers = [profile(each).to_dict() for each in tqdm(chosen, disable=not bar, unit="layer", leave=False)]
            if importance:
                steps = lambda items: tqdm(items, disable=not bar, unit="head", leave=False)  # noqa: E731
                worth = head_importance(model, x, layers=[each.name for each in chosen], progress=steps)
                for layer in layers:
                    layer["importance"] = worth[layer["name"]].tolist()
        else:
            values = saliency(model, x, asked["method"], target=asked["target"])[0]
            maps = [{"title": asked["method"], "values": values.cpu().numpy()}]
    drawn = _draw(seen, maps, asked, f"{name}{', random weights' if untrained else ''}", label, pattern)
    result = {
        "label": label,
        "probability": probability,
        "pattern": None if pattern is None else pattern.to_dict(),
        **asked,
        "maps": [{**each, "values": np.round(each["values"].astype(float), 8).tolist()} for each in maps],
        "layers": layers,
    }
    return result, drawn


def load(name: str, device: torch.device, untrained: bool) -> torch.nn.Module:
    """A timm model in eval mode, with trained weights, or with random ones that are always the same."""
    if not untrained:
        return load_classifier(name, device)
    import timm

    import vision_attn.backbones  # noqa: F401

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"no model {name!r}; timm has {', '.join(near) or 'other names: timm.list_models()'}")
    torch.manual_seed(0)
    return timm.create_model(name).eval().to(device)


def _label(model: torch.nn.Module, x: torch.Tensor) -> tuple[str | None, float | None]:
    with torch.no_grad():
        out = model(x)
    if out.ndim != 2 or out.shape[1] < 2 or getattr(model, "num_classes", 0) != out.shape[1]:
        return None, None
    value, index = out[0].float().softmax(0).max(0)
    return labels_of(model)[int(index)], float(value)


def _attention(model: torch.nn.Module, x: torch.Tensor, asked: dict[str, Any]) -> tuple[list[Attention], list[dict]]:
    """The chosen layers, and a map for each panel."""
    with torch.no_grad(), record(model) as recording:
        model(x)
    found = recording.layers
    if asked["layers"] == "all":
        chosen = found
    else:
        wrong = [n for n in asked["layers"] if not -len(found) <= n < len(found)]
        if wrong:
            raise click.UsageError(f"--layers: no layer {wrong[0]}; there are {len(found)}, 0 to {len(found) - 1}.")
        chosen = [found[n] for n in asked["layers"]]
    on_grid = [each for each in chosen if each.key_place.grid is not None]
    if not on_grid:
        raise ValueError(
            "none of these layers has tokens whose place on the image is known, so there is nothing to draw"
        )
    if asked["method"] == "rollout":
        query = _query(on_grid[-1], asked["query"])
        return chosen, [{"title": "rollout", "query": query, "values": rollout(on_grid, query)[0].cpu().numpy()}]
    maps = []
    for each in on_grid:
        query = _query(each, asked["query"])
        values = each.map(query)[0].cpu().numpy()
        shown = range(each.heads) if asked["heads"] == "all" else asked["heads"]
        where = {"layer": each.layer, "name": each.name, "query": query}
        if shown == "mean":
            maps.append({**where, "title": f"{each.layer} {each.name}", "values": values.mean(0)})
            continue
        wrong = [n for n in shown if not -each.heads <= n < each.heads]
        if wrong:
            raise click.UsageError(f"--heads: {each.name} has no head {wrong[0]}; it has {each.heads}, from 0.")
        for head in (n % each.heads for n in shown):
            maps.append({**where, "head": head, "title": f"{each.name} head {head}", "values": values[head]})
    return chosen, maps


def _query(attention: Attention, query: Any) -> Any:
    if query == "auto":
        return "class" if attention.query_place.prefix else "mean"
    if not isinstance(query, tuple):
        return query
    if attention.query_place.grid is None:
        return "mean" if attention.queries > 1 else 0
    return tuple(min(int(part * size), size - 1) for part, size in zip(query, attention.query_place.grid, strict=True))


def _draw(
    seen: np.ndarray, maps: list[dict], asked: dict[str, Any], model: str, label: str | None, pattern: Any
) -> np.ndarray:
    import cv2

    mark = asked["query"] if isinstance(asked["query"], tuple) else None
    per_row = columns(len(maps) + 1)
    height, width = panel_size(*seen.shape[:2], len(maps) + 1, per_row)
    smaller = height < seen.shape[0]
    seen = cv2.resize(seen, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_NEAREST)
    panels: Panels = [(["what the model sees", label or ""], seen if mark is None else ring(seen, mark))]
    for each in maps:
        values = each["values"]
        lines = [each["title"], f"{values.min():.2g} to {values.max():.2g}"]
        panels.append((lines, overlay(seen, values, mark)))
    title = asked["method"]
    if title in ("attention", "rollout"):
        who = {str(each["query"]) for each in maps}
        query = (
            {"class": "the class token", "mean": "the mean query"}.get(who.pop(), "one query")
            if len(who) == 1
            else "queries"
        )
        title += f" of {query}" if mark is None else f" of the query at {mark[0]:g},{mark[1]:g}"
    return sheet(panels, per_row, [f"{model}: {title}" + (f", {pattern}" if pattern is not None else "")])
