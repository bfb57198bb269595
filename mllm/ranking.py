"""Scores by which layers of the text model rank visual tokens."""

from __future__ import annotations

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import check_keep
from vision_attn.mllm.tokens import Tokens


def rows_where(mask: torch.Tensor, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `most` places of each row where a bool `[batch, n]` is True, long `[batch, rows]`, and bool which count.

    Rows with fewer places than others repeat some that do not count.

    >>> rows_where(torch.tensor([[True, False, True], [False, False, True]]))[0].tolist()
    [[0, 2], [1, 2]]
    """
    n = max(int(mask.sum(1).max()), 1)
    rows = mask.int().argsort(dim=1, stable=True)[:, -min(n, most or n) :]
    return rows, mask.gather(1, rows)


def mean_attention(layer: Layer, among: torch.Tensor, most: int | None = None) -> torch.Tensor:
    """Attention of the last `most` tokens where `among` (bool `[batch, n]`) is True, mean over them: `[batch, heads,
    n]`."""
    rows, counts = rows_where(among, most)
    attention = layer.attention(rows) * counts[:, None, :, None]
    return attention.sum(2) / counts.sum(1).clamp(min=1)[:, None, None]


def words(tokens: Tokens) -> torch.Tensor:
    """Bool `[batch, n]`: tokens that are text."""
    return tokens.valid & ~tokens.visual


def words_after(tokens: Tokens) -> torch.Tensor:
    """Bool `[batch, n]`: the text after the last visual token of each row; all of its text where none follows."""
    text = words(tokens)
    place = torch.arange(len(tokens), device=text.device)
    after = text & (place > torch.where(tokens.visual, place, -1).amax(1, keepdim=True))
    return torch.where(after.any(1, keepdim=True), after, text)


def counts_of(tokens: Tokens) -> list[int]:
    """Visual tokens of each row."""
    return tokens.visual.sum(1).tolist()


def check_stages(name: str, keep: tuple[float | int, ...], layers: tuple[int, ...] | None) -> None:
    """Raise ValueError unless what stays never grows, and the layers, one for each, ascend from 1 at least."""
    if not keep:
        raise ValueError(f"{name}(keep=()): give at least one stage")
    for share in keep:
        check_keep(name, share)
    kinds = {type(share) for share in keep}
    if len(kinds) > 1 or list(keep) != sorted(keep, reverse=True):
        raise ValueError(f"{name}(keep={keep}): give shares or counts, and none above the one before")
    if layers is None:
        return
    ascending = all(isinstance(n, int) and n > before for before, n in zip((0, *layers), layers, strict=False))
    if len(layers) != len(keep) or not ascending:
        raise ValueError(
            f"{name}(layers={layers}): give {len(keep)} layers, one for each stage, ascending and at least 1"
        )


def check_apart(name: str, layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The layers where stages begin in a model of `count` layers; ValueError where two fall together."""
    if len(set(layers)) < len(layers) or min(layers) < 1:
        raise ValueError(
            f"{name} has {len(layers)} stages, which for a text model of {count} layers fall on layers {layers}; give "
            "layers= yourself"
        )
    return layers
