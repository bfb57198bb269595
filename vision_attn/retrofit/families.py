"""Where the image tokens of a vision model are: its attention layers, its grid, and the tokens before the grid.

Adding a class is one entry of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import re

from torch import nn

from vision_attn.retrofit.interception import is_attention, own_class

Layers = "list[tuple[int, str, nn.Module]]"


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of image towers whose tokens stay one sequence: tokens without a place first, then the grid by rows.

    Args:
        blocks: regular expression on `named_modules()` of the tower; its group is the number of the layer. Attention is
            what is in there and is known to call `scaled_dot_product_attention`.
        embed: the module that turns the image into tokens, which is where the grid is read; the end of its name.
        prefix: tokens before the grid, besides registers that a config counts; None asks the tower for
            `num_prefix_tokens`.
        end: the module after the last block, or the one that has all blocks.
        biased: it adds a bias for every pair of places to the scores.
        merge: tokens can be merged in it.
        frames: it takes images `[batch, frames, channels, height, width]`, and these layers see the tokens of all
            frames, each with tokens of its own before its grid.
        refuse: why this class cannot be attached to; empty when it can.
    """

    blocks: str = r"^blocks\.(\d+)(?:\.|$)"
    embed: str = "patch_embed"
    prefix: int | None = None
    end: str = "norm"
    biased: bool = False
    merge: bool = True
    frames: bool = False
    refuse: str = ""


_TIMM = Family()
_NAFLEX = Family(refuse="the images of one batch may have different grids, and it does not say which")
_OTHER_WINDOWS = Family(refuse="its windows are cut inside of the layers, where no grid can be told")


def _hugging(prefix: int = 1, embed: str = "patch_embeddings.projection") -> Family:
    return Family(r"(?:^|.*\.)layers?\.(\d+)\.", embed, prefix, merge=False)


# (package, class) -> family. A subclass is found by its base class.
FAMILIES = {
    ("timm", "VisionTransformer"): _TIMM,  # ViT, DeiT, DeiT III, DINO, DINOv2 with registers, SigLIP, hybrids
    ("timm", "VisionTransformerRelPos"): Family(biased=True),
    ("timm", "Eva"): _TIMM,  # EVA-02, DINOv3, PE: rotary positions
    ("timm", "Beit"): Family(biased=True),
    ("open_clip", "VisionTransformer"): Family(r"^transformer\.resblocks\.(\d+)\.", "conv1", 1, "transformer"),
    ("transformers", "ViTModel"): _hugging(),
    ("transformers", "DeiTModel"): _hugging(prefix=2),
    ("transformers", "Dinov2Model"): _hugging(),
    ("transformers", "Dinov2WithRegistersModel"): _hugging(),
    ("transformers", "DINOv3ViTModel"): _hugging(embed="embeddings.patch_embeddings"),
    ("transformers", "CLIPVisionModel"): _hugging(embed="patch_embedding"),
    ("transformers", "SiglipVisionModel"): _hugging(prefix=0, embed="patch_embedding"),
    ("timm", "NaFlexVit"): _NAFLEX,
    ("timm", "VisionTransformerSAM"): _OTHER_WINDOWS,
    ("timm", "SwinTransformerV2Cr"): _OTHER_WINDOWS,
}
# VGGT and what is built like it, in any package: a module that has all of these. Its layers here are those over all
# frames; those inside of a frame, in the backbone and in the heads stay as they are.
FRAMES = ("frame_blocks", "global_blocks", "patch_start_idx", "patch_size")
_VGGT = Family(r"^global_blocks\.(\d+)\.", frames=True)
SWIN_BLOCKS = ("SwinTransformerBlock", "SwinTransformerV2Block")  # of timm; each is a layer and knows its own grid


@dataclasses.dataclass(frozen=True)
class Place:
    """A tower inside of a model: its name there, its modules, its layers as (number, name, module)."""

    name: str
    module: nn.Module
    family: Family | None  # None: Swin blocks, or a class that is not known
    layers: list[tuple[int, str, nn.Module]]
    given: int | None = None  # tokens before the grid, of a class that is not known

    @property
    def prefix(self) -> int:
        return (prefix_of(self.module) or 0) if self.given is None else self.given

    @property
    def embed(self) -> nn.Module | None:
        if self.family is None:
            return None
        return next((m for name, m in self.module.named_modules() if name.endswith(self.family.embed)), None)


def find(model: nn.Module, grid: tuple[int, ...] | None, prefix: int | None) -> list[Place]:
    """The towers in a model, each with its attention layers; text towers are none. A grid, and the tokens before it,
    are for a model that has none of the known ones.

    Raises:
        ValueError: there is none, with what was looked for, or it is one of a class that is refused.
    """
    places: list[Place] = []
    swin: list[tuple[int, str, nn.Module]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{place.name}.") or not place.name for place in places):
            continue
        if is_swin(module):
            swin.append((len(swin), name, module))
            continue
        family = family_of(module)
        if family is not None and family.refuse:
            raise ValueError(f"cannot attach to {own_class(module).__name__}: {family.refuse}")
        if family is not None and (layers := _layers(family, name, module)):
            places.append(Place(name, module, family, layers))
    if swin:
        places.append(Place("", model, None, swin))
    if places and prefix is not None:
        raise ValueError(f"{own_class(places[0].module).__name__} says what is before its grid; leave prefix out")
    if not places and grid is not None:
        places = [Place("", model, None, _outermost(model), prefix)]
    if not any(place.layers for place in places):
        classes = [cls for (_, cls), family in FAMILIES.items() if not family.refuse]
        known = ", ".join(dict.fromkeys([*classes, *SWIN_BLOCKS, "VGGT"]))
        raise ValueError(
            f"nothing to attach to in {own_class(model).__name__}: looked for attention layers in {known}"
            + (
                "; any other model needs grid=(h, w), its sizes in tokens, if it calls scaled_dot_product_attention"
                if grid is None
                else ", then for modules whose class has Attention in its name"
            )
        )
    return places


def family_of(module: nn.Module) -> Family | None:
    """The family of a tower by its class and base classes, or for VGGT by what it has."""
    for cls in type(module).__mro__:
        family = FAMILIES.get((cls.__module__.partition(".")[0], cls.__name__))
        if family is not None:
            return family
    return _VGGT if all(hasattr(module, name) for name in FRAMES) else None


def prefix_of(module: nn.Module) -> int | None:
    """Tokens before the grid of a tower; None where it does not say so."""
    family = family_of(module)
    if family is None or family.prefix is None:
        name = "num_prefix_tokens" if family is None or not family.frames else "patch_start_idx"
        return getattr(module, name, None)
    return family.prefix + getattr(getattr(module, "config", None), "num_register_tokens", 0)


def is_swin(module: nn.Module) -> bool:
    return any(c.__name__ in SWIN_BLOCKS and c.__module__.startswith("timm.") for c in type(module).__mro__)


def _layers(family: Family, name: str, tower: nn.Module) -> list[tuple[int, str, nn.Module]]:
    dot = f"{name}." if name else ""
    found = [(re.match(family.blocks, n), n, m) for n, m in tower.named_modules() if is_attention(m)]
    return [(int(match.group(1)), dot + n, m) for match, n, m in found if match]


def _outermost(model: nn.Module) -> list[tuple[int, str, nn.Module]]:
    """Attention modules of a class that is not known, those inside of others left out; if there are none, what is
    called so."""
    for is_one in (is_attention, lambda module: re.search("Attn|Attention", own_class(module).__name__)):
        found: list[tuple[int, str, nn.Module]] = []
        for name, module in model.named_modules():
            if is_one(module) and not any(name.startswith(f"{n}.") or not n for _, n, _ in found):
                found.append((len(found), name, module))
        if found:
            break
    return found
