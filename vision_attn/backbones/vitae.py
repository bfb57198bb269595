"""ViTAEv2 with varied-size windows: convolutions beside the attention of every cell.

Papers: ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias; VSA: Learning Varied-Size Window Attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_function, trunc_normal_
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed, unwrapped
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import Backbone, Stage, cfg
from vision_attn.modules.varied_window import VariedWindowAttention

__all__ = ["ViTAEv2", "checkpoint_filter_fn"]

DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))  # of the convolutions that start a stage


def beside(widths: Sequence[int], groups: int, strides: Sequence[int] = (1, 1, 1)) -> nn.Sequential:
    """The three 3 x 3 convolutions that run beside the attention; `widths` are the channels before, between, after."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups), nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-2])


class ReductionCell(nn.Module):
    """Makes a map smaller: dilated convolutions feed the attention, which has no shortcut but convolutions beside it.

    Takes `[batch, in_chans, height, width]`; sides that `reduction` does not divide are padded at the bottom and right.
    """

    def __init__(
        self, in_chans: int, embed: int, dim: int, reduction: int, dilations: Sequence[int], num_heads: int,
        groups: int, hidden: int, window: int,
    ):  # fmt: skip
        super().__init__()
        self.reduction = reduction
        kernel, wide = 7 if reduction == 4 else 3, embed * len(dilations)
        self.dilated = nn.ModuleList()
        for dilation in dilations:
            padding = math.ceil(((kernel - 1) * dilation + 1 - reduction) / 2)
            self.dilated.append(nn.Conv2d(in_chans, embed, kernel, reduction, padding, dilation))
        strides = (2, 2, 1) if reduction == 4 else (2, 1, 1)
        self.beside = beside((in_chans, hidden, hidden, dim), groups, strides)
        self.pos = nn.Conv2d(wide, wide, 7, padding=3, groups=wide)
        self.norm1 = nn.LayerNorm(wide)
        self.attn = VariedWindowAttention(wide, num_heads, window, out_dim=dim, dialect="classification")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = whole(x, self.reduction)
        y = torch.cat([F.gelu(conv(x)) for conv in self.dilated], 1)
        y = self.attn(self.norm1((y + self.pos(y)).permute(0, 2, 3, 1)))
        y = y + self.beside(x).permute(0, 2, 3, 1)
        return (y + self.mlp(self.norm2(y))).permute(0, 3, 1, 2)


@register_notrace_function
def whole(x: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(x, [0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple])


class NormalCell(nn.Module):
    """Attention and convolutions on the same map, added to it, then an MLP."""

    def __init__(self, dim: int, num_heads: int, groups: int, window: int, drop_path: float):
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = VariedWindowAttention(dim, num_heads, window, dialect="classification")
        self.beside = beside((dim, 4 * dim, dim, dim), groups)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attn(self.norm1((x + self.pos(x)).permute(0, 2, 3, 1)))
        x = (x + self.drop_path(self.beside(x))).permute(0, 2, 3, 1) + self.drop_path(y)
        return (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


class ViTAEv2(Backbone):
    """Four stages, each a reduction cell and normal cells; image `[batch, in_chans, height, width]` to logits.

    Args:
        embeds: channels of each dilated convolution, per stage.
        dims: channels of the tokens, per stage.
        depths: normal cells per stage.
        heads, reduction_heads: of normal and reduction cells, per stage.
        wide: the convolutions beside the attention of reduction cells have `2 * dim` channels, else those of `embeds`.
        window: tokens per side of a window.
        drop_path_rate: stochastic depth of the deepest cells, 0 to 1. As published, stage i takes the rates of the
            cells from `depths[i - 1]` on, so the deepest stage does not get the largest.

    >>> sizes = {"embeds": (4, 4, 8), "dims": (8, 16, 32), "depths": (1, 1, 1), "heads": (1, 2, 4)}
    >>> model = ViTAEv2(**sizes, reduction_heads=(1, 2, 4), groups=(1, 2, 4), reduction_groups=(1, 2, 4))
    >>> model(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    output_fmt = "NCHW"
    no_decay = frozenset({"relative_position_bias_table"})

    def __init__(
        self,
        embeds: Sequence[int] = (64, 64, 128, 256),
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        reduction_heads: Sequence[int] = (2, 4, 8, 16),
        groups: Sequence[int] = (1, 32, 64, 128),
        reduction_groups: Sequence[int] = (1, 16, 32, 64),
        wide: bool = True,
        window: int = 7,
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages, reductions, width = [], [], in_chans
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            reduction = 2 if i else 4
            hidden = 2 * dim if wide else embeds[i]
            sizes = (width, embeds[i], dim, reduction, DILATIONS[i], reduction_heads[i])
            down = ReductionCell(*sizes, reduction_groups[i], hidden, window)
            first = depths[i - 1] if i else 0
            cells = [NormalCell(dim, heads[i], groups[i], window, rate) for rate in rates[first : first + depth]]
            stages.append(Stage(down, cells))
            reductions.append(reduction * (reductions[-1] if i else 1))
            width = dim
        super().__init__(nn.Identity(), stages, dims, reductions, nn.Identity(), num_classes, global_pool, drop_rate)
        for module in self.modules():  # attention keeps the init of the 1 x 1 convolutions that it is in the original
            if isinstance(module, Mlp):
                trunc_normal_(module.fc1.weight, std=0.02)
                trunc_normal_(module.fc2.weight, std=0.02)
                nn.init.zeros_(module.fc1.bias)
                nn.init.zeros_(module.fc2.bias)
        if num_classes:
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of ViTAEv2 + VSA, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    state_dict = dict(unwrapped(state_dict))
    for key in [key for key in state_dict if ".sampling_offsets.2." in key]:
        parts = [state_dict.pop(key), state_dict.pop(key.replace("_offsets", "_scales"), None)]
        if parts[1] is not None:  # two numbers per head in each: one convolution with four
            pairs = [part.unflatten(0, (-1, 2)) for part in parts]
            state_dict[key.replace("sampling_offsets.2", "transform")] = torch.cat(pairs, 1).flatten(0, 1)

    def rename(key: str) -> str | None:
        if key.endswith("relative_position_index"):
            return None
        key = re.sub(r"^layers\.(\d)\.RC\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^layers\.(\d)\.NC\.", r"stages.\1.blocks.", key)
        key = re.sub(r"\.PRM\.convs\.(\d)\.0\.", r".dilated.\1.", key)
        return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key.replace(".PCM.", ".beside."))

    state_dict = renamed(state_dict, model, rename, "ViTAEv2 + VSA")
    linear = re.compile(r"\.attn\.(qkv|proj|transform)\.weight$")
    return {key: value.flatten(1) if linear.search(key) else value for key, value in state_dict.items()}


_48M = {"embeds": (96, 96, 192, 384), "dims": (96, 192, 384, 768), "depths": (2, 2, 11, 2), "drop_path_rate": 0.25}
_48M |= {"heads": (3, 6, 12, 24), "reduction_heads": (3, 6, 12, 24)}
_B = {"embeds": (128, 128, 256, 512), "dims": (128, 256, 512, 1024), "depths": (2, 2, 12, 2)}
_B |= {"heads": (4, 8, 16, 32), "reduction_heads": (4, 8, 16, 32)}
_VARIANTS = {
    "vitaev2_vsa_small": {"wide": False, "reduction_heads": (2, 2, 4, 8)},
    "vitaev2_vsa_widepcm_small": {},
    "vitaev2_vsa_widepcm_48m": _48M,
    "vitaev2_vsa_widepcm_base": _B,
}

_FIRST = (*(f"stages.0.downsample.dilated.{i}" for i in range(4)), "stages.0.downsample.beside.0")
default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv=_FIRST) for name in _VARIANTS})
register_variants(globals(), ViTAEv2, _VARIANTS, checkpoint_filter_fn)
