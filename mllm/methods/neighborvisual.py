"""NeighborVisualAttention: visual tokens see the words, and of their picture only what is near."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.hosts import AttachError
from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns.base import Axis, Separable, plain_axis
from vision_attn.mllm.around import Around, Call, check_layers
from vision_attn.mllm.ranking import rows_where
from vision_attn.mllm.tokens import take

ROWS = 1024  # rows of a mask that exist at once


@dataclasses.dataclass(frozen=True)
class Near(Separable):
    """Keys at most `far` away along every axis; at a border there are fewer.

    >>> Near(1).mask((4,)).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """

    far: int
    name: ClassVar[str] = "near"

    def axis(self, extent: int, index: int) -> Axis:
        ends = [(max(0, i - self.far), min(extent, i + self.far + 1)) for i in range(extent)]
        return plain_axis(ends)


@dataclasses.dataclass(frozen=True)
class NeighborVisualAttention(Around):
    """While the prompt is read, a visual token sees the visual tokens in a square around it and no others.

    The square replaces the causal rule among visual tokens, so a token sees those right of it and below it too, and
    none of another picture, tile or frame. Words see, and are seen, as before; so are tokens that end a row of tiles.
    The pictures go through the neighborhood kernels, and only the rows of words through the attention of the model.
    What is saved is attention among visual tokens, which at 576 of them is about 4 % of the prefill of a 7B model: one
    such picture takes longer to read than without. Sixteen of them in a prompt took 0.4 of the time (a text model of
    two layers and width 256, one CPU core). The authors fine-tune their LLaVA with it; without, answers change.

    Args:
        window: side of the square in tokens, odd.
        layers: of the text model; None is all.

    Raises:
        ValueError: a window that is not odd, a layer that is not there, or a model that runs flash attention.
        AttachError: while reading, when something dropped a part of a picture; VisualExit drops all of it.

    Paper: Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See.
    """

    window: int = 5
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "neighbor-visual"
    text: ClassVar[bool] = False
    anew: ClassVar[bool] = True
    grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"NeighborVisualAttention(window={self.window!r}): an odd number of tokens")

    def check(self, model: Any, family: Any) -> None:
        check_layers(type(self).__name__, self.layers, len(model.get_decoder().layers))
        check_masks(type(self).__name__, model)

    def where(self, layers: int) -> tuple[int, ...]:
        return check_layers(type(self).__name__, self.layers, layers)

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        views = self._present(call, q.shape[2]) if call.reading else []
        if not views:
            return call.compute(q, k, v, call.mask)
        grid = torch.zeros(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        for row, places in views:
            grid[row, places] = True
        others = ~grid & (call.columns[:, 0, : q.shape[2]] >= 0)
        out = q.new_zeros(len(q), q.shape[2], q.shape[1], v.shape[-1])
        words, there = rows_where(others)
        for rows in words.split(ROWS, 1):  # those that are in a picture are put right afterwards
            made = call.compute(take(q, rows, 2), k, v, seen(call, rows, k.shape[2], q.dtype))
            out.scatter_(1, rows[:, :, None, None].expand_as(made), made)
        for shape in {places.shape for _, places in views}:
            alike = [(row, places) for row, places in views if places.shape == shape]
            row = torch.tensor([row for row, _ in alike], device=q.device)
            places = torch.stack([places for _, places in alike])
            out[row[:, None], places.flatten(1)] = self._pictures(call, q, k, v, row, places, words, there)
        return out

    def _present(self, call: Call, tokens: int) -> list[tuple[int, torch.Tensor]]:
        """Row of the batch and places `[rows, columns]` among the tokens of the pictures that are there."""
        columns = call.columns[:, 0, :tokens]
        place = columns.new_full((len(columns), call.prompt.length + 1), -1)
        here = torch.arange(tokens, device=columns.device).expand_as(columns)
        place.scatter_(1, columns.masked_fill(columns < 0, call.prompt.length), here)
        found = [(view.row, place[view.row, view.columns.to(place.device)]) for view in call.views]
        if any((places < 0).any() and not (places < 0).all() for _, places in found):
            raise AttachError(
                "NeighborVisualAttention needs whole pictures, and a method beside it dropped parts of one; attach it "
                "alone, or with VisualExit"
            )
        return [(row, places) for row, places in found if places.numel() and places[0, 0] >= 0]

    def _pictures(
        self, call: Call, q, k, v, row: torch.Tensor, places: torch.Tensor, words: torch.Tensor, there: torch.Tensor
    ) -> torch.Tensor:
        """Rows `[views, tokens, heads, head_dim]` of pictures of one shape: one softmax over words and neighbours."""
        flat, shape = places.flatten(1), places.shape[1:]
        on_grid = [x[row[:, None], :, flat].unflatten(1, shape) for x in (q, k, v)]
        near, weight = attend(*on_grid, Near(self.window // 2), scale=call.scale, return_lse=True)
        near, weight = near.flatten(1, 2).float(), weight.flatten(1, 2)  # [views, tokens, heads, head_dim]
        key, value = (x[row[:, None], :, words[row]].float() for x in (k, v))  # [views, words, kv_heads, head_dim]
        parts = []
        for rows, near_, weight_ in zip(*(x.split(ROWS, 1) for x in (flat, near, weight)), strict=True):
            query = q[row[:, None], :, rows].float().unflatten(2, (k.shape[1], -1))
            scores = torch.einsum("vqkgd,vtkd->vqkgt", query, key).flatten(2, 3) * call.scale
            scores = scores + pairs(call, row, rows, words[row])[:, :, None]
            scores = scores.masked_fill(~there[row][:, None, None], -torch.inf)
            share = (scores.logsumexp(-1) - weight_).sigmoid()[..., None]  # of the words in the whole softmax
            weights = scores.softmax(-1).nan_to_num().unflatten(2, (k.shape[1], -1))
            said = torch.einsum("vqkgt,vtkd->vqkgd", weights, value).flatten(2, 3)
            parts.append((share * said + (1 - share) * near_).to(q.dtype))
        return torch.cat(parts, 1)


def seen(call: Call, rows: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of some rows (long `[batch, rows]`), to add to scores: `[batch, 1, rows, keys]`."""
    if call.mask is None:
        mask = torch.arange(keys, device=rows.device) <= rows[:, None, :, None]
    else:
        mask = take(call.mask[..., :keys], rows, 2)
    return _added(mask, dtype)


def pairs(call: Call, batch: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The same in float32 for chosen keys, `[n, rows, keys]`, of the samples `batch` (long `[n]`)."""
    rows, keys = rows[:, :, None], keys[:, None]
    if call.mask is None:
        mask = keys <= rows
    else:
        mask = call.mask[:, 0].expand(len(call.columns), -1, -1)[batch[:, None, None], rows, keys]
    return _added(mask, torch.float32)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def check_masks(name: str, model: Any) -> None:
    """Raise ValueError for attention functions that take no mask of single pairs."""
    used = model.config.get_text_config()._attn_implementation
    if not used.endswith(("sdpa", "eager")):
        raise ValueError(
            f"{name} needs attention that takes a mask of pairs, and {type(model).__name__} runs {used!r}; "
            "model.set_attn_implementation('sdpa') first"
        )
