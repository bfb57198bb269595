"""What every backbone owes to timm, once: features, intermediates, heads, groups, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

__all__ = ["Backbone", "Stage", "cfg", "create", "drop_path_rates", "init_linear", "init_linear_and_conv"]


def cfg(**changes: Any) -> dict:
    """The default cfg of a backbone; keyword arguments replace single entries."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        **changes,
    }


def create(cls: type[nn.Module], variant: str, pretrained: bool, filter_fn: Callable, **kwargs: Any) -> nn.Module:
    """Build a registered backbone the way timm does; `filter_fn(state_dict, model)` reads official checkpoints.

    A class whose stages are not a plain sequence says `feature_cls = "getter"`.
    """
    features = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "flatten_sequential": True}
    if hasattr(cls, "feature_cls"):
        features["feature_cls"] = cls.feature_cls
    return build_model_with_cfg(
        cls, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=features, **kwargs
    )


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth from 0 at the first block of the network to `rate` at the last, one list per stage."""
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """Truncated normal weights, std 0.02, and no bias for a linear layer; for `Module.apply`."""
    if isinstance(module, kinds):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linear_and_conv(module: nn.Module) -> None:
    """`init_linear` for convolutions too."""
    init_linear(module, (nn.Linear, nn.Conv2d))


class Stage(nn.Module):
    """A downsampling layer (`nn.Identity()` for none), then blocks, optionally recomputed in the backward pass."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Backbone(nn.Module):
    """A stem, stages, a final norm and a head, with everything timm asks of a model.

    A family builds the parts and calls this constructor; its file holds blocks, sizes and the checkpoint filter.

    Args:
        stem: image `[batch, in_chans, height, width]` to the first map.
        stages: applied one after the other; each one's output is a feature.
        widths: channels of each stage's output.
        reductions: pixels per token along an axis after each stage.
        norm: applied to the last map.
        num_classes, global_pool, drop_rate: of the head, as in timm; 0 classes or an empty pool leave it out.
        head: a head with `reset(num_classes, pool_type)` and `forward(x, pre_logits)`; timm's `ClassifierHead` if None.

    `output_fmt` ("NHWC" or "NCHW") is a class attribute: the layout of the maps between the stages.
    """

    output_fmt = "NHWC"
    no_decay: frozenset[str] = frozenset()  # parameters whose last name part is here get no weight decay

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        widths: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = widths[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = head or ClassifierHead(
            widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.head.num_features
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

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
        """Maps after chosen stages: a count from the end, a list of indices, or all for None.

        Returns:
            The intermediates, or with `intermediates_only=False` also the final map in the model's own layout.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}; allowed: 'NCHW', 'NHWC'")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages if not stop_early else self.stages[: last + 1]):
            x = stage(x)
            if i in take:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                if output_fmt != self.output_fmt:
                    y = y.permute((0, 3, 1, 2) if output_fmt == "NCHW" else (0, 2, 3, 1)).contiguous()
                maps.append(y)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == len(self.stages) - 1 else x), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one asked for; returns the indices taken."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        last = (r"^norm", (99999,))
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), last]}
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*blocks, (r"^stages\.(\d+)", (0,)), last]}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in self.no_decay}
