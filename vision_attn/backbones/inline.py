"""InLine: Swin and DeiT with linear attention whose map from queries to weights is injective.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from timm.layers import register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_attn.backbones.checkpoints import renamed, unwrapped
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.nat import Block, MergeDownsample, Patches
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.linear import LinearAttention2d
from vision_attn.modules.linear.cores import local_taps, tap_predictor
from vision_attn.modules.linear.formulas import inline
from vision_attn.modules.softmax import check_heads
from vision_attn.modules.window import WindowAttention2d

__all__ = ["InLineDeiT", "LinearSwin", "checkpoint_filter_fn", "deit_checkpoint_filter_fn"]


class LinearSwin(Backbone):
    """Swin with linear attention over the whole map in its first blocks; image `[batch, in_chans, height, width]` to
    logits.

    Args:
        kind: of `LinearAttention2d`: "inline", or "slab" with a table for the map of each stage at 224 pixels.
        linear: how many blocks of each stage are linear; those after them have windows, shifted in every second block.
        depths: blocks per stage.
        dim: channels of the first stage, doubled at each downsampling.
        num_heads: per stage.
        window: tokens per side of a window.
        drop_path_rate: stochastic depth of the last block, 0 to 1.

    >>> model = LinearSwin(linear=(1, 1, 0, 0), depths=(1, 1, 1, 1), dim=16, num_heads=(1, 2, 4, 8))
    >>> model(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"relative_position_bias_table", "position"})

    def __init__(
        self,
        kind: str = "inline",
        linear: Sequence[int] = (2, 2, 6, 0),
        depths: Sequence[int] = (2, 2, 6, 2),
        dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        widths, rates = [dim * 2**i for i in range(len(depths))], drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            options = {"size": 56 // 2**i} if kind == "slab" else {}
            blocks = []
            for j, rate in enumerate(rates[i]):
                if j < linear[i]:
                    attn = LinearAttention2d(width, heads, kind, **options)
                else:
                    attn = WindowAttention2d(width, heads, window, shift=window // 2 if j % 2 else 0)
                blocks.append(Block(width, attn, mlp_ratio, None, rate))
            stages.append(Stage(MergeDownsample(width // 2) if i else nn.Identity(), blocks))
        super().__init__(
            stem=Patches(in_chans, dim, 4),
            stages=stages,
            widths=widths,
            reductions=[4 * 2**i for i in range(len(depths))],
            norm=nn.LayerNorm(widths[-1]),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)


def rename_swin(key: str) -> str | None:
    """Published names of Swin and its relatives to ours; None for buffers."""
    if key.endswith(("relative_position_index", "attn_mask")):
        return None
    key = re.sub(r"^patch_embed\.", "stem.", key)
    key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
    key = re.sub(r"^layers\.(\d+)\.", r"stages.\1.", key)
    return re.sub(r"^head\.", "head.fc.", key)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of InLine-Swin, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """

    def rename(key: str) -> str | None:
        key = rename_swin(key)
        return key and key.replace(".attn.residual.", ".attn.core.taps.")

    return renamed(state_dict, model, rename, "InLine-Swin")


@register_notrace_module
class TokenInLine(nn.Module):
    """`inline` over tokens `[batch, 1 + side * side, dim]`, a class token and a square map.

    The class token takes part in the attention and in the mean that predicts the convolution, not in the convolution.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, proj_drop: float = 0.0):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.taps = tap_predictor(dim, num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        batch, tokens, dim = x.shape
        side = int((tokens - 1) ** 0.5 + 0.5)
        if side * side != tokens - 1 or attn_mask is not None or is_causal:
            raise ValueError(
                f"InLine-DeiT attends to all of a class token and a square map, without a mask; got {tokens} tokens"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, dim // self.num_heads)).unbind(2)
        out = inline(q, k, v).flatten(2)
        taps = self.taps(x.mean(1).unsqueeze(-1))
        local = local_taps(v[:, 1:].reshape(batch, side, side, dim), taps).flatten(1, 2)
        out = torch.cat([out[:, :1], out[:, 1:] + local], 1)
        return self.proj_drop(self.proj(out))


class InLineBlock(TimmBlock):
    """timm's block with `TokenInLine`."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, proj_drop: float = 0.0, **options):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, **options)
        self.attn = TokenInLine(dim, num_heads, qkv_bias, proj_drop)


class InLineDeiT(VisionTransformer):
    """timm's vision transformer with InLine attention, for square images of `img_size`.

    >>> InLineDeiT(img_size=64, embed_dim=32, depth=2, num_heads=2)(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """

    output_fmt = "NLC"

    def __init__(self, **options):
        super().__init__(block_fn=InLineBlock, **options)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


def deit_checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of InLine-DeiT, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    weights = {key.replace(".attn.residual.", ".attn.taps."): value for key, value in unwrapped(state_dict).items()}
    return renamed(weights, model, str, "InLine-DeiT")


def _create_deit(cls: type[nn.Module], name: str, pretrained: bool, filter_fn: Callable, **options) -> nn.Module:
    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(cls, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=features, **options)


_SIZES = {
    "tiny": {"drop_path_rate": 0.2, "linear": (2, 2, 6, 0)},
    "small": {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3, "linear": (2, 2, 0, 0)},
    "base": {
        "depths": (2, 2, 18, 2), "dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5, "linear": (2, 2, 2, 0),
    },
}  # fmt: skip
_VARIANTS = {f"inline_swin_{size}": options for size, options in _SIZES.items()}
_DEIT = {
    "inline_deit_tiny": {"embed_dim": 192, "num_heads": 6, "drop_path_rate": 0.1},
    "inline_deit_small": {"embed_dim": 320, "num_heads": 10, "drop_path_rate": 0.1},
    "inline_deit_base": {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1},
}
_PIXELS = {"inline_deit_tiny": 224, "inline_deit_small": 288, "inline_deit_base": 448}

default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.untrained": cfg(first_conv="stem.proj") for name in _VARIANTS},
        **{
            f"{name}.untrained": cfg(
                input_size=(3, pixels, pixels),
                fixed_input_size=True,
                pool_size=None,
                first_conv="patch_embed.proj",
                classifier="head",
            )
            for name, pixels in _PIXELS.items()
        },
    }
)
register_variants(globals(), LinearSwin, _VARIANTS, checkpoint_filter_fn)
register_variants(globals(), InLineDeiT, _DEIT, deit_checkpoint_filter_fn, build=_create_deit)
