"""OverLoCK: an overview of the image steers context-mixing dynamic convolutions.

Paper: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    SEModule,
    register_notrace_function,
    trunc_normal_,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import nn

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.overlock_weights import checkpoint_filter_fn
from vision_attn.backbones.skeleton import Backbone, Stage, cfg, drop_path_rates
from vision_attn.modules.contmix import ContMix
from vision_attn.modules.large_kernel import LargeKernel

__all__ = ["OverLoCK", "checkpoint_filter_fn"]


class Scale(nn.Conv2d):
    """A learned factor and shift of each channel."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 1, groups=dim)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class ResConv(nn.Conv2d):
    """The input plus a depthwise 3 x 3 convolution of it."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._conv_forward(x, self.weight, self.bias)


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.conv = ResConv(hidden)
        self.grn = GlobalResponseNorm(hidden, channels_last=False)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.grn(self.conv(self.act(self.fc1(x)))))


def _squeeze_excite(dim: int) -> nn.Module:
    return SEModule(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU)


def _normed_conv(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class RepConvBlock(nn.Module):
    """Large-kernel convolution and MLP in one branch."""

    def __init__(self, dim: int, kernel: int, mlp_ratio: float, scale: bool, deploy: bool, drop_path: float):
        super().__init__()
        self.dwconv = ResConv(dim)
        self.norm1 = LayerNorm2d(dim)
        self.conv = LargeKernel(dim, kernel, deploy)
        self.norm2 = nn.BatchNorm2d(dim)
        self.se = _squeeze_excite(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.scale = Scale(dim) if scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dwconv(x)
        y = self.se(self.norm2(self.conv(self.norm1(x))))
        return self.scale(x) + self.drop_path(self.mlp(y))


class ContextBlock(nn.Module):
    """ContMix and an MLP on a map whose last `context_dim` channels are the context that the image gave."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel: int,
        num_heads: int,
        mlp_ratio: float,
        first: bool,
        deploy: bool,
        drop_path: float,
    ):
        super().__init__()
        both, hidden = dim + context_dim, int(dim * mlp_ratio)
        self.dim = dim
        self.old_scale = None if first else Scale(context_dim)
        self.new_scale = None if first else Scale(context_dim)
        self.dwconv1 = ResConv(both)
        self.norm1 = LayerNorm2d(both)
        self.fusion = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both),
            nn.BatchNorm2d(both),
            nn.GELU(),
            nn.Conv2d(both, dim, 1),
            GlobalResponseNorm(dim, channels_last=False),
        )
        self.mix = ContMix(dim, context_dim, num_heads, kernel)
        self.mix_proj = nn.Sequential(*_normed_conv(dim, dim))
        self.lepe = nn.Sequential(LargeKernel(dim, kernel, deploy), nn.BatchNorm2d(dim))
        self.se = _squeeze_excite(dim)
        self.gate = nn.Sequential(*_normed_conv(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, both, 1))
        self.scale1 = Scale(both)
        self.dwconv2 = ResConv(both)
        self.norm2 = LayerNorm2d(both)
        self.mlp = ConvMlp(both, hidden)
        self.scale2 = Scale(both)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if self.old_scale is not None and self.new_scale is not None:
            x = torch.cat([x[:, : self.dim], self.old_scale(x[:, self.dim :]) + self.new_scale(context)], 1)
        x = self.dwconv1(x)
        y = self.norm1(x)
        fused = self.fusion(y)
        y, fused_last = y.permute(0, 2, 3, 1), fused.permute(0, 2, 3, 1)
        mixed = self.mix(y[..., : self.dim], y[..., self.dim :], fused_last).permute(0, 3, 1, 2)
        mixed = self.se(self.mix_proj(mixed) + self.lepe(fused))
        x = self.scale1(x) + self.drop_path(self.proj(self.gate(fused) * mixed))
        x = self.dwconv2(x)
        return self.scale2(x) + self.drop_path(self.mlp(self.norm2(x)))


class Focus(nn.Module):
    """A stage of context blocks. `split` is the width of the image's part of the map, before any downsampling."""

    def __init__(self, split: int, down: nn.Module | None, down_context: nn.Module | None, blocks: Sequence[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.split = split
        self.down = down
        self.down_context = down_context
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if self.down is not None and self.down_context is not None:
            x = torch.cat([self.down(x[:, : self.split]), self.down_context(x[:, self.split :])], 1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x


class FocusHead(ClassifierHead):
    """A hidden layer on the map, then pooling and the classifier."""

    def __init__(self, dim: int, hidden: int, num_classes: int, global_pool: str, drop_rate: float):
        super().__init__(hidden, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.conv = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(self.act(self.norm(self.conv(x)))))
        return self.flatten(x) if pre_logits else self.flatten(self.fc(x))


class OverLoCK(Backbone):
    """A backbone that looks twice: image `[batch, in_chans, height, width]` to logits.

    Two stages of large-kernel convolutions; then a base stage and a short overview stage; then two focus stages of
    dynamic convolutions, which see the overview as their context. Features are the outputs of the first two stages and
    of the focus stages, whose channels include those of the context.

    Args:
        depths: blocks of the two first stages, the base and the overview; `focus_depths` of the focus stages.
        dims: channels of the stages; the context has a quarter of the last.
        kernels: kernel size per stage: 7, 13, 15 or 17.
        num_heads: per focus stage; it has twice as many groups of dynamic kernels.
        projection: width of the hidden layer before the classifier.
        deploy: large kernels without the smaller ones that are trained beside them; see `merge_branches`.
        aux_head: in training also classify from the overview; `forward` then gives a pair (logits, overview logits).
        drop_path_rate: stochastic depth of the last block, 0 to 1.

    >>> small = {"depths": (1, 1, 1, 1), "focus_depths": (1, 1), "dims": (16, 16, 32, 32), "num_heads": (2, 2)}
    >>> OverLoCK(**small, num_classes=10)(torch.randn(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    output_fmt = "NCHW"
    feature_cls = "getter"

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 3, 2),
        focus_depths: Sequence[int] = (6, 2),
        dims: Sequence[int] = (56, 112, 256, 336),
        kernels: Sequence[int] = (17, 15, 13, 7),
        num_heads: Sequence[int] = (4, 6),
        mlp_ratio: float = 4.0,
        focus_mlp_ratio: float = 3.0,
        projection: int = 1024,
        deploy: bool = False,
        aux_head: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        context = dims[3] // 4
        rates = drop_path_rates(drop_path_rate, [*depths, *focus_depths])
        half = dims[0] // 2
        stem = nn.Sequential(
            *_normed_conv(in_chans, half, 3, 2), nn.GELU(), *_normed_conv(half, half, 3), nn.GELU(),
            *_normed_conv(half, dims[0], 3, 2), nn.GELU(), *_normed_conv(dims[0], dims[0], 3),
        )  # fmt: skip
        stages = []
        for i, dim in enumerate(dims):
            down = nn.Sequential(*_normed_conv(dims[i - 1], dim, 3, 2)) if i else nn.Identity()
            blocks = [RepConvBlock(dim, kernels[i], mlp_ratio, i > 1, deploy, rate) for rate in rates[i]]
            stages.append(Stage(down, blocks))
        super().__init__(
            stem=stem,
            stages=stages,
            widths=[*dims[:2], dims[2] + context, dims[3] + context],
            reductions=(4, 8, 16, 32),
            norm=nn.Identity(),
            num_classes=num_classes,
            head=FocusHead(dims[3] + context, projection, num_classes, global_pool, drop_rate),
        )
        self.context = nn.Conv2d(dims[3], context, 1)
        self.focus = nn.ModuleList()
        for i, dim in enumerate(dims[2:]):
            blocks = [
                ContextBlock(dim, context, kernels[2 + i], num_heads[i], focus_mlp_ratio, i + j == 0, deploy, rate)
                for j, rate in enumerate(rates[4 + i])
            ]
            down = nn.Sequential(*_normed_conv(dims[2], dim, 3, 2)) if i else None
            down_context = nn.Sequential(*_normed_conv(context, context, 3, 2)) if i else None
            self.focus.append(Focus(dims[2], down, down_context, blocks))
            self.feature_info[2 + i]["module"] = f"focus.{i}"
        self.aux_head = self._auxiliary(num_classes) if aux_head else None
        self.apply(_init_weights)

    def _auxiliary(self, num_classes: int) -> nn.Module:
        dim = self.context.in_channels
        last = nn.Conv2d(dim, num_classes, 1) if num_classes else nn.Identity()
        return nn.Sequential(nn.BatchNorm2d(dim), nn.AdaptiveAvgPool2d(1), last)

    def _look_twice(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last map, and the overview."""
        base = self.stages[2](self.stages[1](self.stages[0](self.stem(x))))
        overview = self.stages[3](base)
        context = self.context(overview)
        near = resized(context, base)
        x = self.focus[0](torch.cat([base, near], 1), near)
        return self.focus[1](x, context), overview

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self._look_twice(x)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, overview = self._look_twice(x)
        x = self.forward_head(x)
        if self.aux_head is not None and not torch.jit.is_scripting():
            if self.training:
                return x, self.aux_head(overview).flatten(1)
        return x

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As in `Backbone`: the outputs of the two first stages and of the focus stages. There is no final norm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}; allowed: 'NCHW', 'NHWC'")
        count = 2 + len(self.focus) if self.focus else len(self.stages)
        take, last = feature_take_indices(count, indices)
        until = last if stop_early else count - 1
        x = self.stem(x)
        maps = []
        for stage in self.stages[: min(until, 1) + 1]:
            x = stage(x)
            maps.append(x)
        if until > 1:
            base = self.stages[2](x)
            context = self.context(self.stages[3](base))
            near = resized(context, base)
            x = torch.cat([base, near], 1)
            for focus, size in zip(self.focus[: until - 1], (near, context), strict=False):
                x = focus(x, size)
                maps.append(x)
        maps = [maps[i] for i in take]
        if output_fmt == "NHWC":
            maps = [y.permute(0, 2, 3, 1).contiguous() for y in maps]
        return maps if intermediates_only else (x, maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one asked for; returns the indices taken."""
        take, last = feature_take_indices(2 + len(self.focus), indices)
        self.focus = self.focus[: max(last - 1, 0)]
        if last < 2:
            self.stages = self.stages[: last + 1]
            self.context = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = self._auxiliary(num_classes)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in (*self.stages, *self.focus):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        last = (r"^aux_head", (99999,))
        if coarse:
            blocks = [(r"^stages\.(\d+)", None), (r"^context", (4,)), (r"^focus\.(\d+)", (5,))]
        else:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^context", (0,)),
                (r"^focus\.(\d+)\.down", (0,)),
                (r"^focus\.(\d+)\.blocks\.(\d+)", None),
            ]
        return {"stem": r"^stem", "blocks": [*blocks, last]}

    @torch.jit.ignore
    def merge_branches(self) -> None:
        """Turn the model that was trained into the `deploy=True` form, which computes the same in eval mode."""
        for module in self.modules():
            if isinstance(module, LargeKernel):
                module.merge()


@register_notrace_function
def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x at the height and width of another map."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, Scale):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_TINY = {"depths": (4, 4, 6, 2), "focus_depths": (12, 2), "dims": (64, 128, 256, 512), "num_heads": (4, 8)}
_VARIANTS = {
    "overlock_xt": {},
    "overlock_t": {**_TINY, "drop_path_rate": 0.15},
    "overlock_s": {
        "depths": (6, 6, 8, 3), "focus_depths": (16, 3), "dims": (64, 128, 320, 512), "num_heads": (8, 16),
        "drop_path_rate": 0.4,
    },
    "overlock_b": {
        "depths": (8, 8, 10, 4), "focus_depths": (20, 4), "dims": (80, 160, 384, 576), "num_heads": (6, 9),
        "drop_path_rate": 0.5,
    },
}  # fmt: skip

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(crop_pct=0.925) for name in _VARIANTS})
register_variants(globals(), OverLoCK, _VARIANTS, checkpoint_filter_fn)
