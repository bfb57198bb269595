"""MoH-ViT: TransNeXt with a mixture of heads in every attention layer.

Papers: MoH: Multi-Head Attention as Mixture-of-Head Attention; TransNeXt: Robust Foveal Visual Perception for Vision
Transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.patches import ConvTokens, init_conv
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.aggregated import AggregatedAttention, CosineAttention

__all__ = ["MoHViT", "checkpoint_filter_fn"]


class ConvGlu(nn.Module):
    """Gated MLP whose gate is a depthwise convolution of a map `[batch, height, width, dim]`."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.fc1(x).chunk(2, -1)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(F.gelu(gate) * x)))


class Block(nn.Module):
    """Attention, then the gated MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGlu(dim, int(2 * int(dim * mlp_ratio) / 3), drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MoHViT(Backbone):
    """TransNeXt whose tokens weigh and choose their heads; image `[batch, in_chans, height, width]` to logits.

    Args:
        dim: channels of the first stage, doubled at each downsampling.
        depths, num_heads, mlp_ratios: per stage.
        shared_heads, routed_heads: per stage, heads that are always on, and heads a token keeps of the others.
        reductions: per stage, by how much the pooled map is smaller; 1 for attention to all tokens.
        trained_size: pixels per side in training, the unit of the position biases.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, after projections, of the weights.

    >>> heads = dict(num_heads=(1, 2, 4, 8), shared_heads=(1, 2, 1, 2), routed_heads=(0, 0, 2, 4))
    >>> MoHViT(dim=16, depths=(1, 1, 1, 1), **heads)(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])

    `vision_attn.modules.load_balance` gives the loss that keeps the heads in even use.
    """

    def __init__(
        self,
        dim: int = 72,
        depths: Sequence[int] = (5, 5, 22, 5),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        shared_heads: Sequence[int] = (3, 6, 3, 8),
        routed_heads: Sequence[int] = (0, 0, 6, 12),
        reductions: Sequence[int] = (8, 4, 2, 1),
        trained_size: int = 224,
        qkv_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.45,
    ):
        widths = [dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, width in enumerate(widths):
            options = {
                "num_heads": num_heads[i],
                "trained_grid": (trained_size // 2 ** (i + 2),) * 2,
                "shared_heads": shared_heads[i],
                "routed_heads": routed_heads[i],
                "qkv_bias": qkv_bias,
                "attn_drop": attn_drop_rate,
                "proj_drop": proj_drop_rate,
            }
            blocks = []
            for rate in rates[i]:
                if reductions[i] > 1:
                    attn = AggregatedAttention(width, reduction=reductions[i], **options)
                else:
                    attn = CosineAttention(width, **options)
                blocks.append(Block(width, attn, mlp_ratios[i], proj_drop_rate, rate))
            down = ConvTokens(width // 2, width, 3, 2, prenorm=True) if i else nn.Identity()
            stages.append(Stage(down, blocks))
        super().__init__(
            stem=ConvTokens(in_chans, dim, 7, 4, image=True),
            stages=stages,
            widths=widths,
            reductions=[4 * 2**i for i in range(len(depths))],
            norm=nn.LayerNorm(widths[-1], eps=1e-6),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)
        self.apply(init_conv)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        words = ("query_embedding", "relative_pos_bias_local", "cpb_", "temperature")
        return {name for name, _ in self.named_parameters() if any(word in name for word in words)}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of MoH-ViT, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    last = len(model.stages)

    def rename(key: str) -> str | None:
        if re.search(r"relative_(pos_index|coords_table)\d|padding_mask|seq_length_scale", key):
            return None  # made from the size of the map
        key = re.sub(r"^patch_embed1\.", "stem.", key)
        key = re.sub(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.", key)
        key = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
        key = re.sub(rf"^norm{last}\.", "norm.", key)
        key = re.sub(r"^norm(\d)\.", r"stages.\1.downsample.prenorm.", key)  # norm1 is applied before stage 2
        key = key.replace("dwconv.dwconv.", "dwconv.")
        key = re.sub(r"\.attn\.(wg|wg_0|wg_1)\.", r".attn.router.\1.", key)
        return re.sub(r"^head\.", "head.fc.", key)

    return renamed(state_dict, model, rename, "MoH-ViT")


_SMALL = {"dim": 72, "depths": (5, 5, 22, 5), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.45}
_BASE = {"dim": 96, "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.6}
_VARIANTS = {
    "moh_transnext_small_80": {**_SMALL, "shared_heads": (3, 6, 3, 8), "routed_heads": (0, 0, 6, 12)},
    "moh_transnext_small_75": {**_SMALL, "shared_heads": (3, 6, 3, 4), "routed_heads": (0, 0, 6, 12)},
    "moh_transnext_base_75": {**_BASE, "shared_heads": (4, 8, 4, 5), "routed_heads": (0, 0, 8, 16)},
    "moh_transnext_base_50": {**_BASE, "shared_heads": (2, 2, 2, 4), "routed_heads": (2, 4, 6, 8)},
}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.proj") for name in _VARIANTS})

register_variants(globals(), MoHViT, _VARIANTS, checkpoint_filter_fn)
