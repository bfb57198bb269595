"""Blocks of diffusion transformers to build new denoisers from: mixture of heads, and windows beside a linear mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from vision_attn.modules import LinearAttention2d, MixtureOfHeads, WindowAttention2d

__all__ = ["AdaptiveBlock", "LaMambaBlock", "MoHDiTBlock"]


class AdaptiveBlock(nn.Module):
    """Mixers and then an MLP, each shifted, scaled and gated by a condition (adaptive layer norm that starts at zero).

    `x + gate * mixer(norm(x) * (1 + scale) + shift)`, where the condition makes shift, scale and gate. They start at
    zero, so a new block gives back its input.

    Input and output are tokens `[batch, *grid, dim]`; the condition is `[batch, cond_dim]`, such as the embedded
    timestep plus class.

    Args:
        dim: width of the tokens.
        mixers: layers from `[batch, *grid, dim]` to the same, in the order in which they run.
        mlp_ratio: width of the MLP as a multiple of `dim`.
        cond_dim: width of the condition; None for `dim`.

    Raises:
        ValueError: a condition of another form.

    >>> block = AdaptiveBlock(32, [nn.Linear(32, 32)])
    >>> block(torch.randn(2, 5, 7, 32), torch.randn(2, 32)).shape
    torch.Size([2, 5, 7, 32])

    Paper: Scalable Diffusion Models with Transformers.
    """

    def __init__(
        self,
        dim: int,
        mixers: Sequence[Callable[[Tensor], Tensor]],
        mlp_ratio: float = 4.0,
        cond_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        mlp = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.GELU("tanh"), nn.Linear(hidden, dim, **dd))
        self.layers = nn.ModuleList([*mixers, mlp])
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(cond_dim or dim, 3 * len(self.layers) * dim, **dd)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if condition.shape != (len(x), self.condition.in_features):
            raise ValueError(
                f"the condition must be [{len(x)}, {self.condition.in_features}]; got {list(condition.shape)}"
            )
        made = self.condition(nn.functional.silu(condition))
        made = made.view(len(x), *[1] * (x.ndim - 2), len(self.layers), 3, x.shape[-1])
        for i, layer in enumerate(self.layers):
            shift, scale, gate = made[..., i, :, :].unbind(-2)
            x = x + gate * layer(self.norm(x) * (1 + scale) + shift)
        return x


class MoHDiTBlock(AdaptiveBlock):
    """A block of a diffusion transformer whose tokens weigh their heads and keep the best of them.

    Args:
        dim: width of the tokens `[batch, *grid, dim]`, a multiple of `num_heads`.
        num_heads, shared_heads, routed_heads: heads in all, always on, and kept per token among the rest; see
            `vision_attn.modules.HeadRouter`.
        mlp_ratio, cond_dim: as in `AdaptiveBlock`.

    Raises:
        ValueError: numbers of heads that do not fit together.

    Train with `vision_attn.modules.load_balance` added with weight 0.01. Every head is computed: nothing gets faster.

    >>> block = MoHDiTBlock(32, num_heads=8, shared_heads=2, routed_heads=4, cond_dim=16)
    >>> block(torch.randn(1, 3, 5, 5, 32), torch.randn(1, 16)).shape
    torch.Size([1, 3, 5, 5, 32])

    Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        shared_heads: int = 2,
        routed_heads: int = 4,
        mlp_ratio: float = 4.0,
        cond_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        mixer = MixtureOfHeads(dim, num_heads, shared_heads, routed_heads, **dd)
        super().__init__(dim, [mixer], mlp_ratio, cond_dim, **dd)


class LaMambaBlock(AdaptiveBlock):
    """A linear mixer over the whole map, then attention inside windows with learned position biases.

    In time linear in the tokens. The paper's mixer is a selective scan in four directions on CUDA; here it is any of
    our linear attentions.

    Args:
        dim: width of the tokens `[batch, height, width, dim]`, a multiple of `num_heads`.
        window: side of the windows in tokens; 8 as published.
        shift: by how much the windows are moved. The paper has none; its code moves them by `window // 2` in every
            second block.
        kind: of the linear mixer, see `vision_attn.modules.LinearAttention2d`; "gla" scans and forgets, as Mamba does.
        mlp_ratio, cond_dim: as in `AdaptiveBlock`.

    Raises:
        ValueError: an option out of range.

    >>> LaMambaBlock(32, num_heads=4, window=4)(torch.randn(2, 9, 6, 32), torch.randn(2, 32)).shape
    torch.Size([2, 9, 6, 32])

    Paper: LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 8,
        shift: int = 0,
        kind: str = "gla",
        mlp_ratio: float = 4.0,
        cond_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        mixers = [
            LinearAttention2d(dim, num_heads, kind, **dd),
            WindowAttention2d(dim, num_heads, window, shift, **dd),
        ]
        super().__init__(dim, mixers, mlp_ratio, cond_dim, **dd)
