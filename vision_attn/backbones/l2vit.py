"""L2ViT: window attention and linear attention in turn, the latter followed by large local convolutions.

Paper: The Linear Attention Resurrection in Vision Transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import by_rules, renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.nat import pad_to_even
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear_and_conv
from vision_attn.modules.linear import LinearAttention2d
from vision_attn.modules.linear.layer import MapConv
from vision_attn.modules.window import WindowAttention2d

__all__ = ["L2ViT", "checkpoint_filter_fn"]


class Stem(nn.Module):
    """Image `[batch, in_chans, height, width]` to a map of a quarter of the size (rounded up)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        first = (nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2), nn.ReLU())
        self.proj = nn.Sequential(*first, nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Conv2d(dim, out_dim, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(pad_to_even(self.norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalBlock(nn.Module):
    """Window attention and MLP, each after a position convolution."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.pos1 = MapConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention2d(dim, num_heads, window, rel_pos_bias=False, small_map="pad")
        self.pos2 = MapConv(dim, 3)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.pos2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Concentration(nn.Module):
    """Two 7 x 7 depthwise convolutions, which bring back the locality that linear attention lacks."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = MapConv(dim, 7)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = MapConv(dim, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv1(x)).permute(0, 3, 1, 2)
        return self.conv2(self.bn(x).permute(0, 2, 3, 1))


class GlobalBlock(nn.Module):
    """Linear attention, local concentration and MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.pos1 = MapConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LinearAttention2d(dim, num_heads, "l2vit")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim)
        self.local = Concentration(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class L2ViT(Backbone):
    """A pyramid of local and global blocks in turn; image `[batch, in_chans, height, width]` to logits.

    Args:
        depths, dims, num_heads: per stage.
        window: side of the windows of local blocks.
        drop_path_rate: stochastic depth of the last block, 0 to 1.

    >>> L2ViT(depths=(2, 1, 1, 1), dims=(8, 16, 32, 64), num_heads=(1, 2, 4, 8))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"temperature"})

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks = [
                GlobalBlock(dim, heads, mlp_ratio, rate) if j % 2 else LocalBlock(dim, heads, window, mlp_ratio, rate)
                for j, rate in enumerate(rates[i])
            ]
            stages.append(Stage(Downsample(dims[i - 1], dim) if i else nn.Identity(), blocks))
        super().__init__(
            stem=Stem(in_chans, dims[0]),
            stages=stages,
            widths=dims,
            reductions=[4 * 2**i for i in range(len(dims))],
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear_and_conv)


_RENAMES = (
    (r"^downsample_layers\.0\.(proj\.)?", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.0\.proj\.", ".pos1."),
    (r"\.cpe\.1\.proj\.", ".pos2."),
    (r"\.local_mp\.", ".local."),
    (r"\.attn\.temperature$", ".attn.core.temperature"),
    (r"^head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of L2ViT, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    weights = renamed(state_dict, model, lambda key: by_rules(key, _RENAMES), "L2ViT")
    return {key: value.flatten() if key.endswith("temperature") else value for key, value in weights.items()}


_BASE = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_VARIANTS = {
    "l2vit_tiny": {},
    "l2vit_small": {"depths": (2, 2, 18, 2)},
    "l2vit_base": _BASE,
    "l2vit_base_384": {**_BASE, "window": 12},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": cfg(
            first_conv="stem.proj.0", **({"input_size": (3, 384, 384), "pool_size": (12, 12)} if "384" in name else {})
        )
        for name in _VARIANTS
    }
)
register_variants(globals(), L2ViT, _VARIANTS, checkpoint_filter_fn)
