"""DAMRO: what the model would say of the patches that drew the eye of the vision tower alone counts against a word."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from vision_attn.hosts import AttachError
from vision_attn.mllm.contrast import Contrast, Step, contrast
from vision_attn.mllm.interface import listen, switch
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.reading import Reading, replace
from vision_attn.mllm.tokens import take
from vision_attn.mllm.towers import TowerLayer, attention_modules, has_class_token

REDUCE = ("mean", "merged")
Span = tuple[int, torch.Tensor]  # tokens of an image in the prompt, and those that stay, in their new order


@dataclasses.dataclass(frozen=True)
class DAMRO(Contrast):
    """Contrast with a branch that sees only `k` patches of every image: those that the class token of the vision tower
    looks at most, which are often background.

    They are in order of decreasing attention, as published, and the words after them move up. The layer is the one
    whose output feeds the projector. Of a tiled image `k` patches of every tile, each tile followed by the newline
    token; where a projector makes one token of several patches, `k` such tokens; the Q-Former of InstructBLIP sees `k`
    patches and gives as many tokens as ever. Methods that drop tokens do not touch this branch. One more pass of the
    tower, and of the text model for every token.

    Args:
        alpha: weight, at least 0; published runs use 0.5 for yes-or-no questions, 1.5 to 2 for captions.
        k: patches, at least 1: 10 of 576 as published, 4 of 257 for InstructBLIP.
        beta: words less probable than this share of the best one are never said, 0 to 1.
        head_reduce: "mean" over heads of their softmax, as the authors' code for InstructBLIP; "merged" is one softmax
            over the whole width, as their code for LLaVA.
        proxy: None refuses towers without a class token; "received" ranks their patches by the attention they receive,
            which is not in the paper.

    >>> DAMRO(k=4).alpha
    0.5

    Paper: DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination.
    """

    alpha: float = 0.5
    k: int = 10
    beta: float = 0.1
    head_reduce: str = "mean"
    proxy: str | None = None
    name: ClassVar[str] = "damro"

    def __post_init__(self) -> None:
        check_numbers(self, beta=(0, 1), alpha=(0, math.inf))
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"DAMRO(k={self.k!r}): k is a count of patches, at least 1")
        if self.head_reduce not in REDUCE:
            raise ValueError(f"DAMRO(head_reduce={self.head_reduce!r}): one of {', '.join(map(repr, REDUCE))}")
        if self.proxy not in (None, "received"):
            raise ValueError(f"DAMRO(proxy={self.proxy!r}): None or 'received'")

    def check(self, model: Any, family: Any) -> None:
        if self.proxy is None and not has_class_token(model.base_model, family):
            raise ValueError(
                f"DAMRO ranks patches by what the class token looks at, and the vision tower of {family.name} has "
                "none; DAMRO(proxy='received') ranks them by the attention they receive, which is not in the paper"
            )

    def other(self, reading: Reading) -> Reading:
        engine, calls = reading.source.engine, reading.source.calls
        if "get_video_features" in calls:
            raise AttachError("DAMRO is for images, and the prompt has a video")
        base, family, layer = engine.base, engine.family, TowerLayer()
        tower, cls = getattr(base, family.tower), has_class_token(base, family)
        spans: list[Span] = []

        def scores() -> torch.Tensor:
            grid = calls["get_image_features"].get("image_grid_thw")
            lengths = None if grid is None else [h * w for frames, h, w in grid.tolist() for _ in range(frames)]
            return layer.patches(cls, self.head_reduce == "merged", lengths)

        def query(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            """The Q-Former gets the best patches."""
            best = self._best(scores())
            states = take(kwargs["encoder_hidden_states"][:, 1:], best, 1)
            return args, {**kwargs, "encoder_hidden_states": states, "encoder_attention_mask": torch.ones_like(best)}

        def pack(plain: Callable, tiles: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            """The best patches of every tile, and a newline token after each."""
            best, made = iter(self._best(family.group(base, scores()[..., None])[..., 0])), []
            for image in tiles:
                parts = [torch.cat([tile[next(best)], base.image_newline[None].to(tile)]) for tile in image]
                made.append(torch.cat(parts))
            counts = plain(tiles, *args, **kwargs)[1].tolist()
            short = [n for n, image in zip(counts, made, strict=True) if n < len(image)]
            if short:
                raise ValueError(f"DAMRO(k={self.k}): an image has {short[0]} tokens in the prompt; take a smaller k")
            spans.extend((n, torch.arange(len(image))) for n, image in zip(counts, made, strict=True))
            return made, torch.tensor([len(image) for image in made])

        undo = [switch(tower.config), listen(self._module(engine, tower), layer.remember)]
        try:
            if hasattr(base, "qformer"):
                undo.append(base.qformer.register_forward_pre_hook(query, with_kwargs=True).remove)
                return reading.with_images(lambda name, call: call, prune=False)
            if hasattr(base, "pack_image_features"):
                undo.append(replace(base, "pack_image_features", pack))
            found = reading.source.encode(lambda name, call: call)
        finally:
            while undo:
                undo.pop()()
        if not spans:
            laid = family.layout(base, family.group(base, scores()[..., None]), calls["get_image_features"])
            spans = [(len(part), self._best(part[:, 0])) for part in laid]
            out = found["image"]
            out.pooler_output = _picked(out.pooler_output, spans)
            if getattr(out, "deepstack_features", None) is not None:
                out.deepstack_features = [_picked(level, spans) for level in out.deepstack_features]
        return reading.with_fewer(found, spans)

    def _module(self, engine: Any, tower: Any) -> Any:
        modules = attention_modules(tower)
        number = getattr(engine.base.config, "vision_feature_layer", None)
        if isinstance(number, (list, tuple)):
            number = number[-1]
        if hasattr(engine.base, "qformer"):
            number = -2
        number = len(modules) - 1 if number is None else number % len(modules) if number < 0 else number - 1
        whole = getattr(tower.config, "fullatt_block_indexes", None)
        return modules[number if not whole or number in whole else max(whole)]  # other blocks attend in windows

    def _best(self, scores: torch.Tensor) -> torch.Tensor:
        if self.k > scores.shape[-1]:
            raise ValueError(f"DAMRO(k={self.k}): the image has {scores.shape[-1]} tokens; k is at most so many")
        return scores.argsort(dim=-1, descending=True, stable=True)[..., : self.k]

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        return contrast(z, step.other, self.alpha, self.beta)


def _picked(features: Any, spans: list[Span]) -> Any:
    """The chosen ones of the features of images, or of rows of the batch, each `[tokens, width]`."""
    rest, found = iter(spans), []
    for image in features:
        parts, at = [image[:0]], 0
        while at < len(image):
            tokens, order = next(rest)
            parts.append(image[at + order])
            at += tokens
        found.append(torch.cat(parts))
    return torch.stack(found) if torch.is_tensor(features) else found
