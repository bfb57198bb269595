"""CARE: mobile backbones whose channels go apart into linear attention, convolutions and a memory.

Paper: CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed, unwrapped
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates, init_linear_and_conv
from vision_attn.modules.linear.formulas import care

__all__ = ["CARE", "checkpoint_filter_fn"]


def depthwise(dim: int, kernel: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=dim)


class Decoupled(nn.Module):
    """Three equal parts of a map `[batch, 3 * dim, height, width]`: long range, 3 x 3 and 7 x 7 convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv1 = depthwise(dim, (3, 3))
        self.dwconv2 = depthwise(dim, (7, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        far, near, wide = x.chunk(3, 1)
        return torch.cat([self.long_range(far), self.dwconv1(near), self.dwconv2(wide)], 1)


class ConvMixer(Decoupled):
    """Long range by a column of 11 tokens plus a row of 11."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.dwconvatt_1 = depthwise(dim, (11, 1))
        self.dwconvatt_2 = depthwise(dim, (1, 11))

    def long_range(self, x: torch.Tensor) -> torch.Tensor:
        return self.dwconvatt_1(x) + self.dwconvatt_2(x)


class AttentionMixer(Decoupled):
    """Long range by linear attention with heads of `head_dim`, whose values are the input itself."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__(dim)
        if dim % head_dim:
            raise ValueError(f"head_dim {head_dim} does not divide the {dim} channels of attention")
        self.head_dim = head_dim
        self.qk = nn.Conv2d(dim, 2 * dim, 1)

    def long_range(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qk(x).permute(0, 2, 3, 1).unflatten(-1, (2, -1, self.head_dim)).unbind(3)
        v = x.permute(0, 2, 3, 1).unflatten(-1, (-1, self.head_dim))
        return care(q, k, v).flatten(-2).permute(0, 3, 1, 2)


class Interaction(nn.Module):
    """Convolutional MLPs: one among the mixed channels, then one among them and the memory.

    Args:
        memory: channels of the memory, a third of the mixed ones.
        ratios: hidden over input channels of the two.
        last: leave out the closing projection of the second, and its residual: `4 * memory * ratios[1]` channels.
    """

    def __init__(self, memory: int, ratios: tuple[int, int], last: bool, drop: float):
        super().__init__()
        self.last = last
        for i, (dim, ratio) in enumerate(((3 * memory, ratios[0]), (4 * memory, ratios[1])), 1):
            self.add_module(f"inter{i}_norm", nn.BatchNorm2d(dim))
            self.add_module(f"inter{i}_fc1", nn.Conv2d(dim, ratio * dim, 1))
            self.add_module(f"inter{i}_conv", depthwise(ratio * dim, (3, 3)))
            close = i == 1 or not last
            self.add_module(f"inter{i}_fc2", nn.Conv2d(ratio * dim, dim, 1) if close else nn.Identity())
        self.drop = nn.Dropout(drop)

    def forward(self, memory: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = self.inter1_conv(F.gelu(self.inter1_fc1(self.inter1_norm(x))))
        x = torch.cat([memory, x + self.inter1_fc2(self.drop(h))], 1)
        h = self.drop(self.inter2_conv(F.gelu(self.inter2_fc1(self.inter2_norm(x)))))
        return h if self.last else x + self.inter2_fc2(h)


class Block(nn.Module):
    """Mixes all channels but the memory, which is the first quarter, then lets both interact; added to its input."""

    def __init__(
        self,
        memory: int,
        head_dim: int | None,
        ratios: tuple[int, int],
        layer_scale: float,
        last: bool,
        drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.memory, self.last = memory, last
        self.token_mixer = AttentionMixer(memory, head_dim) if head_dim else ConvMixer(memory)
        self.inter_layer = Interaction(memory, ratios, last, drop)
        self.gamma = None if last else nn.Parameter(torch.full((4 * memory,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, mixed = x[:, : self.memory], x[:, self.memory :]
        out = self.inter_layer(memory, self.token_mixer(mixed))
        if self.gamma is None:
            return self.drop_path(out)
        return x + self.drop_path(out * self.gamma.view(-1, 1, 1))


class Head(nn.Module):
    """Mean over the map, GELU, norm, classifier."""

    def __init__(self, num_features: int, num_classes: int, pool_type: str, drop_rate: float):
        super().__init__()
        self.num_features = num_features
        self.norm = nn.LayerNorm(num_features, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.pooled = bool(self.global_pool.pool_type)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if not self.pooled:
            return x
        x = self.drop(self.norm(F.gelu(x)))
        return x if pre_logits else self.fc(x)


class CARE(Backbone):
    """A mobile backbone; image `[batch, in_chans, height, width]` to logits, the mean of two classifiers.

    Args:
        memories: channels of the memory per stage; a stage has four times as many, of which attention takes a quarter.
        depths: blocks per stage.
        ratios: per stage, hidden over input channels of the two MLPs of a block.
        head_dims: per stage, channels per head of linear attention, None for convolutions instead.
        layer_scale: initial value of the scale of each block.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, proj_drop_rate: dropout before the classifiers, and in MLPs.

    >>> CARE(memories=(4, 8, 16, 32), depths=(1, 1, 1, 1))(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])

    The second classifier, `dist_head`, learns from a teacher; after `set_distilled_training(True)` a model in training
    returns the logits of both.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        memories: Sequence[int] = (8, 16, 32, 64),
        depths: Sequence[int] = (2, 4, 8, 4),
        ratios: Sequence[tuple[int, int]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
        head_dims: Sequence[int | None] = (None, None, 16, 32),
        layer_scale: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        widths = [4 * memory for memory in memories]
        stages = []
        for i, memory in enumerate(memories):
            blocks = []
            for j in range(depths[i]):
                last = i == len(memories) - 1 and j == depths[i] - 1
                blocks.append(Block(memory, head_dims[i], ratios[i], layer_scale, last, proj_drop_rate, rates[i][j]))
            down = nn.Identity()
            if i:
                down = nn.Sequential(nn.BatchNorm2d(widths[i - 1]), nn.Conv2d(widths[i - 1], widths[i], 2, stride=2))
            stages.append(Stage(down, blocks))
        features = widths[-1] * ratios[-1][1]
        super().__init__(
            stem=nn.Sequential(nn.Conv2d(in_chans, widths[0], 4, stride=4), nn.BatchNorm2d(widths[0])),
            stages=stages,
            widths=[*widths[:-1], features],
            reductions=[4 * 2**i for i in range(len(memories))],
            norm=nn.Identity(),
            num_classes=num_classes,
            head=Head(features, num_classes, global_pool, drop_rate),
        )
        self.dist_head = Head(features, num_classes, global_pool, drop_rate)
        self.distilled_training = False
        self.apply(init_linear_and_conv)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the logits of both classifiers instead of their mean."""
        self.distilled_training = enable

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.dist_head.reset(num_classes, global_pool)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        out, distilled = self.head(x, pre_logits), self.dist_head(x, pre_logits)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return out, distilled
        return (out + distilled) / 2


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of CARE, which is ours; checked, and without classifiers `model` does not have.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    state_dict = unwrapped(state_dict)
    if not model.num_classes:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("dist_head.fc.")}
    return renamed(state_dict, model, lambda key: key, "CARE")


_S0 = {"memories": (8, 16, 32, 64), "depths": (2, 4, 8, 4), "ratios": ((2, 2), (2, 4), (4, 4), (4, 4))}
_S1 = {"memories": (8, 16, 32, 64), "depths": (3, 6, 10, 6), "ratios": ((2, 4), (2, 4), (4, 4), (4, 4))}
_S2 = {"memories": (8, 16, 48, 96), "depths": (3, 6, 10, 6), "ratios": ((4, 4),) * 4}
_VARIANTS = {"care_s0": _S0, "care_s1": _S1, "care_s2": _S2}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": cfg(classifier=("head.fc", "dist_head.fc")) for name in _VARIANTS}
)

register_variants(globals(), CARE, _VARIANTS, checkpoint_filter_fn)
