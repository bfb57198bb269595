"""SLAB-Swin: linear attention in the two large stages, and norms that turn into batch norm while the model trains.

Paper: SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization.
"""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs
from torch import nn

from vision_attn.backbones.checkpoints import renamed
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.inline import LinearSwin, rename_swin
from vision_attn.backbones.skeleton import cfg

__all__ = ["PRepBN", "SlabSwin", "checkpoint_filter_fn"]


class RepBN(nn.Module):
    """Batch norm plus `alpha` times the input, over channels last."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x.flatten(0, -2)).view(x.shape) + self.alpha * x


@register_notrace_module
class PRepBN(nn.Module):
    """LayerNorm at the start of training, `RepBN` after `steps` forward passes in training mode and in inference.

    In between a mixture, whose share of LayerNorm falls linearly; `left` counts the passes that remain. Input
    `[..., dim]`.

    >>> norm = PRepBN(8, steps=100)
    >>> x = torch.randn(2, 5, 8)
    >>> torch.allclose(norm(x), norm.norm1(x)), int(norm.left)
    (True, 99)
    """

    def __init__(self, dim: int, steps: int = 60_000):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = RepBN(dim)
        self.register_buffer("left", torch.tensor(steps))
        self.register_buffer("steps", torch.tensor(steps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.norm2(x)
        share = self.left / self.steps
        self.left.copy_((self.left - 1).clamp(min=0))
        return share * self.norm1(x) + (1 - share) * self.norm2(x)


class SlabSwin(LinearSwin):
    """`LinearSwin` of kind "slab" with `PRepBN` in place of all norms.

    Args:
        norm_steps: forward passes in training mode until LayerNorm is gone.
        options: of `LinearSwin`.

    >>> SlabSwin(depths=(1, 1, 1, 1), dim=16, num_heads=(1, 2, 4, 8)).eval()(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])
    """

    no_decay = frozenset({"relative_position_bias_table", "position", "alpha"})

    def __init__(self, norm_steps: int = 60_000, **options):
        super().__init__(**{"kind": "slab", "linear": (2, 2, 0, 0), **options})
        _replace_norms(self, norm_steps)


def _replace_norms(module: nn.Module, steps: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, PRepBN(child.normalized_shape[0], steps))
        else:
            _replace_norms(child, steps)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of SLAB-Swin, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """

    def rename(key: str) -> str | None:
        key = rename_swin(key)
        if key is None or key.endswith(".warm"):
            return None
        key = key.replace(".attn.dwc.", ".attn.core.local.").replace(".attn.positional_encoding", ".attn.core.position")
        return key.replace(".iter", ".left").replace(".total_step", ".steps")

    weights = renamed(state_dict, model, rename, "SLAB-Swin")
    own = model.state_dict()
    for key, value in weights.items():
        if key.endswith(".position") and value.shape[1:-1].numel() == own[key].shape[1:-1].numel():
            weights[key] = value.reshape(value.shape[0], *own[key].shape[1:-1], value.shape[-1])
    return weights


_VARIANTS = {
    "slab_swin_tiny": {"drop_path_rate": 0.2},
    "slab_swin_small": {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
}

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg(first_conv="stem.proj") for name in _VARIANTS})
register_variants(globals(), SlabSwin, _VARIANTS, checkpoint_filter_fn)
