"""Asking a method which tokens of each image of a batch stay, before the text model reads the prompt."""

from __future__ import annotations

from typing import Any

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune
from vision_attn.mllm.tokens import Tokens, runs
from vision_attn.mllm.towers import Seen, TowerWatch, attention_modules, has_class_token


def watch_for(method: InputPrune, base: Any, family: Any) -> TowerWatch | None:
    """What reads the tower for a method, or None for a method that needs nothing of it.

    Raises:
        ValueError: the tower has no such layer.
    """
    if not method.looks:
        return None
    count = len(attention_modules(getattr(base, family.tower)))
    layers = method.tower_layers(count, has_class_token(base, family))
    return TowerWatch(base, family, layers, method.looks, method.merged)


def choose(engine: Any, tokens: Tokens, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool `[batch, length]` of what stays, and the embeddings, changed where a method makes new features."""
    method, watch, ids = engine.input, engine.watch, engine.ids
    keep = tokens.valid & ~tokens.visual
    video, newline = None if ids is None else engine.shows("video"), getattr(engine.base, "image_newline", None)
    spans = [(row, *run) for row in range(len(keep)) for run in runs(tokens.visual[row])]
    kinds = ["video" if video is not None and video[row, start] else "image" for row, start, _ in spans]
    lengths = [stop - start for _, start, stop in spans]
    seen: list[list[Seen]] = [[{}] for _ in spans]
    if watch is not None:
        seen = watch.of([(row, kind, n) for (row, *_), kind, n in zip(spans, kinds, lengths, strict=True)])
    number = 0
    for (row, start, stop), kind, parts in zip(spans, kinds, seen, strict=True):
        free = torch.ones(stop - start, dtype=torch.bool, device=embeds.device)
        if newline is not None:  # tokens that end a row of an image show no patch, and always stay
            free = (embeds[row, start:stop] != newline.to(embeds)).any(-1)
            keep[row, start:stop] = ~free
        words = keep[row] & ~tokens.visual[row]
        pieces, at = [], start
        for part in parts:
            end = at + len(next(iter(part.values()))) if part else stop
            pieces.append((part, at, free[at - start : end - start].nonzero()[:, 0]))
            at = end
        for (part, at, places), count in zip(pieces, _counts(method, kind, pieces), strict=True):
            if count == 0:
                continue
            image = Image(
                embeds[row, at + places], embeds[row][words], None if ids is None else ids[row][words], number,
                project=lambda rows: engine.family.project(engine.base, rows),
                **_looked(part, places, 1 if watch is None else watch.heads),
            )  # fmt: skip
            number += 1
            chosen = method.select(image, count)
            if isinstance(chosen, tuple):
                chosen, made = chosen
                embeds = embeds.clone()
                embeds[row, at + places[chosen]] = made.to(embeds.dtype)
            keep[row, at + places[chosen]] = True
    return keep, embeds


def _counts(method: InputPrune, kind: str, pieces: list[tuple[Seen, int, torch.Tensor]]) -> list[int]:
    """How many tokens of each image stay; a video has one budget, which its frames share evenly."""
    sizes = [len(places) for *_, places in pieces]
    if kind == "image":
        return [method.count(size) for size in sizes]
    total, frames = method.count(sum(sizes)), len(sizes)
    return [total * (i + 1) // frames - total * i // frames for i in range(frames)]


def _looked(part: Seen, places: torch.Tensor, heads: int) -> dict[str, Any]:
    """What a method looks at of the tower, for the tokens at `places`: fields of `Image`."""
    own: dict[str, Any] = {name: value.to(places.device)[places] for name, value in part.items()}
    if "grid" in own:
        rows, columns = own["grid"][0].tolist()
        own["grid"] = (rows, columns) if rows * columns == len(places) else None
    if "attention" in own:
        own["attention"] = own["attention"].T
    if "cls" in own:
        own["cls"] = own["cls"][0]
    if "keys" in own:
        own["keys"] = own["keys"].unflatten(-1, (heads, -1))
    return own
