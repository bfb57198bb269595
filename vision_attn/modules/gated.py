"""Gated attention: a sigmoid gate on the output of every head, before the projection."""

from __future__ import annotations

from timm.layers import use_fused_attn
from torch import Tensor, nn

from vision_attn.modules.softmax import check_heads, softmax_attention, split_heads

__all__ = ["GatedAttention", "split_packed_gate"]

GATES = ("elementwise", "headwise")


class GatedAttention(nn.Module):
    """Softmax attention over all tokens of `[batch, *grid, dim]`, its output times `sigmoid(gate(x))`, then projected.

    Args:
        dim: width of the tokens, a multiple of `num_heads`.
        num_heads: number of heads.
        gating: "elementwise", a gate per channel, or "headwise", one per head.
        qkv_bias: biases of the query, key, value and gate projections.
        attn_drop, proj_drop: dropout of the weights and of the result.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an unknown gating.

    The elementwise form has the state dict of `timm.layers.Attention(gated=True)`.

    >>> layer = GatedAttention(32, num_heads=4, gating="headwise")
    >>> x = torch.randn(1, 7, 7, 32)
    >>> layer(x).shape, layer.gates(x).shape
    (torch.Size([1, 7, 7, 32]), torch.Size([1, 7, 7, 4]))

    Paper: Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        gating: str = "elementwise",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        _check_gating(gating)
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.gate = nn.Linear(dim, dim if gating == "elementwise" else num_heads, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def gates(self, x: Tensor) -> Tensor:
        """The gates of tokens `[batch, *grid, dim]`, between 0 and 1: `[batch, *grid, dim]`, or `[..., num_heads]`."""
        return self.gate(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)
        out = softmax_attention(q, k, v, self.fused_attn, self.attn_drop if self.training else 0.0).transpose(1, 2)
        out = out * self.gates(tokens).unflatten(-1, (self.num_heads, -1))  # a headwise gate has last size 1
        return self.proj_drop(self.proj(out.reshape(x.shape)))


def split_packed_gate(
    q_proj: Tensor, num_heads: int, num_kv_heads: int, gating: str = "elementwise"
) -> tuple[Tensor, Tensor]:
    """Take apart the `q_proj` of published gated language models: per KV head, queries of its heads, then their gates.

    Args:
        q_proj: weight `[rows, dim]`, or bias `[rows]`.
        num_heads, num_kv_heads: of the attention layer; the second divides the first.
        gating: "elementwise" or "headwise".

    Returns:
        Rows of the queries and rows of the gates, each in the order of the heads.

    Raises:
        ValueError: the rows cannot be cut that way.

    >>> q, gate = split_packed_gate(torch.randn(4 * (16 + 1), 64), num_heads=4, num_kv_heads=2, gating="headwise")
    >>> q.shape, gate.shape
    (torch.Size([64, 64]), torch.Size([4, 64]))
    """
    _check_gating(gating)
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads must divide {num_heads} heads")
    per_head, rest = divmod(len(q_proj), num_heads)
    head_dim = per_head // 2 if gating == "elementwise" else per_head - 1
    if rest or head_dim < 1 or (gating == "elementwise" and per_head % 2):
        raise ValueError(f"{len(q_proj)} rows do not hold queries and {gating} gates of {num_heads} heads")
    rows = num_heads // num_kv_heads * head_dim
    q, gate = q_proj.unflatten(0, (num_kv_heads, -1)).tensor_split([rows], 1)
    return q.flatten(0, 1), gate.flatten(0, 1)


def _check_gating(gating: str) -> None:
    if gating not in GATES:
        raise ValueError(f"gating {gating!r}; allowed: {', '.join(map(repr, GATES))}")
