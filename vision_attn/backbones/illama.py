"""iLLaMA: a vision transformer with the parts of a language model; its class token comes last in the order of tokens.

Paper: Adapting LLaMA Decoder to Vision Transformer.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, RmsNorm, register_notrace_function, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_attn.backbones.checkpoints import renamed, unwrapped
from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.skeleton import cfg
from vision_attn.modules.softmax import check_heads, split_heads

__all__ = ["ILLaMA", "checkpoint_filter_fn"]


class SoftCausalAttention(nn.Module):
    """Attention of tokens `[batch, tokens, dim]`, the class token first, with rotary positions in one dimension.

    The class token is the last in the order, after which the weights of later tokens are multiplied by `soft_mask`
    (0: causal, 1: not). This happens after the softmax and nothing is normalised again, so rows need not sum to 1, and
    no fused kernel computes it.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.soft_mask = num_heads, 0.0
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(soft_causal(rotate(q), rotate(k), v, self.soft_mask).transpose(1, 2).flatten(2))


def order(x: torch.Tensor) -> torch.Tensor:
    """Positions of tokens `[batch, heads, tokens, head_dim]`: the first is the last."""
    return torch.arange(x.shape[2], device=x.device).roll(1)


@register_notrace_function
def soft_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, soft_mask: float) -> torch.Tensor:
    position = order(q)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    later = position > position[:, None]
    return weights * torch.where(later, soft_mask, 1.0).to(weights.dtype) @ v


@register_notrace_function
def rotate(x: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of channels by position times 10000 ** (-pair / pairs)."""
    pairs = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(pairs, device=x.device, dtype=torch.float32) / pairs)
    angle = (order(x)[:, None] * speed).to(torch.promote_types(x.dtype, torch.float32))
    a, b = x.to(angle.dtype).unflatten(-1, (pairs, 2)).unbind(-1)
    return (
        torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2).to(x.dtype)
    )


class SwiGlu(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then the gated MLP, each after a norm and added to its input. timm gives more options than it has."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        norm_layer: type[nn.Module],
        **unused,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = SoftCausalAttention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = SwiGlu(dim, 256 * -(-int(2 * int(dim * mlp_ratio) / 3) // 256))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ILLaMA(VisionTransformer):
    """A vision transformer with causal attention, RMS norms, gated MLPs and rotary positions; images to logits.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads.
        img_size: pixels per side that the position table is made for; it is resampled for other images.
        drop_path_rate: stochastic depth of the last block, 0 to 1.
        drop_rate, pos_drop_rate: dropout before the classifier and after the position table.

    >>> ILLaMA(embed_dim=32, depth=3, num_heads=2)(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 1000])

    `set_soft_mask` lets a model in training see later tokens, at first fully and then less and less.
    """

    output_fmt = "NLC"

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        qkv_bias: bool = True,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            fc_norm=False,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            norm_layer=partial(RmsNorm, eps=1e-6),
            block_fn=Block,
        )
        trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of patches `[batch, height, width, dim]`; in this file, where tracers find the call that is a leaf."""
        table = resample_abs_pos_embed(
            self.pos_embed, [x.shape[1], x.shape[2]], self.patch_embed.grid_size, num_prefix_tokens=1
        )
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        return self.pos_drop(x + table)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self._pos_embed(self.patch_embed(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.norm(checkpoint_seq(self.blocks, x))
        return self.norm(self.blocks(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def set_soft_mask(self, rate: float) -> None:
        """How much of its weight a later token keeps: 1 for all (ordinary attention), 0 for none (how models are used).

        Raises:
            ValueError: a rate outside of 0 to 1.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}; allowed: 0 to 1")
        for block in self.blocks:
            block.attn.soft_mask = float(rate)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Weights in the published layout of iLLaMA, whose class token comes last, under our names.

    Raises:
        ValueError: weights of another family or size, or with parameters missing.
    """
    state_dict = unwrapped(state_dict)
    published = any(".mlp.fc3." in key for key in state_dict)
    if published:  # most names are the same, so `renamed` would take them for ours
        for old, new in (("fc1", "gate"), ("fc2", "down"), ("fc3", "up")):
            state_dict = {key.replace(f".mlp.{old}.", f".mlp.{new}."): value for key, value in state_dict.items()}
    if not model.num_classes:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("head.")}
    weights = renamed(state_dict, model, str, "iLLaMA")
    if published:
        table = weights["pos_embed"].roll(1, 1)
        if table.shape != model.pos_embed.shape:
            table = resample_abs_pos_embed(table, model.patch_embed.grid_size, num_prefix_tokens=1)
        weights["pos_embed"] = table
    return weights


def _create(cls, name, pretrained, filter_fn, **kwargs):
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        cls, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs
    )


_VARIANTS = {
    "illama_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "illama_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "illama_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "illama_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": cfg(first_conv="patch_embed.proj", classifier="head", pool_size=None) for name in _VARIANTS}
)

register_variants(globals(), ILLaMA, _VARIANTS, checkpoint_filter_fn, build=_create)
