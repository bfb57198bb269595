"""What the table of methods compares: the sizes, and at each size the methods and the honest alternatives to them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from vision_attn.diffusion import CLEAR, NTK, PI, TASR, FreeSwim, LinFusion, Method, RIFLEx, UltraViCo, YaRN
from vision_attn.diffusion.attachment import attach
from vision_attn.diffusion.trained import key
from vision_attn.kernels.patterns import BlockList, Circle, Dense, Neighborhood, Pattern, Radial, SlidingTile

PLAIN = "plain"  # the row that the others of a size are compared with: the untouched model
TRUTH = "truth"  # true scenes of the same captions


@dataclasses.dataclass(frozen=True)
class Size:
    """Frames, and height and width in pixels, that clips are drawn at."""

    name: str
    title: str
    frames: int
    side: int


SIZES = {
    size.name: size
    for size in (
        Size("1x", "The trained size", 17, 48),
        Size("2x-long", "2x the length", 37, 48),
        Size("4x-long", "4x the length", 77, 48),
        Size("2x-large", "2x the height and width", 17, 96),
        Size("4x-large", "4x the height and width", 17, 192),
        Size("still", "Still pictures of two things", 1, 48),
        Size("edit", "Edits of a true picture: another colour for its thing", 1, 48),
        Size("flux", "Still pictures of a tiny FLUX, trained for this table", 1, 48),
        Size("unet", "Still pictures of a tiny U-Net, trained for this table", 1, 48),
    )
}  # lengths are 5, 10 and 20 latent frames; sides 6, 12 and 24 tokens


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to draw a clip.

    Args:
        name: in the table.
        method: what is attached; None is the untouched model.
        way: "draw" from noise; "upscale" the clip of the trained size with `upscale_video`; "resize" it; "calibrate" a
            preset and draw with it; "consistent", `consistent_images` of the things in the caption; "edit" a true
            picture of another colour; "lora" to draw with a LoRA; "picture" to draw with a model and layers that were
            trained for this; or "truth".
        control: row that says what the idea itself adds, besides what any method of this cost would.
        options: of `upscale_video`, `calibrate` or `consistent_images`; for "edit" what is done to the picture first;
            for "lora" and "picture" the keys of what was trained.
    """

    name: str
    method: Pattern | Method | None = None
    way: str = "draw"
    control: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What the clips depend on, as plain JSON values."""
        method = None if self.method is None else self.method.to_dict()
        return {"method": method, "way": self.way, "options": self.options}


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Method):
    """The control of every sparse pattern: as many pairs, chosen blindly.

    Blocks of `block` consecutive tokens see randomly drawn blocks, and themselves; every layer draws its own.

    Args:
        like: the pattern whose density it has.
        grid: of tokens.
        block: tokens per block.

    >>> like = Neighborhood(window=(3, 5, 5))
    >>> drawn = RandomBlocks(like, (5, 6, 6)).patterns(layers=1)[0]
    >>> round(like.density((5, 6, 6)), 2), round(drawn.density((5, 6, 6)), 2)
    (0.42, 0.42)
    """

    like: Pattern
    grid: tuple[int, ...]
    block: int = 6

    name = "random-blocks"

    def attach(self, target: Any, **options: Any):
        from vision_attn.diffusion.attachment import denoisers, self_attention
        from vision_attn.diffusion.families import family_of

        module = next(iter(denoisers(target)[1].values()))
        layers = len(self_attention(module, family_of(module, None)))
        return attach(target, self.patterns(layers), **options)

    def patterns(self, layers: int) -> tuple[BlockList, ...]:
        """One pattern per layer."""
        blocks = -(-math.prod(self.grid) // self.block)
        others = max(round(self.like.density(self.grid) * blocks**2) - blocks, 0)  # every block sees itself
        draw = torch.Generator().manual_seed(0)
        found = []
        for _ in range(layers):
            apart = (~torch.eye(blocks, dtype=torch.bool)).flatten().nonzero().flatten()
            mask = torch.eye(blocks, dtype=torch.bool).flatten()
            mask[apart[torch.randperm(len(apart), generator=draw)[:others]]] = True
            found.append(BlockList.from_mask(mask.view(blocks, blocks), self.block))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "like": self.like.to_dict(), "grid": list(self.grid), "block": self.block}


def rows(size: Size) -> list[Row]:
    """The rows of one size, truth and the untouched model first."""
    start = [Row(TRUTH, way=TRUTH), Row(PLAIN)]
    if size.name == "edit":
        noise = "noise as large"
        return [
            start[0],
            Row(PLAIN, way="edit"),
            Row("protect_image", way="edit", control=noise, options={"first": "protect"}),
            Row(noise, way="edit", options={"first": "noise"}),
        ]
    if size.name == "still":
        return start + [
            Row("IR-Diffusion", way="consistent"),
            Row("IR-Diffusion, isolation alone", way="consistent", options={"reposition": False, "cross": 0.0}),
        ]
    if size.name in ("flux", "unet"):
        return [start[0], *_distilled(size.name)]
    if size.frames > SIZES["1x"].frames:
        return start + _longer(size)
    return start + (_larger(size) if size.side > SIZES["1x"].side else _trained(size))


def _grid(size: Size) -> tuple[int, int, int]:
    return (size.frames - 1) // 4 + 1, size.side // 8, size.side // 8


def _sparse(size: Size, patterns: dict[str, Pattern | CLEAR]) -> list[Row]:
    """Patterns, each followed by its control: as many pairs, drawn blindly."""
    found = []
    for name, pattern in patterns.items():
        like = Circle(pattern.radius) if isinstance(pattern, CLEAR) else pattern
        control = f"random, as dense as {name}"
        found += [Row(name, pattern, control=control), Row(control, RandomBlocks(like, _grid(size)))]
    return found


def _distilled(model: str) -> list[Row]:
    name, layers, method = {
        "flux": ("CLEAR", "clear", CLEAR(radius=2, pooled=3)),
        "unet": ("LinFusion", "linfusion", LinFusion()),
    }[model]
    own, control = {"model": key(model)}, f"{name}, not trained"
    return [
        Row(PLAIN, way="picture", options=own),
        Row(control, method, "picture", options=own),
        Row(f"{name}, distilled", method, "picture", control, own | {"layers": key(layers)}),
    ]


RADIAL = Radial(decay=0.5, block=4, thin=8)


def _trained(size: Size) -> list[Row]:
    patterns = {
        "radial": RADIAL,
        "neighborhood": Neighborhood(window=(3, 5, 5)),
        "GNA": Neighborhood(window=(4, 4, 4), stride=(1, 2, 2)),
        "sliding tile": SlidingTile(tile=(1, 2, 2), window=(3, 3, 3)),
        "CLEAR, not trained": CLEAR(radius=3, pooled=3),
    }
    return [Row("calibrated", way="calibrate", options={"recall": 0.95}), *_sparse(size, patterns)]


def _longer(size: Size) -> list[Row]:
    times = 2 if size.name == "2x-long" else 4
    edits = {"PI": PI(), "NTK": NTK(), "YaRN": YaRN(), "TASR": TASR(), "RIFLEx": RIFLEx()}
    control = "UltraViCo, alpha = 1"
    lora = [Row("radial, with a LoRA", RADIAL, "lora", "radial", {"layers": key("lora")})] if times == 2 else []
    return [
        Row("UltraViCo", UltraViCo(times=times), control=control),
        Row("UltraViCo, keys not centred", UltraViCo(times=times, center_keys=False), control=control),
        Row(control, UltraViCo(times=times, alpha=1.0)),
        *(Row(name, method) for name, method in edits.items()),
        *_sparse(size, {"radial": RADIAL, "window of 5 frames": Neighborhood(window=(5, 6, 6))}),
        *lora,
    ]


def _larger(size: Size) -> list[Row]:
    strong, weak = {"strength": 0.7}, {"strength": 0.4}
    dense, window = "upscale, dense", "window from noise"
    found = [
        Row("resized", way="resize"),
        Row(dense, Dense(), "upscale", "resized", strong),
        Row("FreeSwim", FreeSwim(cache_steps=None), "upscale", dense, strong),
        Row("FreeSwim, cached", FreeSwim(cache_steps=2), "upscale", "FreeSwim", strong),
        Row("FreeSwim, clipped windows", FreeSwim(cache_steps=None, inward=False), "upscale", "FreeSwim", strong),
        Row("FreeSwim, window alone", FreeSwim(override=False), "upscale", "FreeSwim", strong),
        Row("NTK in space", NTK(train_size=(6, 6))),
    ]
    if size.name == "2x-large":
        found += [
            Row(f"{dense}, strength 0.4", Dense(), "upscale", "resized", weak),
            Row("FreeSwim, strength 0.4", FreeSwim(cache_steps=None), "upscale", f"{dense}, strength 0.4", weak),
            Row("FreeSwim from noise", FreeSwim(cache_steps=None), control=window),
        ]
    patterns = {
        "radial": RADIAL,
        window: Neighborhood(window=(5, 7, 7)),
        "sliding tile": SlidingTile(tile=(5, 3, 3), window=(1, 3, 3)),
        "CLEAR, not trained": CLEAR(radius=4, pooled=3),
    }
    return found + _sparse(size, patterns)
