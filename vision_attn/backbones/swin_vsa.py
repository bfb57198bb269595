"""Swin + VSA and QFormer: the Swin pyramid with windows that move, stretch and tilt instead of shifts.

Papers: VSA: Learning Varied-Size Window Attention in Vision Transformers; Vision Transformer with Quadrangle Attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.nat import MergeDownsample, Patches
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.quadrangle import QuadrangleAttention
from vision_attn.modules.varied_window import VariedWindowAttention

__all__ = ["SwinVSA", "checkpoint_filter_fn"]


class Block(nn.Module):
    """A depthwise convolution for positions, then attention and MLP on its result, on maps `[batch, ..., dim]`."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        half = attn.window // 2
        self.pos = nn.Conv2d(dim, dim, 2 * half + 1, padding=half, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinVSA(Backbone):
    """Four stages of varied-size windows; image `[batch, in_chans, height, width]` of any size to logits.

    Args:
        depths: blocks per stage.
        dim: channels of the first stage, doubled at each downsampling.
        num_heads: per stage.
        window: tokens per side of a window.
        quadrangle: "table" or "decomposed" makes them quadrangles, with that kind of relative positions.
        pull: gradient that brings windows back into the map; see `QuadrangleAttention`.
        drop_path_rate: stochastic depth of the last block, 0 to 1.

    >>> SwinVSA(depths=(1, 1, 1, 1), dim=16, num_heads=(1, 2, 4, 8))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"relative_position_bias_table"})

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        quadrangle: str | None = None,
        pull: float = 0.0,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        if quadrangle not in (None, "table", "decomposed"):
            raise ValueError(f"quadrangle {quadrangle!r}; allowed: None, 'table', 'decomposed'")
        widths, rates = [dim * 2**i for i in range(len(depths))], drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, width in enumerate(widths):
            blocks = []
            for j in range(depths[i]):
                if quadrangle:
                    attn = QuadrangleAttention(width, num_heads[i], window, quadrangle == "decomposed", pull=pull)
                else:
                    attn = VariedWindowAttention(width, num_heads[i], window, pull=pull)
                blocks.append(Block(width, attn, mlp_ratio, rates[i][j]))
            stages.append(Stage(MergeDownsample(width // 2) if i else nn.Identity(), blocks))
        reductions = [4 * 2**i for i in range(len(depths))]
        norm = nn.LayerNorm(widths[-1])
        stem = Patches(in_chans, dim, 4)
        super().__init__(stem, stages, widths, reductions, norm, num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, VariedWindowAttention):
                module.reset_transform()


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of Swin + VSA or QFormer, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """

    def rename(key: str) -> str | None:
        if key.endswith("relative_position_index"):
            return None
        key = re.sub(r"^patch_embed\.", "stem.", key)
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
        key = re.sub(r"^layers\.(\d+)\.", r"stages.\1.", key)
        return re.sub(r"^head\.", "head.fc.", key.replace(".transform.2.", ".transform."))

    state_dict = renamed(state_dict, model, rename, "Swin + VSA or QFormer")
    return {key: value.flatten(1) if key.endswith(".transform.weight") else value for key, value in state_dict.items()}


_SMALL = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_VARIANTS = {
    "swin_tiny_vsa": {},
    "swin_small_vsa": _SMALL,
    "swin_base_vsa": {**_SMALL, "dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
    "qformer_tiny": {"quadrangle": "table", "pull": 0.1},
    "qformer_tiny_decomposed": {"quadrangle": "decomposed", "pull": 0.1},
}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.proj") for name in _VARIANTS})
register_variants(globals(), SwinVSA, _VARIANTS, checkpoint_filter_fn)
