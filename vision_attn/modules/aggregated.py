"""Attention of TransNeXt: every token sees its 3 x 3 neighbors and a pooled map, in one softmax of cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn
from torch import Tensor, nn

from vision_attn.modules.mixture_of_heads import HeadRouter
from vision_attn.modules.softmax import check_heads, softmax_attention

__all__ = ["AggregatedAttention", "CosineAttention"]

NEAR = 9  # the 3 x 3 neighbors


class CosineAttention(nn.Module):
    """Attention over all tokens of a map `[batch, height, width, dim]` by cosines, with positions from a small MLP.

    Scores are `<q / |q| + e, k / |k|> * softplus(temperature) * log(keys)` plus a bias computed from the distance of
    the two tokens, so that a model may see maps of other sizes than it was trained on.

    Args:
        dim: width of the tokens, a multiple of `num_heads`.
        num_heads: number of heads.
        trained_grid: (height, width) of the maps in training, the unit of the distances.
        shared_heads, routed_heads: as in `HeadRouter`; None for no gates on the heads.
        qkv_bias: biases of the query, key and value projections.
        attn_drop, proj_drop: dropout of the weights and of the result.

    >>> CosineAttention(32, 4, trained_grid=(7, 7))(torch.randn(1, 5, 9, 32)).shape
    torch.Size([1, 5, 9, 32])

    Paper: TransNeXt: Robust Foveal Visual Perception for Vision Transformers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        trained_grid: tuple[int, int],
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.trained_grid = (int(trained_grid[0]), int(trained_grid[1]))
        self.fused_attn = use_fused_attn()
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), 1 / 0.24).expm1().log())
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self._project(dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, num_heads)
        self.router = nn.Identity() if shared_heads is None else HeadRouter(dim, num_heads, shared_heads, routed_heads)
        self.gated = shared_heads is not None

    def _project(self, dim: int, bias: bool) -> None:
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)

    def bias(self, table: Tensor, index: Tensor) -> Tensor:
        """`[heads, queries, keys]` from the distances in `table`, looked up by `index`."""
        return self.cpb_fc2(F.relu(self.cpb_fc1(table))).transpose(0, 1)[:, index]

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """Heads `[batch, height, width, heads, head_dim]` of the input x, gated and projected."""
        if self.gated:
            out = out * self.router(x).unsqueeze(-1)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        table, index = distances(x, x.shape[1], x.shape[2], self.trained_grid)
        scale = F.softplus(self.temperature) * log_count(x)
        q = (F.normalize(q, dim=-1) + self.query_embedding) * scale
        dropout = self.attn_drop if self.training else 0.0
        mask = self.bias(table, index).unsqueeze(0)
        out = softmax_attention(q, F.normalize(k, dim=-1), v, self.fused_attn, dropout, mask, 1.0)
        return self.merge(x, out.transpose(1, 2).reshape(x.shape[:3] + out.shape[1:2] + out.shape[3:]))


class AggregatedAttention(CosineAttention):
    """Cosine attention of a map `[batch, height, width, dim]` to the 3 x 3 neighbors and a pooled map, in one softmax.

    Neighbors outside of the map do not count. The weights of the neighbors get a learned term more that is linear in
    the query: a dynamic convolution.

    Args:
        dim, num_heads, trained_grid, shared_heads, routed_heads, qkv_bias, attn_drop, proj_drop: see `CosineAttention`.
        reduction: the pooled map is this much smaller along each axis, rounded down, and at least 1 x 1.

    >>> AggregatedAttention(32, 4, trained_grid=(14, 14), reduction=4)(torch.randn(1, 9, 13, 32)).shape
    torch.Size([1, 9, 13, 32])

    Paper: TransNeXt: Robust Foveal Visual Perception for Vision Transformers.
    """

    def __init__(self, dim: int, num_heads: int, trained_grid: tuple[int, int], reduction: int = 2, **options):
        super().__init__(dim, num_heads, trained_grid, **options)
        if reduction < 1:
            raise ValueError(f"reduction is {reduction}; allowed: 1 and more")
        self.reduction = reduction
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, NEAR))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, NEAR))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, NEAR))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def _project(self, dim: int, bias: bool) -> None:
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = pooled_size(x, self.reduction)
        pooled = F.adaptive_avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), (rows, columns))
        pooled = self.kv(self.norm(pooled.flatten(2).transpose(1, 2)))
        table, index = distances(x, rows, columns, self.trained_grid)
        out = aggregate(
            self.q(x).unflatten(-1, (self.num_heads, -1)),
            self.kv(x).unflatten(-1, (2, self.num_heads, -1)),
            pooled.unflatten(-1, (2, self.num_heads, -1)),
            F.softplus(self.temperature).flatten(),
            self.query_embedding.squeeze(1),
            self.relative_pos_bias_local,
            self.bias(table, index),
            self.learnable_tokens,
            self.learnable_bias.squeeze(1),
            self.attn_drop if self.training else 0.0,
        )
        return self.merge(x, out)


@register_notrace_function
def aggregate(
    q: Tensor,
    kv: Tensor,
    pooled: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    pooled_bias: Tensor,
    tokens: Tensor,
    tokens_bias: Tensor,
    dropout: float,
) -> Tensor:
    """Heads of aggregated attention, `[batch, height, width, heads, head_dim]` like q.

    Args:
        kv: `[batch, height, width, 2, heads, head_dim]`.
        pooled: `[batch, keys, 2, heads, head_dim]`.
        temperature: `[heads]`.
        query_embedding: `[heads, head_dim]`.
        local_bias: `[heads, 9]`.
        pooled_bias: `[heads, height * width, keys]`.
        tokens, tokens_bias: of the dynamic convolution, `[heads, head_dim, 9]` and `[heads, 9]`.
    """
    height, width = q.shape[1], q.shape[2]
    q, k, v = F.normalize(q, dim=-1), F.normalize(kv[..., 0, :, :], dim=-1), kv[..., 1, :, :]
    pooled_k, pooled_v = F.normalize(pooled[:, :, 0], dim=-1), pooled[:, :, 1]
    pad = [0, 0, 0, 0, 1, 1, 1, 1]
    k, v = F.pad(k, pad), F.pad(v, pad)
    inside = F.pad(torch.ones_like(q[:1, :, :, :1, 0]), pad[2:])  # [1, height + 2, width + 2, 1]
    seen = torch.stack(shifted(inside, height, width), -1)  # [1, height, width, 1, 9]
    count = (seen.sum(-1) + pooled.shape[1]).log()
    scaled = (q + query_embedding) * (temperature * count).unsqueeze(-1)
    near = torch.stack([(scaled * key).sum(-1) for key in shifted(k, height, width)], -1)
    near = (near + local_bias).masked_fill(seen == 0, float("-inf"))
    far = torch.einsum("byxhd,bkhd->byxhk", scaled, pooled_k)
    far = far + pooled_bias.transpose(0, 1).reshape(height, width, -1, pooled.shape[1])
    weights = F.dropout(torch.cat([near, far], -1).softmax(-1), dropout)
    dynamic = torch.einsum("byxhd,hdk->byxhk", q, tokens) + tokens_bias
    near_weights = weights[..., :9] + dynamic
    out = torch.einsum("byxhk,bkhd->byxhd", weights[..., 9:], pooled_v)
    for i, value in enumerate(shifted(v, height, width)):
        out = out + near_weights[..., i : i + 1] * value
    return out


def shifted(x: Tensor, height: int, width: int) -> list[Tensor]:
    """What is at each of the 3 x 3 neighbors, from a map with a border of 1: views, not a copy nine times as large."""
    return [x[:, i // 3 : i // 3 + height, i % 3 : i % 3 + width] for i in range(9)]


@register_notrace_function
def log_count(x: Tensor) -> float:
    """Logarithm of the number of tokens of a map `[batch, height, width, dim]`."""
    return float(torch.tensor(x.shape[1] * x.shape[2], dtype=torch.float64).log())


@register_notrace_function
def pooled_size(x: Tensor, reduction: int) -> tuple[int, int]:
    return max(x.shape[1] // reduction, 1), max(x.shape[2] // reduction, 1)


@register_notrace_function
def distances(x: Tensor, rows: int, columns: int, trained: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How far the tokens of a map `[batch, height, width, dim]` are from those of the map pooled to rows x columns.

    Returns:
        The distances that occur, `[distances, 2]`, in eighths of the map in training on a logarithmic scale,
        and which of them every pair has, `[height * width, rows * columns]`.
    """
    down, row = axis_distances(x, x.shape[1], rows, trained[0])
    right, column = axis_distances(x, x.shape[2], columns, trained[1])
    table = torch.stack([down[:, None].expand(-1, len(right)), right.expand(len(down), -1)], -1)
    index = row[:, None, :, None] * len(right) + column[None, :, None, :]
    return table.flatten(0, 1), index.flatten(2).flatten(0, 1)


def axis_distances(x: Tensor, size: int, pooled: int, trained: int) -> tuple[Tensor, Tensor]:
    """One axis: the distances that occur, and their numbers `[size, pooled]`. Pooled cells sit at their centers."""
    cell = torch.arange(pooled, device=x.device)
    ends = cell * size // pooled + ((cell + 1) * size + pooled - 1) // pooled - 1  # first and last token, added
    twice, index = torch.unique(2 * torch.arange(size, device=x.device)[:, None] - ends, return_inverse=True)
    distance = twice.to(x.dtype) * 4 / max(trained - 1, 1)
    return distance.sign() * (distance.abs() + 1).log2() / 3, index
