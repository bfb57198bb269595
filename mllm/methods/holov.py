"""HoloV: share the budget over the parts of an image, so that no bright spot takes all of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune, ranked

EPS = 1e-6
ROWS = 512  # tokens whose cosines to all others exist at once


@dataclasses.dataclass(frozen=True)
class HoloV(InputPrune):
    """Cut an image into crops, give each a share of the budget, and keep the most attended tokens of each.

    A crop is worth `mean(1000 a + alpha * scale * var)`: `a` is the attention of the class token (what a patch
    receives, on a tower without one), `var` how much the cosines of a token to the others of its crop vary. This is the
    released code. Its `scale` is computed in each crop, which makes the second term a fixed share of the first: the
    diversity cancels out, and `alpha` changes next to nothing. With `scale="global"` it does not.

    Differences from the released code: tokens of a crop that has fewer than its share go to the next crops (there: the
    places are filled with zeros), and only visual tokens are dropped.

    Args:
        keep: visual tokens of an image that stay: a share above 0 and up to 1 (float), or a count (int).
        alpha: weight of the diversity.
        segments: number of crops; None makes it `1024 / keep` for 576 tokens, and in proportion for others.
        scale: "crop" as released, or "global", one for the image.
        crops: "raster" as released, runs of tokens in reading order, or "grid", boxes of about equal area.
        order: "sorted" leaves the tokens in reading order; "official" gives them crop by crop, the most attended first,
            as released: positions then say nothing of where a token lies.

    Raises:
        ValueError: an option outside of these; `crops="grid"` for an image whose tokens are no rectangle.

    >>> import torch
    >>> attention = torch.tensor([[9.0, 8, 7, 6, 5, 7, 6, 1]])
    >>> image = Image(torch.eye(8), torch.zeros(2, 8), attention=attention)
    >>> HoloV(segments=2).select(image, 4).tolist()
    [0, 1, 2, 5]

    Paper: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention.
    """

    alpha: float = 0.09
    segments: int | None = None
    scale: str = "crop"
    crops: str = "raster"
    order: str = "sorted"
    name: ClassVar[str] = "holov"
    looks: ClassVar[tuple[str, ...]] = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {"scale": ("crop", "global"), "crops": ("raster", "grid"), "order": ("sorted", "official")}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"HoloV({field}={getattr(self, field)!r}): one of {', '.join(map(repr, values))}")
        if self.segments is not None and (not isinstance(self.segments, int) or self.segments < 1):
            raise ValueError(f"HoloV(segments={self.segments!r}): a number of crops, at least 1, or None")
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"HoloV(alpha={self.alpha}): a number of at least 0")

    def check(self, model: Any, family: Any) -> None:
        if self.order == "official" and family.mrope:
            raise ValueError(
                f"HoloV(order='official') numbers tokens anew in another order, and {family.name} numbers them by row "
                "and column; use order='sorted'"
            )

    def select(self, image: Image, keep: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        attention, features = image.attention[-1], image.features.float()
        crops = self._crops(image, keep)
        shares = budget(self._worth(features, attention, crops), [len(crop) for crop in crops], keep)
        chosen = [crop[ranked(attention[crop])[:n]] for crop, n in zip(crops, shares, strict=True)]
        order = torch.cat(chosen)
        places = order.sort().values
        return places if self.order == "sorted" else (places, image.features[order])

    def _crops(self, image: Image, keep: int) -> list[torch.Tensor]:
        """Indices of the tokens of every crop."""
        tokens = len(image.features)
        count = self.segments or max(1, 1024 * tokens // (576 * keep))
        place = torch.arange(tokens, device=image.features.device)
        if self.crops == "raster":
            return list(place.tensor_split(min(count, tokens)))
        if image.grid is None:
            raise ValueError(
                f"HoloV(crops='grid') needs the tokens of an image as one rectangle, and these {tokens} are none that "
                "is known; use crops='raster'"
            )
        return boxes(place.view(image.grid), count)

    def _worth(self, features: torch.Tensor, attention: torch.Tensor, crops: list[torch.Tensor]) -> torch.Tensor:
        """Scores of the crops, float64."""
        unit = features / (features.norm(dim=-1, keepdim=True) + EPS)
        seen = [1000 * attention[crop] for crop in crops]
        varied = [_variance(unit[crop]) for crop in crops]
        scales = [_scale(a, v) for a, v in zip(seen, varied, strict=True)]
        if self.scale == "global":
            scales = [_scale(torch.cat(seen), torch.cat(varied))] * len(crops)
        found = [
            (a + self.alpha * scale * v).mean() if len(a) > 1 else a[0] / 1000
            for a, v, scale in zip(seen, varied, scales, strict=True)
        ]
        return torch.stack(found).double()


def _scale(attention: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return attention.abs().mean() / (variance.abs().mean() + EPS)


def _variance(unit: torch.Tensor) -> torch.Tensor:
    """How much the cosines of each of `[m, width]` to the others vary; its own, set to 0, counts as released."""
    others, found = max(len(unit) - 1, 1), []
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        cosines.diagonal(start).zero_()
        found.append((cosines - cosines.sum(1, keepdim=True) / others).square().sum(1) / others)
    return torch.cat(found)


def budget(worth: torch.Tensor, sizes: list[int], keep: int) -> list[int]:
    """Tokens that each crop of these sizes keeps, `keep` in all, in proportion to its worth.

    >>> budget(torch.tensor([6.0, 3, 1]), [2, 9, 9], 7)
    [2, 4, 1]
    """
    weights = worth / (worth.sum() + EPS)
    shares = [min(int(share), size) for share, size in zip((weights * keep).tolist(), sizes, strict=True)]
    rest = keep - sum(shares)
    for crop in itertools.cycle(ranked(weights).tolist()):
        if rest == 0:
            return shares
        if shares[crop] < sizes[crop]:
            shares[crop] += 1
            rest -= 1


def boxes(place: torch.Tensor, count: int) -> list[torch.Tensor]:
    """A grid `[rows, columns]` cut into about `count` boxes of about equal area, each flattened.

    >>> [box.tolist() for box in boxes(torch.arange(8).view(2, 4), 2)]
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    rows, columns = place.shape
    strips = min(max(1, round(math.sqrt(count * rows / columns))), rows, count)
    many = [len(part) for part in torch.arange(count).tensor_split(strips)]  # boxes of every strip
    edges = [round(rows * sum(many[:i]) / count) for i in range(1, strips)]
    found = []
    for strip, n in zip(place.tensor_split(edges), many, strict=True):
        found += [box.flatten() for box in strip.tensor_split(min(n, columns), dim=1)]
    return [box for box in found if len(box)]
