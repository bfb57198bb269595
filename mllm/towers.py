"""What the vision tower attends to, read where its attention is computed, without maps of all pairs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from vision_attn.hosts import AttachError
from vision_attn.mllm.families import Family
from vision_attn.mllm.interface import Compute, listen, switch

ROWS = 1024  # query rows whose weights exist at once


@dataclasses.dataclass
class TowerLayer:
    """Queries and keys `[tiles, heads, tokens, head_dim]` of one layer, in the pieces in which they were computed."""

    q: list[torch.Tensor] = dataclasses.field(default_factory=list)
    k: list[torch.Tensor] = dataclasses.field(default_factory=list)
    scale: float = 1.0

    def of_class_token(self) -> torch.Tensor:
        """Attention of the class token to the patches, float32 `[tiles, heads, patches]`."""
        q, k = torch.cat(self.q), torch.cat(self.k)
        scores = (q[:, :, :1].float() @ k.float().mT)[:, :, 0] * self.scale
        return scores.softmax(-1)[..., 1:]

    def received(self) -> torch.Tensor:
        """What each patch receives, mean over heads and rows, float32 `[tiles, patches]`; `[1, all patches]` where the
        images come one after the other."""
        parts = []
        for q, k in zip(self.q, self.k, strict=True):
            total = 0
            for rows in q.float().split(ROWS, 2):
                total = total + (rows @ k.float().mT * self.scale).softmax(-1).sum(2)
            parts.append(total.mean(1) / q.shape[2])
        return (
            torch.cat(parts) if len({part.shape for part in parts}) == 1 and len(parts[0]) > 1 else torch.cat(parts, 1)
        )


def attention_modules(tower: Any) -> list[Any]:
    """The self-attention modules of a tower, layer by layer: those that hold the projections."""
    found = []
    for module in tower.modules():
        names = {name for name, _ in module.named_children()}
        if ({"q_proj", "k_proj"} <= names or "qkv" in names) and hasattr(module, "num_heads"):
            found.append(module)
    return found


class TowerWatch:
    """Scores of the patches of every image, for chosen layers of the tower, as the tokens of the prompt need them."""

    def __init__(self, base: Any, family: Family, wanted: tuple[int, ...]) -> None:
        self.base, self.family = base, family
        self.tower = getattr(base, family.tower)
        modules = attention_modules(self.tower)
        deepest = max(-n if n < 0 else n + 1 for n in wanted)
        if deepest > len(modules):
            raise ValueError(f"layer {wanted} of a vision tower of {len(modules)} layers")
        self.layers = {number: (modules[number], TowerLayer()) for number in wanted}
        self.images: list[dict[int, torch.Tensor]] = []
        self.used = False  # the scores were handed out, so that the next images start a new list

    def install(self, undo: list[Callable[[], None]]) -> None:
        undo.append(switch(self.tower.config))
        for module, layer in self.layers.values():
            undo.append(listen(module, functools.partial(_remember, layer)))
        for name in ("get_image_features", "get_video_features"):
            if hasattr(self.base, name):
                # `generate` reads the signature to know which inputs were used, and `wraps` keeps it.
                plain = getattr(self.base, name)
                vars(self.base)[name] = functools.wraps(plain)(functools.partial(self._features, plain))
                undo.append(functools.partial(vars(self.base).pop, name, None))

    def _features(self, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        for _, layer in self.layers.values():
            layer.q, layer.k = [], []
        out = plain(*args, **kwargs)
        if self.used:
            self.images, self.used = [], False
        call = inspect.signature(plain).bind(*args, **kwargs).arguments
        scores = {}
        for number, (_, layer) in self.layers.items():
            patches = layer.of_class_token().mean(1) if self.family.cls else layer.received()
            scores[number] = self.family.layout(self.base, patches, call)
            layer.q, layer.k = [], []
        parts = zip(*scores.values(), strict=True)
        self.images += [dict(zip(scores, part, strict=True)) for part in parts]
        return out

    def scores_of(self, rows: list[int]) -> list[dict[int, torch.Tensor]]:
        """The scores of the images in a batch, given the row of each. Beams repeat rows; the tower saw each once."""
        self.used = True
        if not self.images or len(rows) % len(self.images):
            raise AttachError(
                f"the prompt has {len(rows)} images, and the vision tower saw {len(self.images)}; give the images with "
                "the prompt, as the processor does"
            )
        beams = len(rows) // len(self.images)
        own = {row: [] for row in rows}
        images = iter(self.images)
        for row in rows:
            if row % beams == 0:
                own[row].append(next(images))
        return [own[row - row % beams][rows[:i].count(row)] for i, row in enumerate(rows)]


def _remember(layer: TowerLayer, module: Any, q, k, v, mask, scale: float, compute: Compute) -> torch.Tensor:
    layer.q.append(q.detach())
    layer.k.append(k.detach())
    layer.scale = scale
    return compute(q, k, v, mask)
