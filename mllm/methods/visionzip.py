"""VisionZip: keep the tokens that the class token looks at, and merge the others into a few."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune, largest


@dataclasses.dataclass(frozen=True)
class VisionZip(InputPrune):
    """Keep the patches with the largest attention of the class token, and merge the others, in the tower's features.

    The others are merged into every n-th of them, each into the one with the most similar key: the target plus the mean
    of what was merged into it, as released. Where the projector takes single patches, the class token takes one of the
    places, as released, and the order is the class token, the patches, the merged ones. Elsewhere every token is at the
    place of the patches that it was made of. Without a class token, what each patch receives counts.

    Args:
        keep: visual tokens of an image that stay, class token and merged ones included: a share above 0 and up to 1
            (float), or a count (int).
        contextual: share of them that is merged, at least 0 and below 1; the published 30 of 192.
        merge: "sum" as released, or "mean", of the target and what is merged into it.

    Raises:
        ValueError: an option outside of these.

    >>> import torch
    >>> attention, keys = torch.tensor([[0.4, 0.1, 0.3, 0.2]]), torch.ones(4, 1, 2)
    >>> seen = dict(attention=attention, keys=keys, vision=torch.eye(4), project=lambda rows: rows)
    >>> places, features = VisionZip(contextual=0.5).select(Image(torch.zeros(4, 4), torch.zeros(2, 4), **seen), 2)
    >>> places.tolist(), features.tolist()
    ([0, 1], [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.5]])

    Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models.
    """

    contextual: float = 30 / 192
    merge: str = "sum"
    name: ClassVar[str] = "visionzip"
    looks: ClassVar[tuple[str, ...]] = ("attention", "keys", "vision")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"VisionZip(contextual={self.contextual}): a share of at least 0 and below 1")
        if self.merge not in ("sum", "mean"):
            raise ValueError(f"VisionZip(merge={self.merge!r}): 'sum' or 'mean'")

    def select(self, image: Image, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        vision, tokens = image.vision.float(), len(image.vision)
        merged = min(round(self.contextual * keep), keep - 1)
        own = 0 if image.cls is None else 1
        dominant = largest(image.attention[-1], keep - merged - own)
        left = torch.ones(tokens, dtype=torch.bool, device=vision.device)
        left[dominant] = False
        rest = left.nonzero()[:, 0]
        at = torch.arange(merged, device=vision.device) * max(1, len(rest) // max(1, merged))
        targets, others = rest[at], rest[~torch.isin(rest, rest[at])]
        rows = torch.cat([vision[dominant], self._merged(image, vision, targets, others)])
        places = torch.cat([dominant, targets])
        if own:  # another place for the class token, which comes first
            left[targets] = False
            places = torch.cat([left.nonzero()[:1, 0], places]).sort().values
            rows = torch.cat([image.cls.float()[None], rows])
        else:
            places, order = places.sort()
            rows = rows[order]
        return places, image.project(rows.to(image.vision.dtype))

    def _merged(self, image: Image, vision: torch.Tensor, targets: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Features `[targets, channels]` with the others merged into them."""
        found = vision[targets]
        if not len(targets) or not len(others):
            return found
        keys = torch.nn.functional.normalize(image.keys.mean(1), dim=-1)
        nearest = (keys[others] @ keys[targets].T).argmax(1)
        total = torch.zeros_like(found).index_add_(0, nearest, vision[others])
        count = nearest.bincount(minlength=len(targets))[:, None]
        if self.merge == "mean":
            return (found + total) / (1 + count)
        return found + total / count.clamp(min=1)
