"""Mixture of heads: every token weighs its heads and keeps only the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn

from vision_attn.modules.softmax import check_heads, softmax_attention, split_heads

__all__ = ["HeadRouter", "MixtureOfHeads", "load_balance"]


class HeadRouter(nn.Module):
    """Gates of the heads of every token: `[..., dim]` to `[..., num_heads]`, 0 where a head is not kept.

    The first `shared_heads` are always kept; of the others every token keeps the `routed_heads` it scores highest.
    Gates have mean 1 over the shared and over the kept heads; the token also sets the balance between the two groups.

    Args:
        dim: width of the tokens.
        num_heads: heads in all.
        shared_heads: heads that are always on, 0 to `num_heads`.
        routed_heads: kept per token among the rest; 0 only where all heads are shared. With 1 its gate is always 1, and
            only `load_balance` trains the choice.

    Raises:
        ValueError: numbers of heads that do not fit together.

    >>> gates = HeadRouter(32, 8, shared_heads=2, routed_heads=3)(torch.randn(1, 7, 7, 32))
    >>> gates.shape, int((gates > 0).sum(-1).max())
    (torch.Size([1, 7, 7, 8]), 5)

    Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention.
    """

    def __init__(self, dim: int, num_heads: int, shared_heads: int, routed_heads: int, device=None, dtype=None):
        super().__init__()
        others = num_heads - shared_heads
        if not 0 <= shared_heads <= num_heads:
            raise ValueError(f"shared_heads is {shared_heads}; allowed: 0 to num_heads = {num_heads}")
        if not min(others, 1) <= routed_heads <= others:
            raise ValueError(
                f"routed_heads is {routed_heads} of the {others} heads that are not shared; "
                f"allowed: {min(others, 1)} to {others}"
            )
        self.shared_heads, self.routed_heads = shared_heads, routed_heads
        options = {"bias": False, "device": device, "dtype": dtype}
        self.wg = nn.Linear(dim, others, **options) if others else nn.Identity()
        self.wg_0 = nn.Linear(dim, 2, **options) if others and shared_heads else nn.Identity()
        self.wg_1 = nn.Linear(dim, shared_heads, **options) if shared_heads > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gates: list[Tensor] = []
        if self.shared_heads > 1:
            gates.append(self.wg_1(x).softmax(-1) * self.shared_heads)
        elif self.shared_heads == 1:
            gates.append(torch.ones_like(x[..., :1]))
        if self.routed_heads > 0:
            scores, kept = self.route(x)
            routed = scores * kept
            gates.append(routed / routed.sum(-1, keepdim=True) * self.routed_heads)
        if len(gates) == 2:
            balance = 2 * self.wg_0(x).softmax(-1)
            gates = [gates[0] * balance[..., :1], gates[1] * balance[..., 1:]]
        return torch.cat(gates, -1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the routed heads, summing to 1, and which are kept (0 or 1), `[..., num_heads - shared_heads]`."""
        scores = self.wg(x).softmax(-1)
        best = scores.topk(self.routed_heads, -1)[1]
        return scores, torch.zeros_like(scores).scatter(-1, best, 1.0)

    def balance_loss(self, x: Tensor) -> Tensor:
        """Scalar: `routed_heads` when heads are used alike, more when few of them score high and are kept."""
        scores, kept = (t.flatten(0, -2).mean(0) for t in self.route(x))
        return len(scores) ** 2 * (scores * kept).mean()


class MixtureOfHeads(nn.Module):
    """Softmax attention over all tokens of `[batch, *grid, dim]`, each head's output times its gate for that token.

    Args:
        dim: width of the tokens, a multiple of `num_heads`.
        num_heads, shared_heads, routed_heads: as in `HeadRouter`.
        qkv_bias: biases of the query, key and value projections.
        attn_drop, proj_drop: dropout of the weights and of the result.

    Raises:
        ValueError: numbers of heads that do not fit together.

    Keys and values of all heads are computed: another token may keep a head that this one drops.

    >>> MixtureOfHeads(32, num_heads=8, shared_heads=2, routed_heads=3)(torch.randn(1, 7, 7, 32)).shape
    torch.Size([1, 7, 7, 32])

    Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        shared_heads: int = 2,
        routed_heads: int = 4,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.fused_attn = use_fused_attn()
        self.router = HeadRouter(dim, num_heads, shared_heads, routed_heads, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)
        out = softmax_attention(q, k, v, self.fused_attn, self.attn_drop if self.training else 0.0)
        out = out.transpose(1, 2) * self.router(tokens)[..., None]
        return self.proj_drop(self.proj(out.reshape(x.shape)))


@contextmanager
def load_balance(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Measures how evenly the routed heads of `model` are used in the forward passes inside the `with`.

    The value it gives is a function: the mean of the layers' losses so far, with a gradient. The paper adds it with
    weight 0.01. Call `backward` inside the `with` too where activations are checkpointed.

    Raises:
        ValueError: the model routes no heads, or nothing was run yet.

    >>> layer = MixtureOfHeads(32, num_heads=8, shared_heads=2, routed_heads=3)
    >>> with load_balance(layer) as loss:
    ...     out = layer(torch.randn(2, 7, 7, 32))
    >>> loss().shape
    torch.Size([])
    """
    routers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed_heads]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no layer that routes heads (HeadRouter with routed_heads > 0)")
    losses = []

    def mean() -> Tensor:
        if not losses:
            raise ValueError("no forward pass has gone through the routed heads yet")
        return torch.stack(losses).mean()

    handles = [
        router.register_forward_hook(lambda module, args, out: losses.append(module.balance_loss(args[0])))
        for router in routers
    ]
    try:
        yield mean
    finally:
        for handle in handles:
            handle.remove()
