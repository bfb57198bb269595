"""MedViTV2: neighborhood attention for detail, pooled attention for the whole, and KAN layers in place of MLPs.

Paper: MedViTV2: Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    make_divisible,
    register_notrace_function,
    register_notrace_module,
    use_fused_attn,
)
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear_and_conv
from vision_attn.modules.neighborhood import NeighborhoodAttention

__all__ = ["MedViT", "checkpoint_filter_fn"]


class KAN(nn.Module):
    """A layer of a Kolmogorov-Arnold network: each input feature becomes `bumps` features, then a linear map.

    Input `[..., inputs]`, output `[..., outputs]`; the bumps `1 - tanh((x - g) / width)^2` have their centres g evenly
    in [-2, 2] and act on the normed input. The centres are stored, but not trained: their gradient is zero.
    """

    def __init__(self, inputs: int, outputs: int, bumps: int = 8, width: float = 0.33):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(inputs)
        self.grid = nn.Parameter(torch.linspace(-2, 2, bumps))
        self.linear = nn.Linear(bumps * inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.grid.detach() + 0 * self.grid
        x = torch.tanh((self.norm(x).unsqueeze(-1) - grid) / self.width)
        return self.linear((1 - x * x).flatten(-2))


class PatchEmbed(nn.Module):
    """Halve the map for a stride of 2, and change its channels where they differ."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        same = stride == 1 and inputs == outputs
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.conv = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.Identity() if same else nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.pool(x)))


class GatedConv(nn.Module):
    """The input plus an inverted bottleneck with a depthwise convolution and squeeze-and-excitation."""

    def __init__(self, dim: int, kernel: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.Hardswish()
        self.fc1 = nn.Linear(hidden, hidden // dim)
        self.fc2 = nn.Linear(hidden // dim, hidden)
        self.reduce = nn.Conv2d(hidden, dim, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.expand(x)))
        y = self.act(self.norm2(self.conv(y)))
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3))))))
        return x + self.norm3(self.reduce(y * gate[:, :, None, None]))


@register_notrace_module
class Unused(nn.Module):
    """Weights that the released model has but does not use: stored, counted, and with a gradient of zero."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.training:  # distributed training waits for every gradient
            x = x + 0 * sum(p.sum() for p in self.layer.parameters()).to(x.dtype)
        return x


class LocalBlock(nn.Module):
    """Local feature perception: neighborhood attention, then a gated convolution."""

    def __init__(
        self,
        inputs: int,
        dim: int,
        stride: int,
        kernel: int,
        head_dim: int,
        ratio: float,
        legacy_reshape: bool,
        attn_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.legacy_reshape = legacy_reshape
        self.patch_embed = PatchEmbed(inputs, dim, stride)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = NeighborhoodAttention(dim, dim // head_dim, window=7, attn_drop=attn_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.conv = GatedConv(dim, kernel, ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        batch, dim, height, width = x.shape
        y = self.norm1(x)
        if self.legacy_reshape:
            y = self.attn(y.reshape(batch, height, width, dim)).reshape(batch, dim, height, width)
        else:
            y = self.attn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path(y)
        return x + self.conv(self.norm2(x))


class PooledAttention(nn.Module):
    """All tokens `[batch, tokens, dim]` attend to means of `reduction` consecutive tokens, row by row."""

    def __init__(self, dim: int, num_heads: int, reduction: int, attn_drop: float, proj_drop: float):
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.fused_attn = use_fused_attn()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm = nn.BatchNorm1d(dim) if reduction > 1 else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.norm(pool_tokens(x.transpose(1, 2), self.reduction)).transpose(1, 2)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(pooled), self.v(pooled))
        )
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            y = self.attn_drop((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


@register_notrace_function
def pool_tokens(x: torch.Tensor, size: int) -> torch.Tensor:
    """Means of `size` consecutive tokens of `[batch, dim, tokens]`; what is left over at the end is dropped."""
    return F.avg_pool1d(x, min(size, x.shape[2])) if size > 1 else x


class GlobalBlock(nn.Module):
    """Global feature perception: pooled attention and a group convolution of it side by side, then a KAN."""

    def __init__(
        self,
        inputs: int,
        dim: int,
        stride: int,
        reduction: int,
        head_dim: int,
        ratio: float,
        mix: float,
        legacy_reshape: bool,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.legacy_reshape = legacy_reshape
        attended = make_divisible(int(dim * mix), 32)
        convolved = dim - attended
        if not convolved:
            raise ValueError(f"a global block of {dim} channels has none left for its convolution; use 128 or more")
        self.patch_embed = PatchEmbed(inputs, attended, stride)
        self.norm1 = nn.BatchNorm2d(attended)
        self.attn = PooledAttention(attended, attended // head_dim, reduction, attn_drop, proj_drop)
        self.drop_path1 = DropPath(drop_path * mix) if drop_path else nn.Identity()
        self.project = PatchEmbed(attended, convolved, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(convolved, convolved, 3, padding=1, groups=convolved // head_dim, bias=False),
            nn.BatchNorm2d(convolved),
            nn.ReLU(),
            nn.Conv2d(convolved, convolved, 1, bias=False),
        )
        self.drop_path2 = DropPath(drop_path * (1 - mix)) if drop_path else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.unused = Unused(GatedConv(dim, 3, ratio))
        self.kan = nn.Sequential(KAN(dim, int(dim * ratio)), KAN(int(dim * ratio), dim))
        self.drop_path3 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        y = self.drop_path1(self.attn(self.norm1(x).flatten(2).transpose(1, 2)))
        x = x + y.transpose(1, 2).reshape(x.shape)
        y = self.project(x)
        x = torch.cat([x, y + self.drop_path2(self.conv(y))], 1)
        y = self.unused(self.norm2(x))
        if self.legacy_reshape:
            y = self.kan(y.reshape(-1, y.shape[1])).reshape(y.shape)
        else:
            y = self.kan(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.drop_path3(y)


class MedViT(Backbone):
    """A hybrid of convolutions, neighborhood attention and pooled attention; image to logits.

    Stages of local blocks end in global blocks: none in the first, one in the second, every third in the third, all in
    the last.

    Args:
        depths: blocks per stage; the third must be a multiple of 3.
        dims: channels per stage, multiples of `head_dim`.
        reductions: consecutive tokens along an axis that are averaged into one key in global blocks, per stage.
        legacy_reshape: read maps `[batch, dim, height, width]` as `[batch, height, width, dim]` without moving their
            axes, before neighborhood attention and before the KAN. The released code does, so its weights need it.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, after projections, of the weights.

    Raises:
        ValueError: depths or dims that do not fit.

    >>> MedViT(depths=(1, 2, 3, 1), dims=(32, 128, 128, 128), num_classes=9)(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 9])
    """

    output_fmt = "NCHW"
    no_decay = frozenset({"rpb", "grid"})

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        reductions: Sequence[int] = (8, 4, 2, 1),
        head_dim: int = 32,
        mix: float = 0.75,
        legacy_reshape: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        if depths[2] % 3:
            raise ValueError(f"depths={tuple(depths)}: the third must be a multiple of 3")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"dims={tuple(dims)} must be multiples of head_dim, which is {head_dim}")
        is_global = [[False] * depths[0], [False] * (depths[1] - 1) + [True], [False, False, True] * (depths[2] // 3)]
        is_global.append([True] * depths[3])
        rates = drop_path_rates(drop_path_rate, depths)
        stem, inputs = [], in_chans
        for dim, stride in ((64, 2), (32, 1), (64, 1), (64, 2)):
            conv = nn.Conv2d(inputs, dim, 3, stride=stride, padding=1, bias=False)
            stem.append(nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU()))
            inputs = dim
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for j, rate in enumerate(rates[i]):
                stride = 2 if i and not j else 1
                common = {"head_dim": head_dim, "legacy_reshape": legacy_reshape, "attn_drop": attn_drop_rate}
                if is_global[i][j]:
                    options = {"reduction": reductions[i] ** 2, "ratio": 2.0, "mix": mix, "proj_drop": proj_drop_rate}
                    block = GlobalBlock(inputs, dim, stride, **options, **common, drop_path=rate)
                else:
                    options = {"kernel": 3 if i else 7, "ratio": 3.0}
                    block = LocalBlock(inputs, dim, stride, **options, **common, drop_path=rate)
                blocks.append(block)
                inputs = dim
            stages.append(Stage(nn.Identity(), blocks))
        norm = nn.BatchNorm2d(dims[-1])
        super().__init__(nn.Sequential(*stem), stages, dims, (4, 8, 16, 32), norm, num_classes, global_pool, drop_rate)
        self.apply(init_linear_and_conv)


_BLOCK = (
    (r"^conv\.conv\.0\.", "conv.expand."),
    (r"^conv\.conv\.1\.", "conv.norm1."),
    (r"^conv\.conv\.3\.", "conv.conv."),
    (r"^conv\.conv\.4\.", "conv.norm2."),
    (r"^conv\.conv\.6\.fc\.0\.", "conv.fc1."),
    (r"^conv\.conv\.6\.fc\.2\.", "conv.fc2."),
    (r"^conv\.conv\.7\.", "conv.reduce."),
    (r"^conv\.conv\.8\.", "conv.norm3."),
)
_GLOBAL_BLOCK = (
    *((old, "unused.layer" + new.removeprefix("conv")) for old, new in _BLOCK),
    (r"^e_mhsa\.", "attn."),
    (r"^projection\.", "project."),
    (r"^mhca\.group_conv3x3\.", "conv.0."),
    (r"^mhca\.norm\.", "conv.1."),
    (r"^mhca\.projection\.", "conv.3."),
    (r"^kan\.layers\.(\d)\.layernorm\.", r"kan.\1.norm."),
    (r"^kan\.layers\.(\d)\.rbf\.grid$", r"kan.\1.grid"),
    (r"^kan\.layers\.(\d)\.spline_linear\.", r"kan.\1.linear."),
)


def checkpoint_filter_fn(state_dict: dict, model: MedViT) -> dict:
    """Weights in the published layout, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    blocks = [(f"stages.{i}.blocks.{j}.", b) for i, s in enumerate(model.stages) for j, b in enumerate(s.blocks)]

    def rename(key: str) -> str:
        place = re.match(r"features\.(\d+)\.(.+)", key)
        if place and int(place[1]) < len(blocks):
            (prefix, block), name = blocks[int(place[1])], place[2]
            rules = _GLOBAL_BLOCK if isinstance(block, GlobalBlock) else _BLOCK
            return prefix + next((re.sub(old, new, name) for old, new in rules if re.match(old, name)), name)
        key = re.sub(r"^stem\.(\d)\.conv\.", r"stem.\1.0.", key)
        key = re.sub(r"^stem\.(\d)\.norm\.", r"stem.\1.1.", key)
        return re.sub(r"^proj_head\.0\.", "head.fc.", key)

    return renamed(state_dict, model, rename, "MedViTV2")


_VARIANTS = {
    "medvit_tiny": {"depths": (2, 2, 6, 1), "dims": (64, 128, 192, 384)},
    "medvit_small": {},
    "medvit_base": {"dims": (96, 192, 384, 768), "drop_path_rate": 0.2},
    "medvit_large": {"dims": (96, 256, 512, 1024), "drop_path_rate": 0.2},
}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.0.0") for name in _VARIANTS})
register_variants(globals(), MedViT, _VARIANTS, checkpoint_filter_fn)
