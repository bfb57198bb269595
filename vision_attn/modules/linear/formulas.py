"""The formulas of linear attention: each is `q_i (sum_j k_j v_j^T)` with features, divisors and offsets of its own.

q, k, v are `[batch, *grid, heads, head_dim]`; what comes back is on the grid of q, in the dtype of v. Everything in
between is float32 at least; sums over tokens are means, so that numbers do not grow with the map. `turns` are rotary
positions (`axial_turns`); they apply to the products of features, not to divisors. Each is one node of an fx graph, and
scripts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vision_attn.modules.linear.rotary import rotate
from vision_attn.modules.linear.scan import gla


def _own(x: torch.Tensor) -> torch.Tensor:
    """Heads first, `[batch, heads, tokens, dim]`, as products want them, in memory that features may write to."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.flatten(1, -3).transpose(1, 2)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _as_came(out: torch.Tensor, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Tokens of `_own` as those of q and in the dtype of v."""
    return out.transpose(1, 2).unflatten(1, q.shape[1:-2]).to(v.dtype)


def _positive(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 of `_own`, several times faster than F.elu on a CPU."""
    x = _own(x)
    return torch.maximum(x + 1, x.clamp(max=0.0).exp_())


def _mean(x: torch.Tensor) -> torch.Tensor:
    """Over the tokens, `[batch, heads, 1, dim]`."""
    return x.mean(2, keepdim=True)


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum(-1, keepdim=True)


def _apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, divisor: bool) -> torch.Tensor:
    """`scale * q_i` times the mean of `k_j v_j^T`; with `divisor` one channel more, times the mean of `k_j`."""
    state = k.transpose(-1, -2) @ v
    if divisor:
        state = torch.cat([state, k.sum(2).unsqueeze(-1)], -1)
    return q @ state.mul_(scale / k.shape[2])


def _mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 1.0, divisor: bool = False) -> torch.Tensor:
    """`_apply`, whatever autocast says."""
    if torch.jit.is_scripting():
        return _apply(q, k, v, scale, divisor)
    with torch.autocast(q.device.type, enabled=False):
        return _apply(q, k, v, scale, divisor)


def _mix_and_dot(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, turns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_mix`, and `scale * q_i` times the mean of `k_j`, `[batch, heads, tokens, 1]`, which does not turn."""
    if turns is not None:
        turns = turns.flatten(0, 1).transpose(0, 1)
        return _mix(rotate(q, turns), rotate(k, turns), v, scale), _dot(q, _mean(k)) * scale
    out = _mix(q, k, v, scale, True)
    return out[..., :-1], out[..., -1:]


def _normalized(
    f: torch.Tensor, g: torch.Tensor, q: torch.Tensor, v: torch.Tensor, eps: float, turns: torch.Tensor | None
) -> torch.Tensor:
    """`f_i (mean g v^T) / (<f_i, mean g> + eps)` of features f of q and g of the keys, and of q and v as they came."""
    out, divisor = _mix_and_dot(f, g, _own(v), 1.0, turns)
    return _as_came(out / (divisor + eps), q, v)


def _tokens(x: torch.Tensor) -> int:
    count = 1
    for size in x.shape[1:-2]:
        count *= size
    return count


@register_notrace_function
def elu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Features elu + 1, weights that sum to 1. Paper: Transformers are RNNs."""
    return _normalized(_positive(q), _positive(k), q, v, 1e-6 / _tokens(k), turns)


@register_notrace_function
def relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Features relu, weights that sum to 1; a query without a positive feature gives 0."""
    return _normalized(_own(q).relu_(), _own(k).relu_(), q, v, 1e-6 / _tokens(k), turns)


@register_notrace_function
def care(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """As `elu`, with the constant of the divisor added to means. Paper: CARE Transformer."""
    return _normalized(_positive(q), _positive(k), q, v, 1e-6, turns)


@register_notrace_function
def rala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Keys weighted by how well they fit the mean query, which raises the rank. Paper: Breaking the Low-Rank Dilemma of
    Linear Attention."""
    f, g = _positive(q), _positive(k)
    fit = _dot(g, _mean(f)) * q.shape[-1] ** -0.5
    g = g * (fit.softmax(2) * fit.shape[2])
    return _normalized(f, g, q, v, 1e-6, turns)


@register_notrace_function
def nala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Directions raised to a power that grows with the norm of the query, positive and negative parts apart. Paper:
    NaLaFormer: Norm-Aware Linear Attention."""
    f, g = _own(q), _own(k)
    norm = torch.linalg.vector_norm(f, dim=-1, keepdim=True)
    # the power by its logarithm, which takes a third of the time; at 0 it would have no gradient
    raised = f.abs().clamp_(min=1e-36).log_().sub_((norm + 1e-6).log_()).mul_(3 * (0.5 + norm.tanh())).exp_()
    f, g, values = raised.copysign(f), (g * g).mul_(g), _own(v)
    out, divisor = _mix_and_dot(f.clamp(min=0.0), g.clamp(min=0.0), values, 1.0, turns)
    below, below_divisor = _mix_and_dot(f.clamp(max=0.0), g.clamp(max=0.0), values, 1.0, turns)
    return _as_came(out.add_(below) / (divisor + below_divisor + 1e-6), q, v)


@register_notrace_function
def mala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Weights that keep what the norm of the query says, scaled and shifted to sum to 1. Paper: Rectifying Magnitude
    Neglect in Linear Attention."""
    values = _own(v)
    out, z = _mix_and_dot(_positive(q), _positive(k), values, q.shape[-1] ** -0.5, turns)
    return _as_came(torch.addcmul((1 + 1 / (z + 1e-6)) * out, z, _mean(values), value=-1.0), q, v)


@register_notrace_function
def inline(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature: str = "identity") -> torch.Tensor:
    """Weights that sum to 1 by subtraction and may be negative; feature "identity", "relu", "leaky_relu" or "exp"
    (of a fifth). Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention."""
    f, g, values, scale = _own(q), _own(k), _own(v), q.shape[-1] ** -0.5
    if feature == "relu":
        f, g = f.relu_(), g.relu_()
    elif feature == "leaky_relu":
        f, g = F.leaky_relu(f), F.leaky_relu(g)
    elif feature == "exp":
        f, g = (0.2 * f).exp(), (0.2 * g).exp()
    elif feature != "identity":
        raise ValueError(f"feature '{feature}'; allowed: 'identity', 'relu', 'leaky_relu', 'exp'")
    # scale f_i (mean g v^T) + (1 - scale <f_i, mean g>) mean v, with g minus its mean
    return _as_came(_mix(f, g - _mean(g), values, scale).add_(_mean(values)), q, v)


@register_notrace_function
def l2vit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, temperature: torch.Tensor | None = None) -> torch.Tensor:
    """Features relu, a divisor of at least 100, times `temperature` `[heads]` (`head_dim ** -0.5` if None). Paper: The
    Linear Attention Resurrection in Vision Transformer."""
    out, divisor = _mix_and_dot(_own(q).relu_(), _own(k).relu_(), _own(v), 1.0)
    out = out / divisor.clamp(min=100.0 / _tokens(k))
    if temperature is None:
        return _as_came(out * q.shape[-1] ** -0.5, q, v)
    return _as_came(out * temperature.view(-1, 1, 1), q, v)


@register_notrace_function
def flow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as a flow network that conserves what enters and leaves each token. Paper: Flowformer: Linearizing
    Transformers with Conservation Flows."""
    if torch.jit.is_scripting():
        return _as_came(_flow(_own(q).sigmoid_(), _own(k).sigmoid_(), _own(v)), q, v)
    with torch.autocast(q.device.type, enabled=False):
        return _as_came(_flow(_own(q).sigmoid_(), _own(k).sigmoid_(), _own(v)), q, v)


def _flow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`flow` of features; sums over channels and over tokens are products, which make no products of their terms."""
    n, m = q.shape[2], k.shape[2]
    # x + e in a product with y is the product with y, and e times the sum of y
    total_q, total_k = q.sum(2).unsqueeze(-1) + 1e-6, k.sum(2).unsqueeze(-1) + 1e-6  # [batch, heads, dim, 1]
    incoming = 1 / (q @ total_k + (1e-6 * total_k.sum(2, keepdim=True) + 1e-6))
    outgoing = 1 / (k @ total_q + (1e-6 * total_q.sum(2, keepdim=True) + 1e-6))
    given, taken = k.transpose(-1, -2) @ outgoing + 1e-6, q.transpose(-1, -2) @ incoming + 1e-6
    conserved_in = q @ given + (1e-6 * given.sum(2, keepdim=True) + 1e-6)
    conserved_out = (k @ taken + (1e-6 * taken.sum(2, keepdim=True) + 1e-6)).clamp(-1.0, 1.0)
    out = _apply(q, k, v * (conserved_out.softmax(2) * m), 1.0, False)
    return (conserved_in * (n / m)).sigmoid() * (incoming * m) * out


@register_notrace_function
def lightnet(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Features silu of q, and of k a softmax over the tokens. Paper: You Only Scan Once: Efficient Multi-dimension
    Sequential Modeling with LightNet."""
    return _as_came(_mix(F.silu(_own(q)), _own(k).softmax(2), _own(v), float(_tokens(k))), q, v)


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
