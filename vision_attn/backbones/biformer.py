"""BiFormer: pyramids of bi-level routing attention, with full attention in the last stage."""

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
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear
from vision_attn.modules.routing import BiLevelRoutingAttention

__all__ = ["BiFormer", "checkpoint_filter_fn"]


class FullAttention(nn.Module):
    """Attention of all tokens of a map, plus a 5 x 5 depthwise convolution of its input, or of the values."""

    def __init__(self, dim: int, num_heads: int = 8, local_values: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by the {num_heads} heads of full attention")
        self.num_heads = num_heads
        self.local_values = local_values
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        source = qkv.chunk(3, -1)[2] if self.local_values else x
        local = self.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(x.shape) + local)


class Block(nn.Module):
    """Position convolution (3 x 3 depthwise, if `position`), attention and MLP on a map `[batch, channels, ...]`."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, position: bool):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if position else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(Backbone):
    """Four stages at 1/4 to 1/32 of the image, each with its own number of regions seen per region.

    Args:
        depths, dims: blocks and channels per stage.
        topk: regions seen by each region, per stage; 0 is full attention with 8 heads.
        head_dim: channels per head of routed attention.
        regions: per side of every map, at any image size; see also `set_regions`.
        swin_layout: 4 x 4 patches, norm before downsampling, and no position convolution in the blocks.
        form: of `BiLevelRoutingAttention`; "nchw" also takes the convolution of full attention from the values.

    From BiFormer: Vision Transformer with Bi-Level Routing Attention.

    >>> BiFormer(depths=(1, 1, 1), dims=(32, 64, 64), topk=(1, 4, 0))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        topk: Sequence[int] = (1, 4, 16, 0),
        head_dim: int = 32,
        regions: int = 7,
        mlp_ratio: float = 3.0,
        swin_layout: bool = False,
        form: str = "legacy",
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        if swin_layout:
            stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), nn.BatchNorm2d(dims[0]))
        else:
            half = dims[0] // 2
            stem = nn.Sequential(*_halve(in_chans, half), nn.GELU(), *_halve(half, dims[0]))
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (depth, dim, k) in enumerate(zip(depths, dims, topk, strict=True)):
            down = nn.Identity()
            if i:
                merge = (nn.BatchNorm2d(dims[i - 1]), nn.Conv2d(dims[i - 1], dim, 2, 2))
                down = nn.Sequential(*(merge if swin_layout else _halve(dims[i - 1], dim)))
            blocks = []
            for j in range(depth):
                if k:
                    attn = BiLevelRoutingAttention(dim, dim // head_dim, regions, k, form=form)
                else:
                    attn = FullAttention(dim, local_values=form == "nchw")
                blocks.append(Block(dim, attn, mlp_ratio, rates[i][j], position=not swin_layout))
            stages.append(Stage(down, blocks))
        reductions = [4 * 2**i for i in range(len(dims))]
        norm = nn.BatchNorm2d(dims[-1])
        super().__init__(stem, stages, dims, reductions, norm, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @torch.jit.ignore
    def set_regions(self, regions: int) -> None:
        """Cut the maps into another number of regions per side; for large images, or crops of another size."""
        if regions < 1:
            raise ValueError(f"regions must be at least 1, got {regions}")
        for module in self.modules():
            if isinstance(module, BiLevelRoutingAttention):
                module.regions = regions


def _halve(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs)


_RENAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layouts of BiFormer (T/S/B, STL, and STL from 1 x 1 convolutions), under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    state_dict = renamed(state_dict, model, lambda key: by_rules(key, _RENAMES), "BiFormer")
    linear = re.compile(r"\.(qkv|proj|fc1|fc2)\.weight$")
    return {
        key: value.flatten(1) if key.startswith("stages.") and linear.search(key) else value
        for key, value in state_dict.items()
    }


_SMALL = {"depths": (4, 4, 18, 4)}
_STL = {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratio": 4.0, "swin_layout": True}
_VARIANTS = {
    "biformer_tiny": {},
    "biformer_small": {**_SMALL, "drop_path_rate": 0.15},
    "biformer_base": {**_SMALL, "dims": (96, 192, 384, 768)},
    "biformer_stl": _STL,
    "biformer_stl_nchw": {**_STL, "form": "nchw"},
}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg() for name in _VARIANTS})
register_variants(globals(), BiFormer, _VARIANTS, checkpoint_filter_fn)
