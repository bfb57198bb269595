"""NAT, DiNAT, DiNAT_s and their isotropic forms: backbones of neighborhood attention.

Papers: Neighborhood Attention Transformer; Dilated Neighborhood Attention Transformer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, register_notrace_function
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.neighborhood import NeighborhoodAttention

__all__ = ["NAT", "checkpoint_filter_fn"]


class Patches(nn.Module):
    """Image to tokens: two overlapping convolutions of stride 2, or one convolution of whole patches; then a norm."""

    def __init__(self, in_chans: int, dim: int, patch: int | None):
        super().__init__()
        if patch is None:
            half = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
            self.proj = nn.Sequential(half, nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1))
        else:
            self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """Half the height and width (rounded up), twice the channels, by an overlapping convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MergeDownsample(nn.Module):
    """Half the height and width (rounded up), twice the channels, from the four tokens of each 2 x 2 square."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_to_even(x)
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # batch, height, row, width, column, channels
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


@register_notrace_function
def pad_to_even(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])


class Block(nn.Module):
    """Attention, then an MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class NAT(Backbone):
    """A backbone of neighborhood attention; image `[batch, in_chans, height, width]` to logits.

    Args:
        depths: blocks per stage.
        dim: channels of the first stage, doubled at each downsampling.
        num_heads: per stage.
        window: keys per axis.
        rel_pos_bias: learn a bias for each relative position, as all published weights do.
        dilations: per stage; blocks take 1 and this in turn.
        layer_scale: initial value of the scale of each branch, None for none.
        layout: "conv" (overlapping convolutions; NAT, DiNAT), "merge" (4 x 4 patches and patch merging; DiNAT_s) or
            "isotropic" (16 x 16 patches, no downsampling).
        small_map: rule for maps smaller than `window * dilation`; see `NeighborhoodAttention`.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, after projections, of the weights.

    >>> NAT(depths=(1, 1, 1, 1), dim=16, num_heads=(1, 2, 4, 8))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"rpb"})

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 5),
        dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        window: int = 7,
        rel_pos_bias: bool = True,
        dilations: Sequence[int] = (1, 1, 1, 1),
        layer_scale: float | None = None,
        layout: str = "conv",
        small_map: str = "pad",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        if layout not in ("conv", "merge", "isotropic"):
            raise ValueError(f"layout={layout!r}; allowed: 'conv', 'merge', 'isotropic'")
        grows = layout != "isotropic"
        widths = [dim * 2**i if grows else dim for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        block = 0
        for i, (depth, width, heads) in enumerate(zip(depths, widths, num_heads, strict=True)):
            blocks = []
            for j in range(depth):
                # The turn starts anew in each stage, except where stages are only a way to count.
                attn = NeighborhoodAttention(
                    width,
                    heads,
                    window,
                    dilation=dilations[i] if (j if grows else block) % 2 else 1,
                    rel_pos_bias=rel_pos_bias,
                    small_map=small_map,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                )
                blocks.append(Block(width, attn, mlp_ratio, layer_scale, rates[i][j]))
                block += 1
            down = ConvDownsample if layout == "conv" else MergeDownsample
            stages.append(Stage(down(width // 2) if grows and i else nn.Identity(), blocks))
        super().__init__(
            stem=Patches(in_chans, dim, {"conv": None, "merge": 4, "isotropic": 16}[layout]),
            stages=stages,
            widths=widths,
            reductions=[4 * 2**i if grows else 16 for i in range(len(depths))],
            norm=nn.LayerNorm(widths[-1]),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of NAT, DiNAT, DiNAT_s or the isotropic models, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    depth = len(model.stages[0].blocks)

    def rename(key: str) -> str | None:
        if key.endswith("relative_position_index"):
            return None
        key = re.sub(r"^patch_embed\.", "stem.", key)
        key = re.sub(r"^(levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[2]) + 1}.downsample.", key)
        key = re.sub(r"^(levels|layers)\.(\d+)\.blocks\.", r"stages.\2.blocks.", key)
        key = re.sub(r"^layers\.(\d+)\.", lambda m: f"stages.{int(m[1]) // depth}.blocks.{int(m[1]) % depth}.", key)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        return re.sub(r"^head\.", "head.fc.", key)

    return renamed(state_dict, model, rename, "NAT, DiNAT or DiNAT_s")


_MINI = {"depths": (3, 4, 6, 5), "dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL = {"depths": (3, 4, 18, 5), "dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE = {**_SMALL, "dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_MERGE = {"layout": "merge", "mlp_ratio": 4.0}
_ISO_SMALL = {
    "depths": (3, 3, 3, 3), "dim": 384, "num_heads": (12,) * 4, "mlp_ratio": 4.0, "layout": "isotropic",
    "drop_path_rate": 0.1,
}  # fmt: skip
_ISO_BASE = {**_ISO_SMALL, "dim": 768, "num_heads": (24,) * 4}
_AT_224 = {"dilations": (8, 4, 2, 1)}
_AT_384 = {"dilations": (13, 6, 3, 1)}
_ISO_DILATED = {"dilations": (2, 2, 2, 2)}

_VARIANTS = {
    "nat_mini": _MINI,
    "nat_tiny": _TINY,
    "nat_small": {**_SMALL, "layer_scale": 1e-5},
    "nat_base": {**_BASE, "layer_scale": 1e-5},
    "dinat_mini": {**_MINI, **_AT_224},
    "dinat_tiny": {**_TINY, **_AT_224},
    "dinat_small": {**_SMALL, **_AT_224},
    "dinat_base": {**_BASE, **_AT_224, "layer_scale": 1e-5},
    "dinat_large": {**_LARGE, **_AT_224},
    "dinat_large_384": {**_LARGE, **_AT_384},
    "dinat_large_384_11x11": {**_LARGE, **_AT_224, "window": 11},
    "dinat_s_tiny": {**_SMALL, **_MERGE, **_AT_224, "depths": (2, 2, 6, 2), "drop_path_rate": 0.2},
    "dinat_s_small": {**_SMALL, **_MERGE, **_AT_224, "depths": (2, 2, 18, 2)},
    "dinat_s_base": {**_BASE, **_MERGE, **_AT_224, "depths": (2, 2, 18, 2)},
    "dinat_s_large": {**_LARGE, **_MERGE, **_AT_224, "depths": (2, 2, 18, 2)},
    "dinat_s_large_384": {**_LARGE, **_MERGE, **_AT_384, "depths": (2, 2, 18, 2)},
    "nat_isotropic_small": _ISO_SMALL,
    "nat_isotropic_base": _ISO_BASE,
    "dinat_isotropic_small": {**_ISO_SMALL, **_ISO_DILATED},
    "dinat_isotropic_base": {**_ISO_BASE, **_ISO_DILATED},
    "vitrpb_small": {**_ISO_SMALL, "window": 14},  # at 224 pixels a window is the map
    "vitrpb_base": {**_ISO_BASE, "window": 14},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": cfg(
            first_conv="stem.proj" if "layout" in options else "stem.proj.0",
            **({"input_size": (3, 384, 384), "pool_size": (12, 12)} if "384" in name else {}),
            **({"pool_size": (14, 14)} if options.get("layout") == "isotropic" else {}),
        )
        for name, options in _VARIANTS.items()
    }
)
register_variants(globals(), NAT, _VARIANTS, checkpoint_filter_fn)
