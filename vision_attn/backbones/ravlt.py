"""RAVLT and MALA: pyramids with linear attention in the two large stages and softmax attention in the two small ones.

Papers: Breaking the Low-Rank Dilemma of Linear Attention; Rectifying Magnitude Neglect in Linear Attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerScale
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import by_rules, renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear_and_conv
from vision_attn.modules.linear import LinearAttention2d
from vision_attn.modules.linear.cores import Softmax
from vision_attn.modules.linear.layer import AttentionFrame, MapConv

__all__ = ["RAVLT", "checkpoint_filter_fn"]


class Stem(nn.Module):
    """Image `[batch, in_chans, height, width]` to a map of a quarter of the size (rounded up), by four convolutions."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        half = dim // 2
        layers = []
        for inputs, stride in ((in_chans, 2), (half, 1), (half, 1)):
            layers += [nn.Conv2d(inputs, half, 3, stride, 1), nn.BatchNorm2d(half), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(half, dim, 3, 2, 1), nn.BatchNorm2d(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    """Two linear layers with a 3 x 3 depthwise convolution added in between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = MapConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Position convolution, attention, MLP, each added to its input; a second position convolution if `twice`."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float, drop_path: float, twice: bool):
        super().__init__()
        self.pos = MapConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale)
        self.pos2 = MapConv(dim, 3) if twice else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        if self.pos2 is not None:
            x = x + self.pos2(x)
        return x + self.drop_path(self.ls2(self.ffn(self.norm2(x))))


class Projection(nn.Module):
    """What follows the last stage: a linear layer to the width of the classifier, batch norm and silu."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class RAVLT(Backbone):
    """A pyramid of linear and softmax attention; image `[batch, in_chans, height, width]` to logits.

    Args:
        kind: of `LinearAttention2d`: "rala" (RAVLT), "mala" (MALA), "nala" (NaLaFormer).
        dims, depths, num_heads, mlp_ratio: per stage, and of all.
        layer_scale: initial scale of each branch, per stage.
        projection: channels of the last map, after the stages.
        softmax_from: the first stage with softmax attention, 0 to 4.
        out_gate: of the attention; see `LinearAttention2d`.
        twice: a second position convolution per block.
        drop_path_rate: stochastic depth of the last block, 0 to 1.

    >>> RAVLT(dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"gamma"})

    def __init__(
        self,
        kind: str = "rala",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 3.5,
        layer_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        softmax_from: int = 2,
        out_gate: bool | str = True,
        twice: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = []
            for j in range(depth):
                if i < softmax_from:
                    attn = LinearAttention2d(dim, heads, kind, rope="axial", lepe=5, out_gate=out_gate)
                else:
                    attn = AttentionFrame(dim, heads, Softmax(dim // heads), lepe=5, out_gate=out_gate)
                blocks.append(Block(dim, attn, mlp_ratio, layer_scale[i], rates[i][j], twice))
            stages.append(Stage(Downsample(dims[i - 1], dim) if i else nn.Identity(), blocks))
        super().__init__(
            stem=Stem(in_chans, dims[0]),
            stages=stages,
            widths=dims,
            reductions=[4 * 2**i for i in range(len(dims))],
            norm=Projection(dims[-1], projection),
            num_classes=num_classes,
            head=ClassifierHead(
                projection, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
            ),
        )
        self.num_features = projection
        self.apply(init_linear_and_conv)


_RENAMES = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d)\.", r"stages.\1."),
    (r"^(proj|norm)\.", r"norm.\1."),
    (r"^head\.", "head.fc."),
    (r"\.(norm[12])\.norm\.", r".\1."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.qkv[og]\.", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.ln\.", ".attn.norm."),
    (r"\.cpe1\.", ".pos."),
    (r"\.cpe2\.", ".pos2."),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of RAVLT, MALA or NaLaFormer, under our names.

    1 x 1 convolutions become linear layers; the angles of the rotary positions follow from the size and are left out.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """

    def rename(key: str) -> str | None:
        if key.endswith("RoPE.angle"):
            return None
        return by_rules(key, _RENAMES)

    own = model.state_dict()
    weights = renamed(state_dict, model, rename, "RAVLT, MALA or NaLaFormer")
    return {key: _without_unit_axes(value, own[key]) for key, value in weights.items()}


def _without_unit_axes(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    same = [n for n in value.shape if n != 1] == [n for n in like.shape if n != 1]
    return value.reshape(like.shape) if same else value


SIZES = {
    "tiny": {"drop_path_rate": 0.1},
    "small": {
        "dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8), "drop_path_rate": 0.15,
    },
    "base": {
        "dims": (96, 192, 384, 512), "depths": (4, 6, 12, 6), "num_heads": (1, 2, 6, 8), "drop_path_rate": 0.4,
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
    },
    "large": {
        "dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (1, 2, 7, 10), "drop_path_rate": 0.55,
        "layer_scale": (1e-6,) * 4,
    },
}  # fmt: skip

_VARIANTS = {}
for _size, _options in SIZES.items():
    _VARIANTS[f"ravlt_{_size}"] = {"kind": "rala", "projection": 1024, **_options}
    _VARIANTS[f"mala_{_size}"] = {"kind": "mala", "projection": 2560 if _size == "large" else 2048, **_options}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.proj.0") for name in _VARIANTS})

register_variants(globals(), RAVLT, _VARIANTS, checkpoint_filter_fn)
