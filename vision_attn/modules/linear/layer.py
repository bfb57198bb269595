"""Linear attention as a layer for maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import register_notrace_function
from torch import nn

from vision_attn.modules.linear import formulas
from vision_attn.modules.linear.cores import Formula, GatedScan, InLine, L2ViT, LightNet, RotaryFormula, Slab
from vision_attn.modules.softmax import check_heads

__all__ = ["KINDS", "AttentionFrame", "LinearAttention2d", "MapConv"]

ROTARY = ("elu", "relu", "mala", "rala", "care", "nala")
OPTIONS = {"inline": "feature", "slab": "size", "lightnet": "rank", "gla": "rank"}
WITH_PARAMETERS = {
    "inline": lambda dim, heads: partial(InLine, dim, heads),
    "l2vit": lambda dim, heads: partial(L2ViT, heads, dim // heads),
    "slab": lambda dim, heads: partial(Slab, dim, dim // heads),
    "lightnet": lambda dim, heads: partial(LightNet, dim),
    "gla": lambda dim, heads: partial(GatedScan, dim),
}
KINDS = tuple(sorted(formulas.FORMULAS))


class MapConv(nn.Conv2d):
    """Depthwise convolution of maps `[batch, height, width, dim]`, padded so that the size stays."""

    def __init__(self, dim: int, kernel: int, device=None, dtype=None):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous().permute(0, 3, 1, 2)  # channels last in memory, which is fastest
        return self._conv_forward(x, self.weight, self.bias).permute(0, 2, 3, 1)


class AttentionFrame(nn.Module):
    """Projections around a core: q, k, v, an optional local term and gate, and what follows.

    Args:
        core: module of q, k, v `[batch, height, width, heads, head_dim]` and the input; see `cores`.
        lepe: side of a depthwise convolution of v that is added, odd; None for none.
        out_gate: multiply by a projection of the input; with "normed" after a LayerNorm, and by its silu.
        own_values: project v; otherwise v is the input.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        core: Callable[..., nn.Module],
        qkv_bias: bool = True,
        lepe: int | None = None,
        out_gate: bool | str = False,
        own_values: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if lepe is not None and (lepe < 1 or lepe % 2 == 0):
            raise ValueError(f"lepe is the side of a convolution, odd, or None; got {lepe}")
        if out_gate not in (False, True, "normed"):
            raise ValueError(f"out_gate {out_gate!r}; allowed: False, True, 'normed'")
        dd = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.own_values, self.gated = own_values, bool(out_gate)
        self.qkv = nn.Linear(dim, (2 + own_values + self.gated) * dim, bias=qkv_bias, **dd)
        self.core = core
        self.lepe = None if lepe is None else MapConv(dim, lepe, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if out_gate == "normed" else nn.Identity()
        self.gate_act = nn.SiLU() if out_gate == "normed" else nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checked_map(x, self.dim)
        heads = (self.num_heads, self.head_dim)
        parts = self.qkv(x).split(self.dim, -1)
        v = parts[2] if self.own_values else x
        q, k = parts[0].unflatten(-1, heads), parts[1].unflatten(-1, heads)
        out = self.core(q, k, v.unflatten(-1, heads), x).flatten(3)
        if self.lepe is not None:
            out = out + self.lepe(v)
        if self.gated:
            out = self.norm(out) * self.gate_act(parts[-1])
        return self.proj_drop(self.proj(out))


@register_notrace_function
def checked_map(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x, if it is `[batch, height, width, dim]` and not empty."""
    if x.dim() != 4 or x.shape[-1] != dim or x.shape[1] * x.shape[2] == 0:
        raise ValueError(f"the map must be [batch, height, width, {dim}]; got {list(x.shape)}")
    return x


class LinearAttention2d(AttentionFrame):
    """Attention over all tokens of a map in time linear in their number.

    Input and output are maps `[batch, height, width, dim]`; `head_dim = dim / num_heads`.

    Args:
        dim: channels, a multiple of `num_heads`.
        kind: the formula.
            "elu", "relu": positive features, weights that sum to 1.
            "mala", "rala": of the MALA and RAVLT backbones; there with `rope="axial", lepe=5, out_gate=True`.
            "nala": of NaLaFormer; there with `rope="axial", lepe=5, out_gate="normed"`.
            "inline": with a 3 x 3 convolution predicted from the image; option `feature`.
            "l2vit": a clamped divisor and a learned temperature.
            "slab": a table of positions for maps of `size` (56; interpolated for others), and a 5 x 5 convolution.
            "flow": conserves what enters and leaves each token. "care": the values are the input itself.
            "lightnet": softmax of keys over tokens, a norm and a gate of rank `rank` (16).
            "gla": scans that forget, forwards and backwards; gates of rank `rank` (16).
        qkv_bias: bias of the first projection.
        rope: "axial" for rotary positions (elu, relu, mala, rala, care, nala; head_dim a multiple of 4, at least 8).
        lepe: side of a depthwise convolution of the values that is added, odd; None for none.
        out_gate: multiply the result by a projection of the input; "normed" normalises first, and applies silu.
        proj_drop: dropout of the output.
        options: `feature`, `size` or `rank` where the kind has it.

    Raises:
        ValueError: an option out of range; a map with other channels.
        TypeError: an option that the kind does not have.

    >>> LinearAttention2d(64, num_heads=2, kind="mala", rope="axial", lepe=5)(torch.randn(1, 14, 11, 64)).shape
    torch.Size([1, 14, 11, 64])

    Papers: those of the formulas, see `linear_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kind: str = "elu",
        qkv_bias: bool = True,
        rope: str | None = None,
        lepe: int | None = None,
        out_gate: bool | str = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        **options,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}; allowed: {', '.join(map(repr, KINDS))}")
        if rope not in (None, "axial"):
            raise ValueError(f"rope {rope!r}; allowed: None, 'axial'")
        if rope and kind not in ROTARY:
            raise ValueError(f"rope='axial' is for kinds {', '.join(ROTARY)}; {kind!r} has none")
        unknown = options.keys() - {OPTIONS.get(kind)}
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}; kind {kind!r} takes {OPTIONS.get(kind, 'none')}")
        check_heads(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        if kind in WITH_PARAMETERS:
            make = partial(WITH_PARAMETERS[kind](dim, num_heads), **dd)
        elif rope:
            make = partial(RotaryFormula, formulas.FORMULAS[kind], dim // num_heads)
        else:
            make = partial(Formula, formulas.FORMULAS[kind])
        super().__init__(dim, num_heads, make(**options), qkv_bias, lepe, out_gate, kind != "care", proj_drop, **dd)
        self.kind = kind

    def extra_repr(self) -> str:
        return f"kind={self.kind}, heads={self.num_heads}"
