"""Where each visual token of a prompt lies in its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from vision_attn.mllm.families import Family, family_of

# The view of the whole picture comes after its tiles here, and before them elsewhere.
OVERVIEW_LAST = ("InternVL", "Idefics3", "SmolVLM")


@dataclasses.dataclass(frozen=True)
class Grid:
    """One view of a picture, or one frame of a video, as rows and columns of tokens that divide it evenly.

    Args:
        row: of the batch.
        picture: number of the picture or video among those of the row; where tiles of a picture stand apart in the
            prompt, each counts as a picture.
        frame: of a video; 0 for a picture.
        columns: long `[rows, columns]`, where these tokens stand in the padded prompt.
    """

    row: int
    picture: int
    frame: int
    columns: torch.Tensor

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The map `[..., rows, columns]` of values `[..., length]` over the columns of the prompt."""
        return values[..., self.columns.to(values.device)]


def grids(model: Any, inputs: dict[str, Any]) -> list[Grid]:
    """The views of all pictures of a batch of prompts, in order: row by row, then as they stand in the prompt.

    LLaVA-NeXT and LLaVA-OneVision show a picture whole, then in one larger grid; InternVL, Idefics3 and SmolVLM in
    tiles, then whole; Qwen models give one grid per frame. How the processor cut the picture before (a centre crop, pan
    and scan) is not known here.

    Args:
        model: of one of `vision_attn.mllm.FAMILIES` but InstructBLIP, whose visual tokens show no places.
        inputs: as for `model.generate`, with `input_ids` before anything is dropped.

    Raises:
        ValueError: no places, or numbers of tokens that do not fit the pictures.

    >>> from vision_attn.mllm import tiny
    >>> model = tiny.model()
    >>> ids = torch.tensor([[1, *[model.config.image_token_id] * 64, 9]])
    >>> (grid,) = grids(model, {"input_ids": ids})
    >>> grid.columns.shape, grid.columns[0, :4].tolist()
    (torch.Size([8, 8]), [1, 2, 3, 4])
    """
    family = family_of(model)
    if not family.prune:
        raise ValueError(f"{family.name} gives its pictures as tokens that show no places; there is no grid")
    ids, found = inputs["input_ids"], []
    for kind in ("image", "video"):
        token = getattr(model.config, f"{kind}_token_id", None)
        if token is None or not (ids == token).any():
            continue
        pictures = _pictures(model, family, kind, inputs)
        for row, mask in enumerate(ids == token):
            columns, number = mask.nonzero()[:, 0], 0
            while len(columns):
                size, views = next(pictures, (len(columns) + 1, []))
                if size > len(columns):
                    raise ValueError(
                        f"row {row} has {len(columns)} {kind} tokens that its pictures do not explain; give the inputs "
                        "as the processor made them"
                    )
                found += [Grid(row, number, frame, columns[view]) for frame, view in enumerate(views)]
                columns, number = columns[size:], number + 1
    return sorted(found, key=lambda grid: (grid.row, int(grid.columns[0, 0])))


def overview(model: Any, views: list[Grid]) -> Grid:
    """The view that shows a whole picture, of the views of a row with one picture.

    Raises:
        ValueError: views of several rows, or of none.
    """
    if len({view.row for view in views}) != 1:
        raise ValueError(f"give the views of one row; got those of rows {sorted({view.row for view in views})}")
    return views[-1 if family_of(model).name.startswith(OVERVIEW_LAST) else 0]


def _pictures(
    model: Any, family: Family, kind: str, inputs: dict[str, Any]
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """For each picture of the batch: how many tokens it has, and the indices of them that make its views."""
    config = model.config.vision_config
    if family.mrope:
        merge = config.spatial_merge_size
        for frames, height, width in inputs[f"{kind}_grid_thw"].tolist():
            h, w = height // merge, width // merge
            yield frames * h * w, list(torch.arange(frames * h * w).view(frames, h, w))
    elif family.name.startswith(("LlavaNext", "LlavaOnevision")):
        yield from _tiled(model.base_model, family, kind, inputs)
    else:
        side = _side(model, family)
        while True:
            yield side * side, [torch.arange(side * side).view(side, side)]


def _side(model: Any, family: Family) -> int:
    """Tokens along a side of a square view."""
    config = model.config.vision_config
    if family.name.startswith("Gemma3"):
        return int(model.config.mm_tokens_per_image**0.5)
    size, patch = (n[0] if isinstance(n, (list, tuple)) else n for n in (config.image_size, config.patch_size))
    side = size // patch
    if family.name.startswith("InternVL"):
        return int(side * model.config.downsample_ratio)
    return side // getattr(model.config, "scale_factor", 1)


def _tiled(base: Any, family: Family, kind: str, inputs: dict[str, Any]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Pictures of which the layout of the family tells where the newline tokens are."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base.config.vision_config
    side = config.image_size // config.patch_size
    if kind == "video":  # pooled frames, and one newline token at the end
        side, frames = -(-side // 2), inputs["pixel_values_videos"].shape[1]
        for _ in range(len(inputs["pixel_values_videos"])):
            yield frames * side * side + 1, list(torch.arange(frames * side * side).view(frames, side, side))
        return
    several = inputs.get("batch_num_images")  # OneVision cuts only the picture of a prompt that has no other
    alone = [True] * len(inputs["image_sizes"]) if several is None else [n == 1 for n in several for _ in range(n)]
    for size, cut in zip(inputs["image_sizes"], alone, strict=True):
        views, count = [torch.arange(side * side).view(side, side)], side * side + 1
        if cut:
            tiles = image_size_to_num_patches(size, base.config.image_grid_pinpoints, config.image_size)
            marked = family.layout(base, torch.zeros(tiles, side * side, 1), {"image_sizes": size[None]})[0]
            count, rows = len(marked), int(marked.isnan().sum())
            if tiles > 1:
                views.append(torch.arange(side * side, count).view(rows, -1)[:, :-1])
        yield count, views
