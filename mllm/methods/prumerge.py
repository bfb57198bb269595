"""PruMerge and PruMerge+: keep the tokens that stand out, and merge their neighbours into them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune, check_keep, ranked

NEAR = 32  # tokens merged into each kept one
ROWS = 256  # kept tokens whose neighbours are looked for at once


@dataclasses.dataclass(frozen=True)
class PruMerge(InputPrune):
    """Keep the outliers in the attention of the class token, add their 32 nearest tokens to each, and one for the rest.

    Attention is one softmax over the whole width of the last layer of the tower (what each patch receives, without a
    class token). Nearness is the cosine of its keys. A kept token is `x_i + sum_near a_j x_j`, the one for the rest
    `sum_dropped a_j x_j`, of the features of the tower, which are projected afterwards. The released code orders the
    tokens by attention; here every one stays at its place, and that for the rest takes the last free one.

    Args:
        keep: None, as released: patches with attention above `Q3 + 1.5 (Q3 - Q1)`, so many as there are. Or the visual
            tokens of an image that stay, that for the rest included: a share above 0 and up to 1 (float), or a count.

    >>> import torch
    >>> attention, keys = torch.tensor([[0.125, 0.125, 0.5, 0.125, 0.125]]), torch.ones(5, 1, 2)
    >>> seen = dict(attention=attention, keys=keys, vision=torch.ones(5, 1), project=lambda rows: rows)
    >>> places, features = PruMerge().select(Image(torch.zeros(5, 1), torch.zeros(2, 1), **seen), 5)
    >>> places.tolist(), features.tolist()
    ([2, 4], [[1.5], [0.5]])

    Paper: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models.
    """

    keep: float | int | None = None
    name: ClassVar[str] = "prumerge"
    looks: ClassVar[tuple[str, ...]] = ("attention", "keys", "vision")
    merged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(type(self).__name__, self.keep)

    def tower_layers(self, count: int, cls: bool) -> tuple[int, ...]:
        return (count - 1,)

    def count(self, tokens: int) -> int:
        return tokens if self.keep is None else super().count(tokens)

    def chosen(self, attention: torch.Tensor, keep: int) -> torch.Tensor:
        """Indices of the tokens that others are merged into."""
        if self.keep is None:
            low, high = attention.quantile(attention.new_tensor([0.25, 0.75]))
            keep = max(1, int((attention > high + 1.5 * (high - low)).sum()))
        else:
            keep -= keep > 1
        return ranked(attention)[:keep]

    def select(self, image: Image, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        attention, vision = image.attention[-1], image.vision.float()
        places = self.chosen(attention, keep).sort().values
        keys = torch.nn.functional.normalize(image.keys.flatten(1), dim=-1)
        weighed = attention[:, None] * vision
        rows = []
        for part in places.split(ROWS):
            likeness = (keys[part] @ keys.T).scatter(1, part[:, None], -torch.inf)
            near = likeness.topk(min(NEAR, len(keys) - 1)).indices
            rows.append(vision[part] + weighed[near].sum(1))
        rows = torch.cat(rows)
        dropped = torch.ones(len(vision), dtype=torch.bool, device=vision.device)
        dropped[places] = False
        if dropped.any() and (self.keep is None or len(places) < keep):
            places, order = torch.cat([places, dropped.nonzero()[-1]]).sort()
            rows = torch.cat([rows, weighed[dropped].sum(0, keepdim=True)])[order]
        return places, image.project(rows.to(image.vision.dtype))


@dataclasses.dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with tokens at equal distances besides the outliers.

    The distance is `int(int(1 / share) / 3)` for the share of outliers among the tokens, at least 1, as released. With
    a `keep`, which the released code has not, 5 of 16 go by attention, the others at equal distances among the rest.

    Args:
        keep: as for `PruMerge`.

    >>> import torch
    >>> attention, keys = torch.full((1, 9), 0.125), torch.ones(9, 1, 2)
    >>> seen = dict(attention=attention, keys=keys, vision=torch.ones(9, 1), project=lambda rows: rows)
    >>> PruMergePlus().select(Image(torch.zeros(9, 1), torch.zeros(2, 1), **seen), 9)[0].tolist()
    [0, 3, 6, 8]

    Paper: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models.
    """

    name: ClassVar[str] = "prumerge-plus"

    def chosen(self, attention: torch.Tensor, keep: int) -> torch.Tensor:
        tokens = len(attention)
        if self.keep is None:
            first = super().chosen(attention, keep)
            step = max(1, int(int(tokens / len(first)) / 3))
            spread = torch.arange(0, tokens - 1, step, device=attention.device)
            return torch.cat([first, spread[~torch.isin(spread, first)]])
        keep -= keep > 1
        order = ranked(attention)
        first, rest = order[: max(1, round(keep * 5 / 16))], order[max(1, round(keep * 5 / 16)) :].sort().values
        more = keep - len(first)
        at = (torch.arange(more, device=rest.device) + 0.5) * len(rest) / max(1, more)
        return torch.cat([first, rest[at.long()]])
