"""What differs between vision-language models: where their parts are, and which token of the prompt shows which patch.

Adding a family is one entry of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Layout = Callable[[Any, torch.Tensor, dict[str, Any]], list[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One class of models.

    Args:
        name: the transformers class.
        tower: attribute of the vision tower in the base model.
        text: attribute of the text model in the base model.
        cls: the tower has a class token, the first of its sequence.
        mrope: positions are three-dimensional, so they cannot be renumbered.
        first_position: position of the first token.
        layout: `(base model, scores [tiles, patches], arguments of get_image_features)` -> per image, a score for each
            of its tokens in the prompt; NaN at tokens that show no patch.
        prune: tokens can be dropped; where not, the family is for steering only.
    """

    name: str
    tower: str = "vision_tower"
    text: str = "language_model"
    cls: bool = False
    mrope: bool = False
    first_position: int = 0
    layout: Layout = lambda base, scores, call: list(scores)
    prune: bool = True


def _anyres(base: Any, scores: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """The base view, then the unpadded tiles row by row with a newline token after each row."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = call["image_sizes"]
    side = base.config.vision_config.image_size
    counts = [image_size_to_num_patches(size, base.config.image_grid_pinpoints, side) for size in sizes]
    newline = scores.new_full((1,), torch.nan)
    tiles = [part[..., None] for part in scores.split(counts)]
    given = {"image_newline": newline}
    if "vision_feature_select_strategy" in base.pack_image_features.__code__.co_varnames:
        given["vision_feature_select_strategy"] = base.config.vision_feature_select_strategy
    if "vision_aspect_ratio" in base.pack_image_features.__code__.co_varnames:
        given["vision_aspect_ratio"] = base.config.vision_aspect_ratio
    packed, _ = base.pack_image_features(tiles, sizes, **given)
    return [part[:, 0] for part in packed]


def _merged(base: Any, scores: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """Each token is the mean of four patches that follow each other."""
    grid = call.get("image_grid_thw", call.get("video_grid_thw"))
    group = base.config.vision_config.spatial_merge_size**2
    tokens = scores.flatten().view(-1, group).mean(1)
    return list(tokens.split((grid.prod(-1) // group).tolist()))


def _windowed(base: Any, scores: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """As `_merged`, after undoing the order of windows in which the tower works."""
    config, found = base.config.vision_config, []
    side = config.window_size // config.spatial_merge_size // config.patch_size
    grids = call.get("image_grid_thw", call.get("video_grid_thw")).tolist()
    for part, (frames, height, width) in zip(_merged(base, scores, call), grids, strict=True):
        h, w = height // config.spatial_merge_size, width // config.spatial_merge_size
        place = torch.arange(frames * h * w, device=part.device).view(frames, h, w)
        windows = [window.flatten(1) for rows in place.split(side, 1) for window in rows.split(side, 2)]
        order = torch.cat(windows, 1).flatten()
        found.append(torch.empty_like(part).index_copy_(0, order, part))
    return found


def _shuffled(base: Any, scores: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """Pixel shuffle of the connector: each token holds a square of patches."""
    factor = base.config.scale_factor
    return list(base.connector.pixel_shuffle(scores[..., None], factor).mean(-1))


def _internvl(base: Any, scores: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    side = int(scores.shape[1] ** 0.5)
    maps = scores.view(-1, side, side, 1)
    return list(base.pixel_shuffle(maps, scale_factor=base.config.downsample_ratio).mean(-1).flatten(1))


def _pooled(base: Any, scores: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    side = int(scores.shape[1] ** 0.5)
    small = int(base.config.mm_tokens_per_image**0.5)
    maps = scores.view(-1, 1, side, side)
    return list(torch.nn.functional.avg_pool2d(maps, side // small).flatten(1))


_END = "ForConditionalGeneration"
FAMILIES = {
    family.name: family
    for family in (
        Family("Llava" + _END, cls=True),
        Family("LlavaNext" + _END, cls=True, layout=_anyres),
        Family("LlavaOnevision" + _END, layout=_anyres),
        Family("Qwen2VL" + _END, tower="visual", mrope=True, layout=_merged),
        Family("Qwen2_5_VL" + _END, tower="visual", mrope=True, layout=_windowed),
        Family("Qwen3VL" + _END, tower="visual", mrope=True, layout=_merged),
        Family("InternVL" + _END, cls=True, layout=_internvl),
        Family("Idefics3" + _END, tower="vision_model", text="text_model", layout=_shuffled),
        Family("SmolVLM" + _END, tower="vision_model", text="text_model", layout=_shuffled),
        Family("Gemma3" + _END, layout=_pooled),
        Family("PaliGemma" + _END, first_position=1),
        Family("InstructBlip" + _END, tower="vision_model", cls=True, prune=False),
    )
}


def family_of(model: Any) -> Family:
    """Look up the family of a model by its class and base classes.

    Raises:
        ValueError: the class is unknown.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(
        f"cannot attach to {type(model).__name__}: where its images are is not known. Supported classes: "
        f"{', '.join(FAMILIES)}; add an entry to vision_attn.mllm.families.FAMILIES for another"
    )
