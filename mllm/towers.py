"""What the vision tower attends to, read where its attention is computed, without maps of all pairs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vision_attn.hosts import AttachError
from vision_attn.mllm.families import Family, frame_sizes
from vision_attn.mllm.interface import Compute, listen, switch

ROWS = 1024  # query rows whose weights exist at once


@dataclasses.dataclass
class TowerLayer:
    """Queries and keys `[tiles, heads, tokens, head_dim]` of one layer, in the pieces in which they were computed."""

    q: list[torch.Tensor] = dataclasses.field(default_factory=list)
    k: list[torch.Tensor] = dataclasses.field(default_factory=list)
    mask: list[torch.Tensor | None] = dataclasses.field(default_factory=list)
    scale: float = 1.0

    def clear(self) -> None:
        self.q, self.k, self.mask = [], [], []

    def remember(self, module: Any, q, k, v, mask, scale: float, compute: Compute) -> torch.Tensor:
        self.q.append(q.detach())
        self.k.append(k.detach())
        self.mask.append(mask)
        self.scale = scale
        return compute(q, k, v, mask)

    def _pieces(self, merged: bool, lengths: list[int] | None) -> Iterator[tuple[Any, Any, Any, float]]:
        """Queries and keys of what attends together, with the mask and the scale; all heads as one if `merged`."""
        q, k, masks = self.q, self.k, self.mask
        if lengths is not None:  # sequences that some attention functions get one by one, and others in one call
            q, k, masks = (torch.cat(q, 2).split(lengths, 2), torch.cat(k, 2).split(lengths, 2), [None] * len(lengths))
        for one, other, mask in zip(q, k, masks, strict=True):
            one, other, scale = one.float(), other.float(), self.scale
            if merged:
                one, other = (x.transpose(1, 2).flatten(2)[:, None] for x in (one, other))
                scale = one.shape[-1] ** -0.5
            yield one, other, mask, scale

    def of_class_token(self, merged: bool = False) -> torch.Tensor:
        """Attention of the class token to the patches, float32 `[tiles, heads, patches]`; one head if `merged`."""
        parts = [(q[:, :, :1] @ k.mT * scale).softmax(-1) for q, k, _, scale in self._pieces(merged, None)]
        return torch.cat(parts)[:, :, 0, 1:]

    def received(self, merged: bool = False, lengths: list[int] | None = None) -> torch.Tensor:
        """What each patch receives, mean over heads and rows, float32 `[tiles, patches]`.

        Args:
            lengths: of the sequences, where a tower has all patches in one; the result is `[1, all patches]`.
        """
        parts = []
        for q, k, mask, scale in self._pieces(merged, lengths):
            total = 0
            for start in range(0, q.shape[2], ROWS):
                scores = q[:, :, start : start + ROWS] @ k.mT * scale
                if mask is not None:
                    rows = mask[..., start : start + ROWS, :] if mask.shape[-2] > 1 else mask
                    hidden = ~rows if rows.dtype == torch.bool else rows < 0
                    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
                total = total + scores.softmax(-1).sum(2)
            parts.append(total.mean(1) / q.shape[2])
        return torch.cat(parts, 0 if lengths is None else 1)

    def patches(self, cls: bool, merged: bool, lengths: list[int] | None) -> torch.Tensor:
        """Float32 `[tiles, patches]`: what the class token gives to each, or what each receives."""
        return self.of_class_token(merged).mean(1) if cls else self.received(merged, lengths)

    def key_patches(self, cls: bool, lengths: list[int] | None) -> torch.Tensor:
        """Keys, float32 `[tiles, patches, heads * head_dim]`."""
        k = torch.cat(self.k, 0 if lengths is None else 2).transpose(1, 2).flatten(2).float()
        return k[:, 1:] if cls else k


def attention_modules(tower: Any) -> list[Any]:
    """The self-attention modules of a tower, layer by layer: those that hold the projections."""
    found = []
    for module in tower.modules():
        names = {name for name, _ in module.named_children()}
        if ({"q_proj", "k_proj"} <= names or "qkv" in names) and hasattr(module, "num_heads"):
            found.append(module)
    return found


def has_class_token(base: Any, family: Family) -> bool:
    """Whether the tower of a model has one; a class of models may come with either kind of tower."""
    return family.cls and getattr(base.config, "vision_feature_select_strategy", "default") == "default"


Seen = dict[str, torch.Tensor]  # by name `[tokens, channels]`, as the tokens of an image are laid out in the prompt


class TowerWatch:
    """What methods need of the vision tower, for every image, as the tokens of the prompt are laid out.

    Args:
        wanted: layers of the tower, negative from the end.
        looks: any of "attention", "keys" and "vision".
        merged: attention with one softmax over the whole width, not one per head.
    """

    def __init__(
        self, base: Any, family: Family, wanted: tuple[int, ...], looks: tuple[str, ...] = ("attention",),
        merged: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.family, self.looks, self.merged = base, family, looks, merged
        self.tower = getattr(base, family.tower)
        self.cls = has_class_token(base, family)
        modules = attention_modules(self.tower)
        bad = [n for n in wanted if not -len(modules) <= n < len(modules)]
        if bad:
            raise ValueError(f"there is no layer {bad[0]} in a vision tower of {len(modules)} layers")
        numbers = [n % len(modules) for n in wanted]
        whole = getattr(self.tower.config, "fullatt_block_indexes", None)
        if whole:  # the other blocks attend in windows
            numbers = [n for n in numbers if n in whole] or [max(whole)]
        self.layers = {number: (modules[number], TowerLayer()) for number in numbers}
        self.heads = modules[numbers[-1]].num_heads
        self.vision: torch.Tensor | None = None
        self.seen: dict[str, list[Seen]] = {}  # of the images, and of the videos
        self.inside = False  # some models give videos to their own function for images

    def install(self, undo: list[Callable[[], None]]) -> None:
        undo.append(self._forget)
        if {"attention", "keys"} & set(self.looks):
            undo.append(switch(self.tower.config))
            for module, layer in self.layers.values():
                undo.append(listen(module, layer.remember))
        if "vision" in self.looks:
            projector = self.base.get_submodule(self.family.projector)
            undo.append(projector.register_forward_pre_hook(self._project).remove)
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(self.base, name):
                # `generate` reads the signature to know which inputs were used, and `wraps` keeps it.
                plain = getattr(self.base, name)
                vars(self.base)[name] = functools.wraps(plain)(functools.partial(self._features, kind, plain))
                undo.append(functools.partial(vars(self.base).pop, name, None))

    def _project(self, module: Any, args: tuple) -> None:
        self.vision = args[0].detach()

    def _forget(self) -> None:
        """Let go of what the tower computed."""
        self.vision = None
        for _, layer in self.layers.values():
            layer.clear()

    def _features(self, kind: str, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return plain(*args, **kwargs)
        self._forget()
        self.inside = True
        try:
            out = plain(*args, **kwargs)
        finally:
            self.inside = False
        call = inspect.signature(plain).bind(*args, **kwargs).arguments
        sizes = frame_sizes(call)
        lengths = [h * w for h, w in sizes] or None
        values = self._values(out, lengths)
        self._forget()
        laid = {name: self.family.layout(self.base, value, call) for name, value in values.items()}
        parts = [dict(zip(laid, part, strict=True)) for part in zip(*laid.values(), strict=True)]
        for number, part in enumerate(parts):
            shape = self._shape(part, sizes[number] if sizes else None)
            part["grid"] = torch.tensor(shape).expand(_tokens(part), 2)
        self.seen[kind] = parts
        return out

    def _shape(self, part: Seen, patches: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of the tokens of an image; zeros where they are no rectangle that is known."""
        if patches is not None:
            return patches[0] // self.tower.spatial_merge_size, patches[1] // self.tower.spatial_merge_size
        shown = int((~next(iter(part.values()))[:, 0].isnan()).sum())
        side = math.isqrt(shown)
        return (side, side) if side**2 == shown and shown >= _tokens(part) - 1 else (0, 0)

    def _values(self, out: Any, lengths: list[int] | None) -> dict[str, torch.Tensor]:
        """`[tiles, tokens, channels]` of everything that is looked at."""
        values, layers = {}, [layer for _, layer in self.layers.values()]
        if "attention" in self.looks:
            maps = [layer.patches(self.cls, self.merged, lengths) for layer in layers]
            values["attention"] = self.family.group(self.base, torch.stack(maps, -1))
        if "keys" in self.looks:
            values["keys"] = self.family.group(self.base, layers[-1].key_patches(self.cls, lengths))
        if "vision" in self.looks:
            rows = self.vision
            if lengths is not None:  # all patches in one sequence
                rows = rows.reshape(1, -1, rows.shape[-1] * self.tower.spatial_merge_size**2)
            values["vision"] = rows
            number = getattr(self.base.config, "vision_feature_layer", None)
            if self.cls and number is not None and out.hidden_states is not None:
                states = [out.hidden_states[n] for n in ([number] if isinstance(number, int) else number)]
                if states[0].shape[1] == rows.shape[1] + 1:  # the projector gets single patches
                    values["cls"] = torch.cat([state[:, :1] for state in states], -1).expand(-1, rows.shape[1], -1)
        return values

    def of(self, runs: list[tuple[int, str, int]]) -> list[list[Seen]]:
        """What was seen of each run of visual tokens in a batch: its images, or the frames of a video, one by one.

        Args:
            runs: row of the batch, "image" or "video", and length in tokens.

        Raises:
            AttachError: the tower saw other images than the prompt has.
        """
        beams = {kind: self._beams(kind, [n for _, k, n in runs if k == kind]) for kind in {k for _, k, _ in runs}}
        rest = {kind: list(parts) for kind, parts in self.seen.items()}
        found: list[list[Seen]] = []
        first: dict[tuple[int, int], list[Seen]] = {}  # beams repeat rows; the tower saw the images of each once
        counts: Counter[int] = Counter()
        for row, kind, length in runs:
            key = row - row % beams[kind], counts[row]
            counts[row] += 1
            if row % beams[kind] == 0:
                first[key] = self._cut(rest[kind], length)
            found.append(first[key])
        return found

    def _beams(self, kind: str, lengths: list[int]) -> int:
        seen = sum(_tokens(part) for part in self.seen.get(kind, []))
        if not seen or sum(lengths) % seen:
            raise AttachError(
                f"the prompt has {sum(lengths)} tokens of {kind}s, and the vision tower saw {kind}s of {seen}; give "
                f"the {kind}s with the prompt, as the processor does"
            )
        return sum(lengths) // seen

    def _cut(self, rest: list[Seen], length: int) -> list[Seen]:
        """Take what makes `length` tokens from the front of a list."""
        found = []
        while length > 0:
            part = rest.pop(0)
            n = _tokens(part)
            if n > length:  # the prompt has words inside of an image
                rest.insert(0, {name: value[length:] for name, value in part.items()})
                part, n = {name: value[:length] for name, value in part.items()}, length
            found.append(part)
            length -= n
        if self.family.tiles and len(found) > 1:
            found = [{name: torch.cat([part[name] for part in found]) for name in found[0]}]
        return found


def _tokens(seen: Seen) -> int:
    return len(next(iter(seen.values())))
