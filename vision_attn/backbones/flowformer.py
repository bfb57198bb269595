"""Flowformer for images: four stages of attention as a flow network, linear in the tokens.

Paper: Flowformer: Linearizing Transformers with Conservation Flows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.patches import ConvTokens
from vision_attn.backbones.position import PositionTable, read_table
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.linear.formulas import flow
from vision_attn.modules.softmax import check_heads

__all__ = ["Flowformer", "checkpoint_filter_fn"]


class FlowAttention(nn.Module):
    """Flow attention of a map `[batch, height, width, dim]`, between projections."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return self.proj(flow(q, k, v).flatten(-2))


class Block(nn.Module):
    """Flow attention, then an MLP with a layer scale, each after a norm and added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = FlowAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Flowformer(Backbone):
    """A backbone of flow attention; image `[batch, in_chans, height, width]` to logits.

    Args:
        dims, depths: channels and blocks per stage.
        num_heads: in every stage; divides all of `dims`.
        layer_scale: initial value of the scale of the MLP branch.
        img_size: pixels per side that the position table is made for; it is resampled for other images.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate: dropout before the classifier, in MLPs and after the position table.

    >>> Flowformer(dims=(12, 24, 48, 96), depths=(1, 1, 1, 1), num_heads=3)(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"table"})

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [Block(dim, num_heads, mlp_ratio, layer_scale, proj_drop_rate, rate) for rate in rates[i]]
            down = ConvTokens(dims[i - 1], dim, 2, 2, norm=False) if i else nn.Identity()
            stages.append(Stage(down, blocks))
        patches = ConvTokens(in_chans, dims[0], 4, 4, image=True, norm=False)
        table = PositionTable(dims[0], (img_size // 4,) * 2)
        super().__init__(
            stem=nn.Sequential(patches, table, nn.Dropout(proj_drop_rate)),
            stages=stages,
            widths=dims,
            reductions=[4 * 2**i for i in range(len(dims))],
            norm=nn.LayerNorm(dims[-1], eps=1e-6),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of Flowformer for images, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """

    def rename(key: str) -> str:
        key = re.sub(r"^pos_embed$", "stem.1.table", key)
        key = re.sub(r"^patch_embed\.0\.", "stem.0.", key)
        key = re.sub(r"^patch_embed\.(\d)\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^blocks\.(\d)\.", r"stages.\1.blocks.", key)
        key = re.sub(r"\.gamma$", ".ls2.gamma", key)
        return re.sub(r"^head\.", "head.fc.", key)

    return read_table(renamed(state_dict, model, rename, "Flowformer"), "stem.1.table", model)


_VARIANTS = {"flowformer": {}}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.0.proj") for name in _VARIANTS})

register_variants(globals(), Flowformer, _VARIANTS, checkpoint_filter_fn)
