"""The picture of `vision-attn ask` and `caption`: which visual tokens stayed, or what the prompt's end looks at."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch

from vision_attn.apps.overlay import overlay, panel_size, sheet
from vision_attn.mllm import attach
from vision_attn.mllm.grids import grids, overview
from vision_attn.mllm.loading import Loaded
from vision_attn.mllm.maps import Capture
from vision_attn.mllm.method import Method


def draw(loaded: Loaded, picture: np.ndarray, inputs: dict[str, Any], question: str, answers: list[dict]) -> bytes:
    """A panel of what the model sees, and one per answer, as PNG."""
    grid = overview(loaded.model, grids(loaded.model, inputs))
    seen = as_seen(loaded, picture, inputs)
    height, width = panel_size(*seen.shape[:2], len(answers) + 1, len(answers) + 1)
    smaller = height < seen.shape[0]
    seen = cv2.resize(seen, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_NEAREST)
    panels = [(["what the model sees", "", ""], seen)]
    for each in answers:
        if each["drops"]:
            layers = grid.of(kept(each["prompt"], inputs["input_ids"].shape[1])[:, 0]).numpy()
            drawn, what = (
                dimmed(seen, layers.mean(0)),
                f"{(layers[-1] > 0).mean():.0%} of the tokens reach the last layer",
            )
        else:
            values = grid.of(last_row(loaded, inputs, each["attached"])[0]).float().cpu().numpy()
            drawn, what = overlay(seen, values), f"attention {values.min():.2g} to {values.max():.2g}"
        panels.append(([each["name"], each["answer"], what], drawn))
    drawn = sheet(panels, len(panels), [question])
    return cv2.imencode(".png", np.ascontiguousarray(drawn[..., ::-1]))[1].tobytes()


def as_seen(loaded: Loaded, picture: np.ndarray, inputs: dict[str, Any]) -> np.ndarray:
    """The pixels of a model that gets one square view; where it gets tiles or patches, the picture as it was given."""
    pixels = inputs.get("pixel_values")
    images = getattr(loaded.processor, "image_processor", None)
    if pixels is None or pixels.ndim != 4 or len(pixels) != 1 or getattr(images, "image_std", None) is None:
        return picture
    std, mean = (pixels.new_tensor(values)[:, None, None] for values in (images.image_std, images.image_mean))
    levels = ((pixels[0] * std + mean).clamp(0, 1) * 255).round()
    return levels.permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def kept(prompt: Any, length: int) -> torch.Tensor:
    """The share of its heads in which each layer still holds each column of a prompt, `[layers, batch, length]`."""
    found = []
    for tokens in prompt.cached:
        column, here = tokens.column, tokens.valid.expand(tokens.column.shape)
        if column.ndim == 2:
            column, here = column[:, None], here[:, None]
        heads = torch.zeros(*column.shape[:2], length, device=column.device)
        here = here & (column >= 0)  # -1: a mean of what was dropped, or nothing
        found.append(heads.scatter_add(2, column.clamp(min=0), here.float()).clamp(max=1).mean(1))
    return torch.stack(found).cpu()


def dimmed(picture: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The picture with tokens as dark and grey as they are gone, a map `[rows, columns]` from 0 (gone) to 1."""
    height, width = picture.shape[:2]
    share = cv2.resize(share.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) * 0.25
    return (picture * share + grey * (1 - share)).round().astype(np.uint8)


def last_row(loaded: Loaded, inputs: dict[str, Any], attached: tuple[Method, ...] = ()) -> torch.Tensor:
    """What the last token of the prompt looks at, mean over heads and layers, `[batch, length]`."""
    look = Capture()
    with attach(loaded.model, *attached, look):
        loaded.generate(inputs, 1)
    return torch.stack(list(look.steps[0].values())).mean((0, 2, 3))
