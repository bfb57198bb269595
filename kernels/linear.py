"""Linear attention: a product with the mean of `k v^T`, and a scan that forgets by gates.

Both keep their sums in float32 at least, and divide by the number of tokens before they multiply, so that half
precision neither overflows nor loses what it adds up, however many tokens there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .native import scan as native
from .problem import DTYPES

CHUNK = 32  # tokens that are paired directly; what comes before reaches them as a state
SEGMENT_BYTES = 8 * 2**20  # of chunks at a time; the backward computes them again


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention without a softmax, in time linear in the tokens: `scale * q_i M / (<q_i, m> + eps)`, where M is the
    mean over the keys of `k_j v_j^T` and m the mean of `k_j`.

    q and k are what the feature map made of them. A formula with sums instead of means is this one with `eps / N` for N
    keys, or without `normalize` with `scale=N`. A formula that has more to it (other features in the divisor, a mean
    value added) takes `normalize=False` and `token_mean`, on tensors widened to float32 and narrowed at the end.

    Args:
        q: `[batch, *grid, heads, dim]`.
        k: `[batch, *keys, heads, dim]`, on the grid of q or another.
        v: `[batch, *keys, heads, value_dim]`.
        normalize: divide by `<q_i, m> + eps`. The features should then not be negative.
        eps: added to the divisor.
        scale: factor on the result.
        key_mask: bool `[batch, *keys]`, True where the key counts; for padding. With none left the result is 0.

    Returns:
        `[batch, *grid, heads, value_dim]` in the dtype of q, computed in float32 at least.

    Raises:
        TypeError, ValueError: arguments that do not fit together; the message says what is allowed.

    >>> q, k, v = torch.rand(3, 1, 16, 16, 4, 32)
    >>> linear_attention(q, k, v).shape
    torch.Size([1, 16, 16, 4, 32])

    Paper: Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention.
    """
    _check(("q", q), ("k", k), ("v", v))
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must have the same tokens and heads; got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(f"q and k must have equal batch, heads and dim; got {list(q.shape)} and {list(k.shape)}")
    full = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        query = q.flatten(1, -3).to(full)
        key, value = _shared_out(k, full, key_mask), v.flatten(1, -3).to(full)
        if key_mask is not None:  # 0 times NaN is NaN
            value = value.masked_fill(~key_mask.flatten(1)[..., None, None], 0)
        out = torch.einsum("bnhd,bhde->bnhe", query, torch.einsum("bmhd,bmhe->bhde", key, value))
        if normalize:
            out = out / (torch.einsum("bnhd,bhd->bnh", query, key.sum(1)) + eps)[..., None]
        return (out * scale).view(*q.shape[:-1], v.shape[-1]).to(q.dtype)


def token_mean(x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens, in float32 at least: what formulas around `linear_attention` are made of.

    Args:
        x: `[batch, *grid, heads, dim]`.
        key_mask: bool `[batch, *grid]`, True where the token counts. With none left the mean is 0.

    Returns:
        `[batch, *(1 for each grid axis), heads, dim]`, which broadcasts against tensors of the tokens.

    >>> x = torch.arange(4.0).view(1, 4, 1, 1)
    >>> token_mean(x, torch.tensor([[True, True, False, False]]))
    tensor([[[[0.5000]]]])
    """
    _check(("x", x))
    mean = _shared_out(x, torch.promote_types(x.dtype, torch.float32), key_mask).sum(1)
    return mean.view(len(x), *(1,) * (x.ndim - 3), *x.shape[-2:])


def _shared_out(x: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """`[batch, tokens, heads, dim]` such that the sum over the tokens is their mean."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("key_mask must be a bool tensor, True where the key counts")
        if mask.shape != x.shape[:-2] or mask.device != x.device:
            raise ValueError(
                f"key_mask must be {list(x.shape[:-2])} on {x.device}; got {list(mask.shape)} on {mask.device}"
            )
    x = x.flatten(1, -3).to(dtype)
    if mask is None:
        return x / x.shape[1]
    mask = mask.flatten(1)[..., None, None]
    return x.masked_fill(~mask, 0) / mask.sum(1, keepdim=True).clamp(min=1)


def gated_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float | None = None, reverse: bool = False
) -> Tensor:
    """Gated linear attention along the tokens: the state `h_t = exp(log_decay_t) h_(t-1) + k_t v_t^T` is read by
    `scale * q_t h_t`.

    On a CPU it is computed in C++ where no gradients are needed; if there is no kernel, `explain` says why at `cpu`.

    Args:
        q: `[batch, *grid, heads, key_dim]`; the tokens of a grid are scanned row-major.
        k: as q.
        v: `[batch, *grid, heads, value_dim]`.
        log_decay: natural logarithm of the gates, shaped as k, in any of the dtypes; at most 0, and minus infinity
            forgets everything that is finite. In half precision a logarithm tells gates near 1 apart, which the gates
            would not.
        scale: factor on the result; `key_dim ** -0.5` when None.
        reverse: from the last token to the first.

    Returns:
        `[batch, *grid, heads, value_dim]` in the dtype of q; gates, states and sums are float32 at least.

    Raises:
        TypeError, ValueError: arguments that do not fit together; the message says what is allowed.

    >>> k = v = torch.ones(1, 4, 1, 1)
    >>> gated_scan(k, k, v, torch.full_like(k, 0.5).log()).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]

    Paper: Gated Linear Attention Transformers with Hardware-Efficient Training.
    """
    scale = _scale(q, k, v, log_decay, scale)
    ahead, back = (None, log_decay) if reverse else (log_decay, None)
    out = native.scan(q, k, v, ahead, back, scale)
    if out is None:
        out = _scan(q, k, v, log_decay, scale, reverse)
    return out.to(q.dtype)


def gated_scan_both(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_decay_back: Tensor, *, scale: float | None = None
) -> Tensor:
    """Mean of `gated_scan` forwards with `log_decay` and backwards with `log_decay_back`; every token is in both.

    >>> k = v = torch.ones(1, 4, 1, 1)
    >>> gated_scan_both(k, k, v, torch.zeros_like(k), torch.full_like(k, -torch.inf)).flatten().tolist()
    [1.0, 1.5, 2.0, 2.5]

    Paper: ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention.
    """
    scale = _scale(q, k, v, log_decay, _scale(q, k, v, log_decay_back, scale))
    out = native.scan(q, k, v, log_decay, log_decay_back, scale / 2)
    if out is None:
        out = (_scan(q, k, v, log_decay, scale, False) + _scan(q, k, v, log_decay_back, scale, True)) / 2
    return out.to(q.dtype)


def _scale(q, k, v, log_decay, scale) -> float:
    """The factor on the result of a scan, whose arguments are checked."""
    _check(("q", q), ("k", k), ("v", v), ("log_decay", log_decay), alike=3)
    if not q.shape == k.shape == log_decay.shape or q.shape[:-1] != v.shape[:-1]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, log_decay, v))
        raise ValueError(f"q, k, log_decay must have one shape, and v all of it but the last size; got {shapes}")
    return q.shape[-1] ** -0.5 if scale is None else scale


def _scan(q, k, v, log_decay, scale, reverse) -> Tensor:
    """`gated_scan` of checked arguments, before it is rounded to the dtype of q."""
    inputs = [t.flatten(1, -3) for t in (q, k, v, log_decay)]
    full = torch.promote_types(q.dtype, torch.float32)
    (batch, tokens, heads, dim), value_dim = inputs[0].shape, v.shape[-1]
    state = torch.zeros(batch, heads, dim, value_dim, dtype=full, device=q.device)
    chunk = min(CHUNK, 2 ** (tokens - 1).bit_length())
    again = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    # split and not slices: the gradient of a slice is as large as the whole
    length = _length(batch * heads, dim, value_dim, chunk)
    parts = list(zip(*(t.split(length, 1) for t in inputs), strict=True))
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for part in parts[::-1] if reverse else parts:
            if again:
                options = dict(use_reentrant=False, preserve_rng_state=False)
                out, state = checkpoint(_segment, state, *part, chunk, reverse, **options)
            else:
                out, state = _segment(state, *part, chunk, reverse)
            outs.append(out)
        out = torch.cat(outs[::-1] if reverse else outs, 1)
        return (out * scale).view(*q.shape[:-1], value_dim)


def _length(rows: int, dim: int, value_dim: int, chunk: int) -> int:
    """Tokens per segment: whole chunks."""
    floats = chunk * (8 * dim + 4 * value_dim) + 2 * dim * value_dim
    return chunk * max(SEGMENT_BYTES // (4 * max(rows, 1) * floats), 1)


def _segment(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int, reverse: bool):
    """Tokens `[batch, tokens, heads, dim]` after `state` `[batch, heads, key_dim, value_dim]`: what they read, and the
    state they leave.

    Gates are multiplied and never divided, so that nothing overflows and a gate may be 0. Two tokens of a chunk meet
    where it is halved between them: the query's gates back to the middle and the key's gates up to it are two products,
    and all such pairs one product of matrices.
    """
    tokens, full = q.shape[1], state.dtype
    short = -tokens % chunk

    def chunks(x):  # [batch, heads, chunks, chunk, dim]
        x = F.pad((x.flip(1) if reverse else x).to(full), (0, 0, 0, 0, 0, short))
        return x.transpose(1, 2).unflatten(2, (-1, chunk))

    q, k, v, gate = chunks(q), chunks(k), chunks(v), chunks(log_decay).exp()
    # per block of `size` tokens: gates of each token and those before it, gates of those after it, what pairs give
    before, after = gate.unflatten(3, (-1, 1)), torch.ones_like(gate).unflatten(3, (-1, 1))
    out, size = ((q * k).sum(-1, keepdim=True) * v).unflatten(3, (-1, 1)), 1
    while size < chunk:
        (_, qr), (kl, _), (vl, _) = (x.unflatten(3, (-1, 2, size)).unbind(4) for x in (q, k, v))
        (before_l, before_r), (after_l, after_r), (out_l, out_r) = (
            x.unflatten(3, (-1, 2)).unbind(4) for x in (before, after, out)
        )
        out_r = out_r + (qr * before_r) @ (kl * after_l).mT @ vl
        out = torch.cat([out_l, out_r], 4)
        after = torch.cat([after_l * before_r[..., -1:, :], after_r], 4)
        before = torch.cat([before_l, before_r * before_l[..., -1:, :]], 4)
        size *= 2
    before, after = before.squeeze(3), after.squeeze(3)
    added, kept, states = (k * after).mT @ v, before[..., -1, :, None], []
    for i in range(q.shape[2]):
        states.append(state)
        state = kept[:, :, i] * state + added[:, :, i]
    out = out.squeeze(3) + (q * before) @ torch.stack(states, 2)
    out = out.flatten(2, 3)[:, :, :tokens].transpose(1, 2)
    return out.flip(1) if reverse else out, state


def _check(*tensors: tuple[str, Tensor], alike: int = 3) -> None:
    """Tensors `[batch, *grid, heads, dim]` on one device, the first `alike` of one dtype."""
    name, first = tensors[0]
    for i, (other, tensor) in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{other} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{other} is {tensor.dtype}; allowed: {', '.join(map(str, DTYPES))}")
        if tensor.dtype != first.dtype and i < alike:
            raise TypeError(f"{other} is {tensor.dtype} but {name} is {first.dtype}; cast them to one dtype")
        if tensor.device != first.device:
            raise ValueError(f"{other} is on {tensor.device} but {name} is on {first.device}; move them to one device")
        if tensor.ndim < 4:
            raise ValueError(f"{other} must be [batch, *grid, heads, dim]; got {list(tensor.shape)}")
        if 0 in tensor.shape[1:-2]:
            raise ValueError(f"{other} has no tokens; got {list(tensor.shape)}")
