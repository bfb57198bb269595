"""ViG: backbones of gated linear attention, scanned forwards and backwards, next to a local convolution.

Paper: ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.layers import DropPath, GluMlp, LayerNorm2d, RmsNorm, use_fused_attn
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import by_rules, renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.patches import ConvTokens
from vision_attn.backbones.position import PositionTable, read_table
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.linear.scan import gla_of_logits
from vision_attn.modules.softmax import check_heads

__all__ = ["ViG", "checkpoint_filter_fn"]


class GatedScan(nn.Module):
    """Bidirectional gated linear attention of a map `[batch, height, width, dim]`, gated against a 3 x 3 convolution.

    Args:
        dim: channels; keys have half of them.
        num_heads: divides `dim // 2`.
        conv_act: silu after the convolution.
        out_act: silu before the projection.
        rank: of the projection that makes the gates of the scan.
    """

    def __init__(self, dim: int, num_heads: int, conv_act: bool = False, out_act: bool = False, rank: int = 16):
        super().__init__()
        check_heads(dim // 2, num_heads)
        self.num_heads, self.key_dim = num_heads, dim // 2
        self.fused_attn = use_fused_attn()
        self.in_proj = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.SiLU() if conv_act else nn.Identity()
        )
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))
        self.g_proj = nn.Linear(dim, dim)
        self.g_norm = RmsNorm(dim // num_heads, eps=1e-6)
        self.l_norm = RmsNorm(dim // num_heads, eps=1e-6)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local = self.in_proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = self.qkv_proj(local).split([self.key_dim, self.key_dim, 2 * self.key_dim], -1)
        out = gla_of_logits(self.heads(q), self.heads(k), self.heads(v), self.gk_proj(local), self.fused_attn)
        gate = self.heads(self.g_proj(local).sigmoid())
        out = self.g_norm(out) * gate + self.l_norm(self.heads(local)) * (1 - gate)
        return self.o_proj(self.out_act(out.flatten(-2)))


class Block(nn.Module):
    """A gated scan, then a gated MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, mixer: nn.Module, norm: type[nn.Module], hidden: int, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = mixer
        self.norm2 = norm(dim)
        self.mlp = GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, bias=False, gate_last=False, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ToChannelsLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class ViG(Backbone):
    """A backbone of gated linear attention; image `[batch, in_chans, height, width]` to logits.

    Args:
        dims, depths, num_heads: channels, blocks and heads per stage.
        isotropic: 16 x 16 patches with a position table, and no downsampling; otherwise four stages from stride 4.
        conv_act, out_act: silu after the convolution and before the projection of each layer.
        img_size: pixels per side that the position table is made for; it is resampled for other images.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate: dropout before the classifier, and in MLPs.

    >>> ViG(dims=(16,) * 3, depths=(1, 1, 1), num_heads=(2, 2, 2))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"table"})

    def __init__(
        self,
        dims: Sequence[int] = (192,) * 4,
        depths: Sequence[int] = (3, 3, 3, 3),
        num_heads: Sequence[int] = (3,) * 4,
        isotropic: bool = True,
        conv_act: bool = False,
        out_act: bool = False,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        norm, multiple = (RmsNorm, 256) if isotropic else (nn.LayerNorm, 32)
        stages = []
        for i, dim in enumerate(dims):
            hidden = multiple * -(-int(dim * 8 / 3) // multiple)
            blocks = []
            for rate in rates[i]:
                mixer = GatedScan(dim, num_heads[i], conv_act, out_act)
                blocks.append(Block(dim, mixer, norm, hidden, proj_drop_rate, rate))
            down = nn.Identity() if isotropic or not i else ConvTokens(dims[i - 1], dim, 3, 2)
            stages.append(Stage(down, blocks))
        stride = 8 if isotropic else 2
        stem = [
            nn.Conv2d(in_chans, dims[0] // 2, stride + 1, stride=stride, padding=1),
            LayerNorm2d(dims[0] // 2, eps=1e-5),
            nn.SiLU() if isotropic else nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, stride=2, padding=1),
            LayerNorm2d(dims[0], eps=1e-5),
            ToChannelsLast(),
        ]
        if isotropic:
            stem.append(PositionTable(dims[0], (img_size // 16,) * 2))
        super().__init__(
            stem=nn.Sequential(*stem),
            stages=stages,
            widths=dims,
            reductions=[16 if isotropic else 4 * 2**i for i in range(len(dims))],
            norm=norm(dims[-1]),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, GatedScan):
                layers = [module.in_proj[0]]
                if isotropic:
                    layers += [module.qkv_proj, module.g_proj, module.o_proj, *module.gk_proj]
                for layer in layers:
                    nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)


_STEM = {"2": 1, "5": 3, "7": 4}
_RENAMED = (
    (r"^patch_embed\.(proj\.)?", "stem."),
    (r"^pos_embed$", "stem.6.table"),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"(blocks\.\d+)\.(ln_1|attn_norm|norm)\.", r"\1.norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.(op|self_attention)\.", ".attn."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^classifier\.", ""),
    (r"^head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layouts of ViG, isotropic or hierarchical, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    isotropic = len(model.stem) == 7
    place = [(i, j) for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]

    def rename(key: str) -> str:
        if key.startswith("blocks."):
            number, rest = re.match(r"blocks\.(\d+)\.(.*)", key).groups()
            i, j = place[int(number)] if int(number) < len(place) else (len(model.stages), int(number))
            key = f"stages.{i}.blocks.{j}.{rest}"
        if not isotropic:  # their sequence also holds what reorders axes
            key = re.sub(r"^patch_embed\.([257])\.", lambda m: f"stem.{_STEM[m[1]]}.", key)
        down = re.match(r"layers\.(\d)\.downsample\.([13])\.(.*)", key)
        if down:
            return f"stages.{int(down[1]) + 1}.downsample.{'proj' if down[2] == '1' else 'norm'}.{down[3]}"
        return by_rules(key, _RENAMED)

    weights = renamed(state_dict, model, rename, "ViG")
    return read_table(weights, "stem.6.table", model) if isotropic else weights


def _isotropic(dim: int, heads: int, **options) -> dict:
    return {"dims": (dim,) * 4, "depths": (3, 3, 3, 3), "num_heads": (heads,) * 4, **options}


def _stages(dim: int, heads: int, depth: int, rate: float) -> dict:
    return {
        "dims": tuple(dim * 2**i for i in range(4)),
        "depths": (2, 2, depth, 2),
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "isotropic": False,
        "drop_path_rate": rate,
    }


_VARIANTS = {
    "vig_tiny": _isotropic(192, 3, conv_act=True, out_act=True),
    "vig_small": _isotropic(384, 6, drop_path_rate=0.2),
    "vig_base": _isotropic(768, 12, drop_path_rate=0.5),
    "vig_h_tiny": _stages(96, 3, 5, 0.2),
    "vig_h_small": _stages(96, 3, 17, 0.3),
    "vig_h_base": _stages(128, 4, 17, 0.6),
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": cfg(pool_size=(14, 14) if options.get("isotropic", True) else (7, 7))
        for name, options in _VARIANTS.items()
    }
)

register_variants(globals(), ViG, _VARIANTS, checkpoint_filter_fn)
