"""The formulas of linear attention: each is `q_i (sum_j k_j v_j^T)` with features, divisors and offsets of its own.

q, k, v are `[batch, *grid, heads, head_dim]`, and so is what comes back, in the dtype of v. Everything in between is
float32 at least; sums over tokens are means, so that numbers do not grow with the map. `turns` are rotary positions
(`axial_turns`); they apply to the products of features, not to divisors. Each is one node of an fx graph, and scripts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vision_attn.modules.linear.rotary import rotate
from vision_attn.modules.linear.scan import gla


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _positive(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1, several times faster than F.elu on a CPU."""
    x = _wide(x)
    return torch.maximum(x + 1, x.clamp(max=0.0).exp())


def _mean(x: torch.Tensor) -> torch.Tensor:
    """Over the tokens, `[batch, 1..., heads, dim]`."""
    return x.mean(list(range(1, x.dim() - 2)), keepdim=True)


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum(-1, keepdim=True)


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * q_i` times the mean of `k_j v_j^T`; q is flat, `[batch, heads, tokens, dim]`."""
    k, v = k.flatten(1, -3).transpose(1, 2), v.flatten(1, -3).transpose(1, 2)
    return q @ (k.transpose(-1, -2) @ v * (scale / k.shape[2]))


def _mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`scale * q_i` times the mean of `k_j v_j^T`, `[batch, *grid, heads, dim]`."""
    flat, v = q.flatten(1, -3).transpose(1, 2), _wide(v)
    if torch.jit.is_scripting():
        out = _products(flat, k, v, scale)
    else:
        with torch.autocast(q.device.type, enabled=False):
            out = _products(flat, k, v, scale)
    return out.transpose(1, 2).reshape(q.shape[:-1] + v.shape[-1:])


def _normalized(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, turns: torch.Tensor | None
) -> torch.Tensor:
    """`q_i (mean k v^T) / (<q_i, mean k> + eps)` of features."""
    divisor = _dot(q, _mean(k)) + eps
    if turns is not None:
        q, k = rotate(q, turns), rotate(k, turns)
    return (_mix(q, k, v) / divisor).to(v.dtype)


def _tokens(x: torch.Tensor) -> int:
    count = 1
    for size in x.shape[1:-2]:
        count *= size
    return count


@register_notrace_function
def elu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Features elu + 1, weights that sum to 1. Paper: Transformers are RNNs."""
    return _normalized(_positive(q), _positive(k), v, 1e-6 / _tokens(k), turns)


@register_notrace_function
def relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Features relu, weights that sum to 1; a query without a positive feature gives 0."""
    return _normalized(F.relu(_wide(q)), F.relu(_wide(k)), v, 1e-6 / _tokens(k), turns)


@register_notrace_function
def care(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """As `elu`, with the constant of the divisor added to means. Paper: CARE Transformer."""
    return _normalized(_positive(q), _positive(k), v, 1e-6, turns)


@register_notrace_function
def rala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Keys weighted by how well they fit the mean query, which raises the rank. Paper: Breaking the Low-Rank Dilemma of
    Linear Attention."""
    q, k = _positive(q), _positive(k)
    fit = _dot(k, _mean(q)).flatten(1, -3) * q.shape[-1] ** -0.5
    k = k * (fit.softmax(1) * fit.shape[1]).view(k.shape[:-1] + (1,))
    return _normalized(q, k, v, 1e-6, turns)


@register_notrace_function
def nala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Directions raised to a power that grows with the norm of the query, positive and negative parts apart. Paper:
    NaLaFormer: Norm-Aware Linear Attention."""
    q, k = _wide(q), _wide(k)
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    direction, cube = q / (norm + 1e-6), k * k * k
    raised = direction.abs() ** (3 * (0.5 + norm.tanh()))
    q = torch.cat([raised * (direction > 0), raised * (direction < 0)], -1)
    k = torch.cat([F.relu(cube), F.relu(-cube)], -1)
    return _normalized(q, k, v, 1e-6, None if turns is None else torch.cat([turns, turns], -1))


@register_notrace_function
def mala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Weights that keep what the norm of the query says, scaled and shifted to sum to 1. Paper: Rectifying Magnitude
    Neglect in Linear Attention."""
    q, k, scale = _positive(q), _positive(k), q.shape[-1] ** -0.5
    z = _dot(q, _mean(k)) * scale
    if turns is not None:
        q, k = rotate(q, turns), rotate(k, turns)
    return ((1 + 1 / (z + 1e-6)) * _mix(q, k, v, scale) - z * _mean(_wide(v))).to(v.dtype)


@register_notrace_function
def inline(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature: str = "identity") -> torch.Tensor:
    """Weights that sum to 1 by subtraction and may be negative; feature "identity", "relu", "leaky_relu" or "exp"
    (of a fifth). Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention."""
    q, k, scale = _wide(q), _wide(k), q.shape[-1] ** -0.5
    if feature == "relu":
        q, k = F.relu(q), F.relu(k)
    elif feature == "leaky_relu":
        q, k = F.leaky_relu(q), F.leaky_relu(k)
    elif feature == "exp":
        q, k = (0.2 * q).exp(), (0.2 * k).exp()
    elif feature != "identity":
        raise ValueError(f"feature '{feature}'; allowed: 'identity', 'relu', 'leaky_relu', 'exp'")
    return (_mix(q, k, v, scale) + (1 - scale * _dot(q, _mean(k))) * _mean(_wide(v))).to(v.dtype)


@register_notrace_function
def l2vit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, temperature: torch.Tensor | None = None) -> torch.Tensor:
    """Features relu, a divisor of at least 100, times `temperature` `[heads]` (`head_dim ** -0.5` if None). Paper: The
    Linear Attention Resurrection in Vision Transformer."""
    q, k = F.relu(_wide(q)), F.relu(_wide(k))
    out = _mix(q, k, v) / _dot(q, _mean(k)).clamp(min=100.0 / _tokens(k))
    if temperature is None:
        return (out * q.shape[-1] ** -0.5).to(v.dtype)
    return (out * temperature.view(-1, 1)).to(v.dtype)


@register_notrace_function
def flow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as a flow network that conserves what enters and leaves each token. Paper: Flowformer: Linearizing
    Transformers with Conservation Flows."""
    q, k = _wide(q).sigmoid(), _wide(k).sigmoid()
    n, m = _tokens(q), _tokens(k)
    # x + e in a product with y is the product with y, and e times the sum of y
    total_q, total_k = _mean(q) * n + 1e-6, _mean(k) * m + 1e-6
    incoming = 1 / (_dot(q, total_k) + 1e-6 * total_k.sum(-1, keepdim=True) + 1e-6)
    outgoing = 1 / (_dot(k, total_q) + 1e-6 * total_q.sum(-1, keepdim=True) + 1e-6)
    given, taken = _mean(outgoing * k) * m + 1e-6, _mean(incoming * q) * n + 1e-6
    conserved_in = _dot(q, given) + 1e-6 * given.sum(-1, keepdim=True) + 1e-6
    conserved_out = (_dot(k, taken) + 1e-6 * taken.sum(-1, keepdim=True) + 1e-6).clamp(-1.0, 1.0)
    compete = (conserved_out.flatten(1, -3).softmax(1) * m).view(conserved_out.shape)
    out = _mix(q, k, _wide(v) * compete)
    return ((conserved_in * (n / m)).sigmoid() * (incoming * m) * out).to(v.dtype)


@register_notrace_function
def lightnet(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Features silu of q, and of k a softmax over the tokens. Paper: You Only Scan Once: Efficient Multi-dimension
    Sequential Modeling with LightNet."""
    weights = _wide(k).flatten(1, -3).softmax(1).view(k.shape)
    return _mix(F.silu(_wide(q)), weights, v, float(_tokens(k))).to(v.dtype)


FORMULAS = {f.__name__: f for f in (elu, relu, mala, rala, inline, l2vit, flow, care, nala, lightnet, gla)}
FORMULAS["slab"] = relu  # what is its own is a table added to k and a convolution of v, in the layer


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str = "elu", **options) -> torch.Tensor:
    """Linear attention of one kind on `[batch, *grid, heads, head_dim]`; returns the same shape, in the dtype of v.

    Time and memory grow linearly with the tokens.

    Args:
        kind: "elu", "relu", "mala", "rala", "inline", "l2vit", "slab", "flow", "care", "nala", "lightnet" or "gla".
        options: of the kind. `turns=axial_turns(q)` adds rotary positions (elu, relu, slab, mala, rala, care, nala);
            `feature` (inline); `temperature` `[heads]` (l2vit); `log_decay` and `log_decay_back`, shaped as k (gla).

    Raises:
        ValueError: an unknown kind.
        TypeError: an option that the kind does not have.

    >>> q, k, v = torch.randn(3, 1, 14, 14, 4, 32)
    >>> linear_attention(q, k, v, kind="mala").shape
    torch.Size([1, 14, 14, 4, 32])
    """
    if kind not in FORMULAS:
        raise ValueError(f"kind {kind!r}; allowed: {', '.join(map(repr, sorted(FORMULAS)))}")
    return FORMULAS[kind](q, k, v, **options)
