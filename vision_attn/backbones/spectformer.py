"""SpectFormer: blocks of spectral gating first, then blocks of attention, on one size of map.

Paper: SpectFormer: Frequency and Attention is what you need in a Vision Transformer.
"""

from __future__ import annotations

import re

import torch
from timm.layers import Attention, DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.patches import ConvTokens
from vision_attn.backbones.position import PositionTable, read_table
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.spectral import SpectralGating

__all__ = ["SpectFormer", "checkpoint_filter_fn"]


class SpectralBlock(nn.Module):
    """Spectral gating and an MLP in one branch, added to its input `[batch, height, width, dim]`."""

    def __init__(self, dim: int, grid: tuple[int, int], mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = SpectralGating(dim, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x)))))


class AttentionBlock(nn.Module):
    """Attention over the whole map, then an MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2)).view(x.shape))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SpectFormer(Backbone):
    """Spectral gating, then attention, on one size of map; image `[batch, in_chans, height, width]` to logits.

    Args:
        dim, depth, num_heads: channels, blocks, heads. Features come after each quarter of the blocks.
        spectral_depth: the first blocks, which filter.
        img_size: pixels per side that position table and filters are made for; they are resampled for other images.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate: dropout before the classifier; of attention, MLPs and after the position table.

    >>> SpectFormer(dim=32, depth=4, num_heads=2, spectral_depth=2)(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"table"})

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        spectral_depth: int = 4,
        mlp_ratio: float = 4.0,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        grid = (img_size // 16,) * 2
        depths = [depth // 4 + (i < depth % 4) for i in range(4)]
        stages, number = [], 0
        for rates in drop_path_rates(drop_path_rate, depths):
            blocks = []
            for rate in rates:
                if number < spectral_depth:
                    blocks.append(SpectralBlock(dim, grid, mlp_ratio, proj_drop_rate, rate))
                else:
                    blocks.append(AttentionBlock(dim, num_heads, mlp_ratio, proj_drop_rate, rate))
                number += 1
            stages.append(Stage(nn.Identity(), blocks))
        patches = ConvTokens(in_chans, dim, 16, 16, image=True, norm=False)
        super().__init__(
            stem=nn.Sequential(patches, PositionTable(dim, grid), nn.Dropout(proj_drop_rate)),
            stages=stages,
            widths=[dim] * 4,
            reductions=[16] * 4,
            norm=nn.LayerNorm(dim, eps=1e-6),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of SpectFormer, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    place = [(i, j) for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]

    def rename(key: str) -> str:
        block = re.match(r"blocks\.(\d+)\.(.*)", key)
        if block and int(block[1]) < len(place):
            i, j = place[int(block[1])]
            return f"stages.{i}.blocks.{j}.{block[2]}"
        key = re.sub(r"^pos_embed$", "stem.1.table", re.sub(r"^patch_embed\.", "stem.0.", key))
        return re.sub(r"^head\.", "head.fc.", key)

    return read_table(renamed(state_dict, model, rename, "SpectFormer"), "stem.1.table", model)


# The heads are fixed to 6 in the published code, which fits a width of 384 only; 4 and 8 keep heads of 64 channels.
_VARIANTS = {
    "spectformer_tiny": {"dim": 256, "depth": 12, "num_heads": 4},
    "spectformer_xsmall": {"dim": 384, "depth": 12, "num_heads": 6},
    "spectformer_small": {"dim": 384, "depth": 19, "num_heads": 6},
    "spectformer_base": {"dim": 512, "depth": 19, "num_heads": 8},
}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": cfg(first_conv="stem.0.proj", pool_size=(14, 14)) for name in _VARIANTS}
)

register_variants(globals(), SpectFormer, _VARIANTS, checkpoint_filter_fn)
