"""Hierarchical SpectFormer: two stages of spectral gating, two of attention, and a head with a label per token.

Paper: SpectFormer: Frequency and Attention is what you need in a Vision Transformer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, use_fused_attn
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import by_rules, renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.patches import ConvTokens, init_conv
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.softmax import check_heads, softmax_attention
from vision_attn.modules.spectral import SpectralGating

__all__ = ["HierarchicalSpectFormer", "checkpoint_filter_fn"]


class QueryAttention(nn.Module):
    """Softmax attention with projections q and kv; with `first_only` for the first token alone."""

    def __init__(self, dim: int, num_heads: int, first_only: bool = False):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.first_only = num_heads, first_only
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = x[:, :1] if self.first_only else x
        q = self.q(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = softmax_attention(q, k, v, self.fused_attn)
        return self.proj(out.transpose(1, 2).flatten(2))


class ConvMlp(nn.Module):
    """MLP with a depthwise convolution between its layers, on maps `[batch, height, width, dim]`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class StageBlock(nn.Module):
    """Spectral gating (given a grid) or attention (given heads), then `ConvMlp`, each after a norm and added."""

    def __init__(self, dim: int, grid: tuple[int, int] | None, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpectralGating(dim, grid) if grid else TokensOf(QueryAttention(dim, num_heads))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TokensOf(nn.Module):
    """A layer for tokens, on a map."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1, 2)).view(x.shape)


class TokenLabelHead(nn.Module):
    """A class token that starts as the mean of the map and attends to it, and a classifier for every token.

    The logits are those of the class token plus half of the largest over the tokens, class by class.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_classes: int, pool_type: str, drop_rate: float):
        super().__init__()
        self.num_features = dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = QueryAttention(dim, num_heads, first_only=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        if pool_type is not None:
            if pool_type not in ("", "avg"):
                raise ValueError(f"global_pool={pool_type!r}; the class token allows 'avg', or '' for the map")
            self.pooled = bool(pool_type)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.aux_fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.classifies = num_classes > 0

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """`[batch, height, width, dim]` to logits, to the class token, or without pooling to the normed map."""
        if not self.pooled:
            return self.norm(x)
        tokens = x.flatten(1, 2)
        first = tokens.mean(1, keepdim=True)
        first = first + self.attn(self.norm1(torch.cat([first, tokens], 1)))
        first = self.drop(self.norm(first + self.mlp(self.norm2(first)))[:, 0])
        if pre_logits or not self.classifies:
            return first
        return self.fc(first) + 0.5 * self.token_logits(x).flatten(1, 2).amax(1)

    def token_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of every token, `[batch, height, width, num_classes]`; what token labelling trains."""
        return self.aux_fc(self.norm(x))


class HierarchicalSpectFormer(Backbone):
    """Two stages of spectral gating, two of attention; image `[batch, in_chans, height, width]` to logits.

    Args:
        dims, depths, num_heads, mlp_ratios: per stage; `num_heads` counts in the last two.
        stem_dim: channels of the first convolutions.
        img_size: pixels per side that the filters are made for; they are resampled for other images.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate: dropout before the classifier.

    >>> sizes = dict(dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), stem_dim=8)
    >>> HierarchicalSpectFormer(**sizes)(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])

    The features of `forward_features` have no norm yet: the head's class token attends to them as they are.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        stem_dim: int = 32,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            grid = (img_size // 2 ** (i + 2),) * 2 if i < 2 else None
            blocks = [StageBlock(dim, grid, num_heads[i], mlp_ratios[i], rate) for rate in rates[i]]
            down = ConvTokens(dims[i - 1], dim, 3, 2, prenorm=True) if i else nn.Identity()
            stages.append(Stage(down, blocks))
        convs = []
        for i in range(3):
            kernel, stride = (7, 2) if i == 0 else (3, 1)
            conv = nn.Conv2d(stem_dim if i else in_chans, stem_dim, kernel, stride, kernel // 2, bias=False)
            convs += [conv, nn.BatchNorm2d(stem_dim), nn.ReLU()]
        super().__init__(
            stem=nn.Sequential(nn.Sequential(*convs), ConvTokens(stem_dim, dims[0], 3, 2, image=True)),
            stages=stages,
            widths=dims,
            reductions=[4 * 2**i for i in range(len(dims))],
            norm=nn.Identity(),
            num_classes=num_classes,
            head=TokenLabelHead(dims[-1], num_heads[-1], mlp_ratios[-1], num_classes, global_pool, drop_rate),
        )
        self.apply(init_linear)
        self.apply(init_conv)


_RENAMED = (
    (r"^head\.", "head.fc."),
    (r"^patch_embed1\.conv\.", "stem.0."),
    (r"^patch_embed1\.", "stem.1."),
    (r"^norm4\.", "head.norm."),
    (r"^norm(\d)\.", r"stages.\1.downsample.prenorm."),  # norm1 is applied before stage 2
    (r"^block([34])\.(\d+)\.attn\.", r"block\1.\2.attn.layer."),
    (r"dwconv\.dwconv\.", "dwconv."),
    (r"^post_network\.0\.", "head."),
    (r"^aux_head\.", "head.aux_fc."),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of the hierarchical SpectFormer, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """

    def rename(key: str) -> str | None:
        if key.startswith("aux_head.") and not model.num_classes:
            return None
        key = by_rules(key, _RENAMED)
        key = re.sub(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.", key)
        return re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)

    return renamed(state_dict, model, rename, "hierarchical SpectFormer")


_VARIANTS = {
    "spectformer_h_small": {},
    "spectformer_h_base": {
        "dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3), "num_heads": (2, 4, 10, 16), "stem_dim": 64,
    },
    "spectformer_h_large": {
        "dims": (96, 192, 384, 512), "depths": (3, 6, 18, 3), "num_heads": (3, 6, 12, 16), "stem_dim": 64,
    },
}  # fmt: skip

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": cfg(first_conv="stem.0.0", classifier=("head.fc", "head.aux_fc")) for name in _VARIANTS}
)

register_variants(globals(), HierarchicalSpectFormer, _VARIANTS, checkpoint_filter_fn)
