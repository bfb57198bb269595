"""What differs between denoiser classes: where self-attention is, where the text sits, and how the grid is read.

Adding a family is one entry of `FAMILIES`. Its grid function gets the model's config, the arguments of the denoiser
call by name and a memo that lives as long as the attachment, and returns the sizes in tokens, or None when the call
does not say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Grid = tuple[int, ...]
GridRule = Callable[[Any, dict[str, Any], dict], "Grid | None"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One denoiser class.

    Args:
        name: the diffusers class.
        attention: regular expression on `named_modules()` for the self-attention modules.
        grid: reads the token grid from a denoiser call.
        axes: the axes of that grid.
        text: where text tokens sit in the attention sequence: "first", "last" or "none" (cross-attention elsewhere).
        drops_padding: padding text is cut off sample by sample, so the sequence may be shorter than image plus text.
        appends: further images may follow the first one in the sequence; they stay visible to every token.
        stages: for a U-Net its top-level parts in order of execution; the grid is halved from level to level.
        doubled_batch: its pipelines run guidance as one batch `[uncond, cond]` and do not announce it.
        refuse: why this class cannot be attached to; empty when it can.
    """

    name: str
    attention: str = ""
    grid: GridRule = lambda config, call, memo: None
    axes: tuple[str, ...] = ()
    text: str = "none"
    drops_padding: bool = False
    appends: bool = False
    stages: tuple[str, ...] = ()
    doubled_batch: bool = False
    refuse: str = ""


IMAGE, VIDEO = ("h", "w"), ("t", "h", "w")


def _latent(layout: str, patch: Callable[[Any], Grid], argument: str = "hidden_states") -> GridRule:
    """The grid of an unpacked latent whose dimensions are named by `layout`, divided by the patch size of each axis."""

    def rule(config: Any, call: dict[str, Any], memo: dict) -> Grid:
        shape = call[argument].shape
        sizes = [int(shape[layout.index(axis)]) for axis in "thw" if axis in layout]
        return tuple(size // p for size, p in zip(sizes, patch(config), strict=True))

    return rule


def _square(config: Any) -> Grid:
    return (config.patch_size,) * 2


def _flux(config: Any, call: dict[str, Any], memo: dict) -> Grid | None:
    # Position ids are a tensor, so reading them waits for the device: once per tensor, and never in compiled code.
    tokens, ids = int(call["hidden_states"].shape[1]), call.get("img_ids")
    if torch.compiler.is_compiling():
        return memo.get(tokens)
    if ids is None:
        return None
    if memo.get("ids") is not ids:
        table = ids.detach().reshape(-1, ids.shape[-1])[:tokens].cpu().long()
        table = table[table[:, 0] == 0]  # ids of appended images start with another number
        height, width = (int(n) + 1 for n in table[:, 1:].amax(dim=0))
        raster = table[:, 1] * width + table[:, 2]
        if not torch.equal(raster, torch.arange(height * width)):
            return None
        memo.update({"ids": ids, tokens: (height, width)})
    return memo[tokens]


def _qwen(config: Any, call: dict[str, Any], memo: dict) -> Grid | None:
    shapes = call.get("img_shapes") or ()  # per sample one (t, h, w), or a list of them when images are appended
    samples = [[tuple(s)] if isinstance(s[0], int) else [tuple(part) for part in s] for s in shapes]
    if not samples or any(sample != samples[0] for sample in samples):
        return None
    frames, height, width = samples[0][0]
    return (height, width) if frames == 1 else (frames, height, width)


def _ltx(config: Any, call: dict[str, Any], memo: dict) -> Grid | None:
    sizes = [call.get(name) for name in ("num_frames", "height", "width")]
    return None if None in sizes else tuple(int(size) for size in sizes)


_BLOCKS = r"^transformer_blocks\.\d+\."
_DOUBLE_AND_SINGLE = r"^(single_)?transformer_blocks\.\d+\.attn$"

FAMILIES = {
    family.name: family
    for family in (
        Family("FluxTransformer2DModel", _DOUBLE_AND_SINGLE, _flux, IMAGE, text="first", appends=True),
        Family(
            "SD3Transformer2DModel", _BLOCKS + "attn2?$", _latent("bchw", _square), IMAGE, "last", doubled_batch=True
        ),
        Family("PixArtTransformer2DModel", _BLOCKS + "attn1$", _latent("bchw", _square), IMAGE, doubled_batch=True),
        Family("QwenImageTransformer2DModel", _BLOCKS + "attn$", _qwen, IMAGE, text="first", appends=True),
        Family("WanTransformer3DModel", r"^blocks\.\d+\.attn1$", _latent("bcthw", lambda c: c.patch_size), VIDEO),
        Family(
            "HunyuanVideoTransformer3DModel",
            _DOUBLE_AND_SINGLE,
            _latent("bcthw", lambda c: (c.patch_size_t, c.patch_size, c.patch_size)),
            VIDEO,
            text="last",
        ),
        Family(
            "CogVideoXTransformer3DModel",
            _BLOCKS + "attn1$",
            _latent("btchw", lambda c: (c.patch_size_t or 1, c.patch_size, c.patch_size)),
            VIDEO,
            text="first",
        ),
        Family("LTXVideoTransformer3DModel", _BLOCKS + "attn1$", _ltx, VIDEO),
        Family(
            "MochiTransformer3DModel",
            _BLOCKS + "attn1$",
            _latent("bcthw", lambda c: (1, c.patch_size, c.patch_size)),
            VIDEO,
            text="last",
            drops_padding=True,
        ),
        Family("CosmosTransformer3DModel", _BLOCKS + "attn1$", _latent("bcthw", lambda c: c.patch_size), VIDEO),
        Family(
            "UNet2DConditionModel",
            r"^(down_blocks|mid_block|up_blocks)\..*attn1$",
            _latent("bchw", lambda c: (1, 1), argument="sample"),
            IMAGE,
            stages=("down_blocks", "mid_block", "up_blocks"),
            doubled_batch=True,
        ),
        Family(
            "SanaTransformer2DModel",
            refuse="its self-attention is linear, it never forms query-key pairs, so there is nothing to thin out",
        ),
    )
}

# A class that is not in the table, attached with an explicit grid: no text in the sequence, usual module names.
ANY = Family("any class", r"(^|\.)(attn1?|self_attn)$")


def family_of(module: torch.nn.Module, grid: Grid | None) -> Family:
    """Look up the family of a denoiser by its class and base classes.

    Raises:
        ValueError: the class is refused, or unknown and no grid was given.
    """
    name = type(module).__name__
    for cls in type(module).__mro__:
        family = FAMILIES.get(cls.__name__)
        if family is not None and family.refuse:
            raise ValueError(f"cannot attach to {name}: {family.refuse}")
        if family is not None:
            return family
    if grid is not None:
        return dataclasses.replace(ANY, axes=VIDEO[-len(grid) :] if len(grid) > 1 else ("n",))
    known = ", ".join(sorted(n for n, f in FAMILIES.items() if not f.refuse))
    raise ValueError(
        f"cannot attach to {name}: its token grid is not known. Supported classes: {known}. Ways out: pass grid=(t, "
        f"h, w) or grid=(h, w), sizes in tokens, if its self-attention covers exactly the image tokens in raster "
        f"order and calls scaled_dot_product_attention; or add an entry to vision_attn.diffusion.families.FAMILIES"
    )


def families_table() -> str:
    """Markdown table of the denoiser classes, for the README."""
    lines = ["| denoiser class | grid | text in the sequence | |", "| --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        notes = {
            f"refused: {family.refuse}": family.refuse,
            "padding text is cut off": family.drops_padding,
            "appended images stay visible to every token": family.appends,
            "the grid halves from level to level": family.stages,
        }
        note = "; ".join(text for text, holds in notes.items() if holds)
        text = "" if family.refuse else family.text
        lines.append(f"| `{family.name}` | {', '.join(family.axes)} | {text} | {note} |")
    return "\n".join(lines)
