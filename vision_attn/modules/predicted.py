"""Predicted sparse attention: a cheap low-rank guess of the attention map says which keys each query looks at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from vision_attn.modules.softmax import check_heads, softmax_attention, split_heads

__all__ = ["MaskPredictor", "PredictedAttention"]


class MaskPredictor(nn.Module):
    """Which keys every query sees, guessed from queries and keys at reduced width and rank.

    Args:
        dim, num_heads: of the attention layer.
        num_tokens: length of the sequence; the learned bases are as long, so it cannot change.
        keep: fraction of the keys kept per query, above 0 to 1, rounded up.
        rank_factor: the rank of the guess is `num_tokens // rank_factor`.
        threshold: entries of the second basis not above it count as 0.

    forward(q, k) with heads first, `[batch, heads, tokens, head_dim]`, gives the mask, bool `[batch, heads, tokens,
    tokens]`, without a gradient. The first token (class token) sees everything.

    >>> q = torch.randn(1, 2, 50, 16)
    >>> MaskPredictor(32, 2, num_tokens=50)(q, q).sum(-1)[0, 0, :3].tolist()
    [50, 13, 13]
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        keep: float = 0.25,
        rank_factor: int = 6,
        threshold: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; allowed: above 0, at most 1")
        if not 1 <= rank_factor <= num_tokens:
            raise ValueError(f"rank_factor is {rank_factor}; allowed: 1 to num_tokens = {num_tokens}")
        if dim // num_heads < 2:
            raise ValueError(f"dim {dim} leaves heads of {dim // num_heads} channels; the guess needs at least 2")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.num_tokens, self.threshold = num_heads, num_tokens, threshold
        self.kept = math.ceil(keep * num_tokens)
        head_dim, rank = dim // num_heads, num_tokens // rank_factor
        self.proj_c_q = nn.Linear(head_dim, head_dim // 2, **dd)
        self.proj_c_k = nn.Linear(head_dim, head_dim // 2, **dd)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        self.proj_back_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        nn.init.trunc_normal_(self.proj_n, std=0.02)
        nn.init.trunc_normal_(self.proj_back_n, std=0.02)

    def coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        """What every query takes of the basis maps, summing to 1: `[batch, heads, tokens, rank]`."""
        if q.shape[2] != self.num_tokens:
            raise ValueError(
                f"got {q.shape[2]} tokens but the predictor was made for {self.num_tokens}; "
                f"build it with num_tokens={q.shape[2]}"
            )
        reduced = self.proj_c_k(k).transpose(-2, -1) @ self.proj_n
        # the published scale is by the number of heads, not by their width
        return (self.proj_c_q(q) @ reduced * self.num_heads**-0.5).softmax(-1)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            basis = F.threshold(self.proj_back_n.abs(), self.threshold, 0.0)
            scores = self.coefficients(q, k) @ basis.transpose(0, 1)
            best = scores.topk(self.kept, -1)[1]
            mask = torch.zeros_like(scores).scatter(-1, best, 1.0) > 0
            first = torch.ones_like(mask[:, :, :1])
            return torch.cat([first, mask[:, :, 1:]], 2)


class PredictedAttention(nn.Module):
    """Softmax attention of tokens `[batch, num_tokens, dim]`, each query with the keys a `MaskPredictor` gives it.

    Args:
        dim: width of the tokens, a multiple of `num_heads`.
        num_heads: number of heads.
        num_tokens: length of the sequence with the class token, which comes first; 197 for 14 x 14 patches.
        keep, rank_factor, threshold: of the `MaskPredictor`.
        qkv_bias: biases of the query, key and value projections.
        attn_drop, proj_drop: dropout of the weights and of the result.

    Raises:
        ValueError: numbers that do not fit together, or a sequence of another length.

    The mask has no gradient: the predictor learns from `reconstruction_loss`, before or along with the rest. The scores
    of dropped keys are computed and masked, so this layer shows what is lost, and does not save time.

    >>> layer = PredictedAttention(32, num_heads=4, num_tokens=50)
    >>> x = torch.randn(1, 50, 32)
    >>> layer(x).shape, layer.reconstruction_loss(x).shape
    (torch.Size([1, 50, 32]), torch.Size([]))

    Paper: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_tokens: int = 197,
        keep: float = 0.25,
        rank_factor: int = 6,
        threshold: float = 0.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.mask_predictor = MaskPredictor(dim, num_heads, num_tokens, keep, rank_factor, threshold, **dd)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        dropout = self.attn_drop if self.training else 0.0
        out = softmax_attention(q, k, v, self.fused_attn, dropout, self.mask_predictor(q, k))
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def reconstruction_loss(self, x: Tensor) -> Tensor:
        """Squared difference between the guessed and the dense attention, summed over the map.

        The class token's row is left out, as its mask is; both sides have a gradient. Published training starts with
        some epochs of it on dense attention, then adds it to the task with weight 0.01 to 0.05.
        """
        q, k, _ = split_heads(self.qkv(x), 3, self.num_heads)
        dense = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        guess = self.mask_predictor.coefficients(q, k) @ self.mask_predictor.proj_back_n.transpose(0, 1)
        return (guess - dense)[:, :, 1:].square().sum()
