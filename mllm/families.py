"""What differs between vision-language models: where their parts are, and which token of the prompt shows which patch.

Adding a family is one entry of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Patches = Callable[[Any, torch.Tensor], torch.Tensor]
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
        group: `(base model, [tiles, patches, channels])` -> `[tiles, tokens, channels]`, means of the patches that make
            one token of the text model.
        layout: `(base model, [tiles, tokens, channels], arguments of get_image_features)` -> per image, or frame of a
            video, `[tokens, channels]` in the order of the prompt; NaN at tokens that show no patch.
        tiles: what follows each other without a word between is one image, cut in tiles.
        projector: path in the base model of the module that gets `[..., tokens, channels]` of the tower and begins to
            make tokens of the text model of it.
        project: `(base model, [n, channels])` -> `[n, width]`, the same for any such rows.
        prune: tokens can be dropped; where not, the family is for steering only.
    """

    name: str
    tower: str = "vision_tower"
    text: str = "language_model"
    cls: bool = False
    mrope: bool = False
    first_position: int = 0
    group: Patches = lambda base, x: x
    layout: Layout = lambda base, x, call: list(x)
    tiles: bool = False
    projector: str = "multi_modal_projector"
    project: Patches = lambda base, rows: base.multi_modal_projector(rows)
    prune: bool = True


def _anyres(base: Any, x: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """The base view, then the unpadded tiles row by row with a newline token after each row."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    newline = x.new_full((x.shape[-1],), torch.nan)
    if call.get("pixel_values_videos") is not None:  # frames are pooled, and a video ends with one newline token
        frames = call["pixel_values_videos"].shape[1]
        parts = list(base.apply_pooling(x))
        parts[frames - 1 :: frames] = [torch.cat([part, newline[None]]) for part in parts[frames - 1 :: frames]]
        return parts
    sizes, several = call["image_sizes"], call.get("batch_num_images")
    alone = [True] * len(sizes) if several is None else [n == 1 for n in several for _ in range(n)]
    side, grids = base.config.vision_config.image_size, base.config.image_grid_pinpoints
    counts = [
        image_size_to_num_patches(size, grids, side) if tiled else 1 for size, tiled in zip(sizes, alone, strict=True)
    ]
    given = {"image_newline": newline}
    for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        if name in base.pack_image_features.__code__.co_varnames:
            given[name] = getattr(base.config, name)
    return base.pack_image_features(x.split(counts), sizes, **given)[0]


def frame_sizes(call: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of patches of every image and frame, where a tower reads all of them as one sequence."""
    grids = call.get("image_grid_thw", call.get("video_grid_thw"))
    return [] if grids is None else [(h, w) for frames, h, w in grids.tolist() for _ in range(frames)]


def _quartet(base: Any, x: torch.Tensor) -> torch.Tensor:
    """Each token is made of patches that follow each other."""
    return x.unflatten(1, (-1, base.config.vision_config.spatial_merge_size**2)).mean(2)


def _frames(base: Any, x: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """All images and frames one after the other."""
    group = base.config.vision_config.spatial_merge_size**2
    return list(x[0].split([h * w // group for h, w in frame_sizes(call)]))


def _windowed(base: Any, x: torch.Tensor, call: dict[str, Any]) -> list[torch.Tensor]:
    """As `_frames`, after undoing the order of windows in which the tower works."""
    config, found = base.config.vision_config, []
    side = config.window_size // config.spatial_merge_size // config.patch_size
    for part, (height, width) in zip(_frames(base, x, call), frame_sizes(call), strict=True):
        h, w = height // config.spatial_merge_size, width // config.spatial_merge_size
        place = torch.arange(h * w, device=part.device).view(h, w)
        order = torch.cat([window.flatten() for rows in place.split(side) for window in rows.split(side, 1)])
        found.append(torch.empty_like(part).index_copy_(0, order, part))
    return found


def _shuffled(shuffle: Callable[[Any, torch.Tensor], torch.Tensor]) -> Patches:
    """A shuffle puts squares of patches into the channels of `[tiles, patches, 1]`; each token is the mean of one."""

    def group(base: Any, x: torch.Tensor) -> torch.Tensor:
        tiles, _, channels = x.shape
        alone = x.transpose(1, 2).flatten(0, 1)[..., None]  # the shuffle would mix the channels
        return shuffle(base, alone).mean(-1).view(tiles, channels, -1).transpose(1, 2)

    return group


def _internvl(base: Any, x: torch.Tensor) -> torch.Tensor:
    side = int(x.shape[1] ** 0.5)
    return base.pixel_shuffle(x.unflatten(1, (side, side)), scale_factor=base.config.downsample_ratio).flatten(1, 2)


def _pooled(base: Any, x: torch.Tensor) -> torch.Tensor:
    side, small = int(x.shape[1] ** 0.5), int(base.config.mm_tokens_per_image**0.5)
    maps = x.transpose(1, 2).unflatten(2, (side, side))
    return torch.nn.functional.avg_pool2d(maps, side // small).flatten(2).transpose(1, 2)


def _qwen(name: str, layout: Layout) -> Family:
    return Family(
        name + _END,
        tower="visual",
        mrope=True,
        group=_quartet,
        layout=layout,
        projector="visual.merger",
        project=lambda base, rows: base.visual.merger(
            rows.reshape(-1, rows.shape[1] // base.visual.spatial_merge_size**2)
        ),
    )


def _idefics(name: str) -> Family:
    return Family(
        name + _END,
        tower="vision_model",
        text="text_model",
        group=_shuffled(lambda base, x: base.connector.pixel_shuffle(x, base.config.scale_factor)),
        projector="connector.modality_projection",
        project=lambda base, rows: base.connector.modality_projection(rows),
    )


def _gemma(base: Any, rows: torch.Tensor) -> torch.Tensor:
    """The projector without its pooling."""
    projector = base.multi_modal_projector
    return (projector.mm_soft_emb_norm(rows) @ projector.mm_input_projection_weight).type_as(rows)


_END = "ForConditionalGeneration"
FAMILIES = {
    family.name: family
    for family in (
        Family("Llava" + _END, cls=True),
        Family("LlavaNext" + _END, cls=True, layout=_anyres),
        Family("LlavaOnevision" + _END, layout=_anyres),
        _qwen("Qwen2VL", _frames),
        _qwen("Qwen2_5_VL", _windowed),
        _qwen("Qwen3VL", _frames),
        Family("InternVL" + _END, cls=True, group=_shuffled(_internvl), tiles=True),
        _idefics("Idefics3"),
        _idefics("SmolVLM"),
        Family("Gemma3" + _END, group=_pooled, projector="multi_modal_projector.mm_soft_emb_norm", project=_gemma),
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
