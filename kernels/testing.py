"""Random attention problems and error budgets, for testing a backend against the reference in float64.

Ships with the package so that a backend outside it can test itself: `for seed in range(500):
    Case(seed).compare("mine")`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from typing import Any

import torch

from .attend import attend
from .backends import refuse
from .patterns import (
    BlockList,
    Circle,
    Dense,
    Halo,
    LengthDecay,
    Neighborhood,
    Pattern,
    PowerStep,
    Radial,
    SlidingTile,
    Streaming,
    Window,
)
from .problem import describe

# A backend may be this much worse than plain attention in the same dtype, which sums in another order.
FACTOR = 8

_DTYPES = (torch.float64, torch.float64, torch.float32, torch.float32, torch.float16, torch.bfloat16)


def random_pattern(pick: random.Random) -> tuple[Pattern, tuple[int, ...]]:
    """A pattern and a grid it fits: tiny, prime and one-wide extents, even and odd windows, everything per axis."""
    rank = pick.choice((1, 2, 3))
    sizes = {1: (1, 2, 3, 17, 41, 97), 2: (1, 2, 3, 5, 7, 8, 11, 13), 3: (1, 2, 3, 5, 7)}[rank]
    grid = tuple(pick.choice(sizes) for _ in range(rank))
    kinds = (Dense, Window, SlidingTile, Radial, BlockList, Halo, Circle, LengthDecay, PowerStep, Streaming)
    kind = pick.choice(kinds + (Neighborhood,) * 6 + (Radial, BlockList))
    if kind is Neighborhood:
        return random_neighborhood(pick, grid), grid
    if kind is Window:
        size = tuple(pick.randint(1, n) for n in grid)
        return Window(size, tuple(pick.randint(0, s - 1) for s in size)), grid
    if kind is SlidingTile:
        return SlidingTile(tuple(pick.randint(1, n) for n in grid), tuple(pick.randint(1, 4) for _ in grid)), grid
    if kind is BlockList:
        block = pick.choice((1, 2, 5, 16)), pick.choice((1, 3, 7, 16))
        seen = torch.rand([-(-math.prod(grid) // b) for b in block], generator=_generator(pick)) < pick.random()
        return BlockList.from_mask(seen, block, random_neighborhood(pick, grid) if pick.random() < 0.5 else None), grid
    if kind is Dense:
        return Dense(), grid
    if kind is Halo:
        return Halo(tuple(pick.randint(1, n) for n in grid), tuple(pick.randint(0, 3) for _ in grid)), grid
    if kind is PowerStep:
        return PowerStep(pick.randint(1, 9), pick.randint(1, 9), pick.randint(0, 5), pick.random() < 0.5), grid
    if kind is Streaming:
        return Streaming(pick.randint(1, 20), pick.randint(0, 9)), grid
    grid = grid if rank > 1 else (min(grid[0], 9), 5)  # the others have no meaning on one axis
    if kind is Circle:
        pooled = pick.choice((None, None, *(f for f in (2, 3) if not any(n % f for n in grid[-2:]))))
        return Circle(pick.randint(1, 6), pooled), grid
    if kind is LengthDecay:
        near, far = sorted((pick.random(), pick.random()), reverse=True)
        shape = pick.choice(("constant", "linear", "parabolic"))
        options = dict(period=pick.choice((None, 2.5)), gamma=pick.choice((0.25, 1)), shape=shape)
        options |= dict(first_frame=pick.random() < 0.5, center_keys=pick.random() < 0.5)
        return LengthDecay(pick.randint(1, 4), near if shape == "constant" else (near, far), **options), grid
    options = dict(decay=pick.choice((0.2, 0.5, 1.0)), sink=pick.random() < 0.5, thin=pick.choice((0, 1, 4, 8, 128)))
    return Radial(block=pick.choice((1, 2, 4, 8)), rule="token", **options), grid


def random_neighborhood(pick: random.Random, grid: tuple[int, ...]) -> Neighborhood:
    dilation = tuple(pick.randint(1, min(n, 3)) for n in grid)
    window = tuple(pick.randint(1, n // d) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(pick.randint(1, w) for w in window)
    return Neighborhood(window, stride, dilation, tuple(pick.random() < 0.25 for _ in grid))


def _generator(pick: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(pick.getrandbits(32))


@dataclasses.dataclass(frozen=True)
class Case:
    """One random problem: pattern, sizes, dtype, strides of the inputs, extra tokens and what is asked, all from a
    seed."""

    seed: int

    @functools.cached_property
    def parts(self) -> dict[str, Any]:
        pick = random.Random(self.seed)
        pattern, grid = random_pattern(pick)
        batch, kv_heads, group = pick.choice((1, 2, 3)), pick.choice((1, 2)), pick.choice((1, 1, 2, 3))
        head_dim = pick.choice((8, 16, 32, pick.randint(4, 40)))
        value_dim = pick.choice((head_dim, head_dim, pick.randint(1, 20)))
        dtype, generator = pick.choice(_DTYPES), _generator(pick)

        def leaf(heads: int, dim: int, *middle: int) -> tuple[torch.Tensor, str]:
            """A leaf, and how to view it as `[batch, *middle, heads, dim]`: as it is, from heads-first, sliced, or
            expanded."""
            view = pick.choice(("plain", "plain", "heads-first", "sliced", "expanded"))
            shape = {
                "heads-first": (batch, heads, *middle, dim),
                "sliced": (batch, *middle, heads, 2 * dim),
                "expanded": (1, *middle, heads, dim),
            }.get(view, (batch, *middle, heads, dim))
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), view

        leaves = [
            leaf(kv_heads * group, head_dim, *grid),
            leaf(kv_heads, head_dim, *grid),
            leaf(kv_heads, value_dim, *grid),
        ]
        extra = pick.choice((0, 0, 1, 5))
        if extra:
            leaves += [leaf(kv_heads, head_dim, extra), leaf(kv_heads, value_dim, extra)]
        shape = pattern.bias_shape(grid, kv_heads * group)
        biased = shape is not None and pick.random() < 0.3
        if biased:
            leaves.append((torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), "plain"))
        visible = torch.rand(batch, extra, generator=generator) < 0.6 if extra and pick.random() < 0.5 else None
        shape = (batch, *grid, kv_heads * group)
        weights = [
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((*shape, value_dim), shape)
        ]
        options = {"scale": pick.choice((None, 0.3)), "extra_mask": visible, "return_lse": pick.random() < 0.5}
        parts = dict(pattern=pattern, batch=batch, leaves=leaves, weights=weights, options=options)
        return parts | dict(dtype=dtype, biased=biased)

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Leaves that require gradients, and the arguments of `attend` made from them."""
        parts, views, leaves = self.parts, [], []
        for tensor, view in parts["leaves"]:
            leaf = tensor.to(dtype or parts["dtype"], copy=True).requires_grad_()
            leaves.append(leaf)
            view = {
                "heads-first": lambda t: t.movedim(1, -2),
                "sliced": lambda t: t[..., ::2],
                "expanded": lambda t: t.expand(parts["batch"], *t.shape[1:]),
            }.get(view, lambda t: t)
            views.append(view(leaf))
        call = dict(zip("qkv", views, strict=False)) | {"pattern": parts["pattern"]} | parts["options"]
        bias = views.pop() if parts["biased"] else None
        return leaves, call | {"extra_kv": tuple(views[3:]) or None, "bias": bias}

    def run(self, function, dtype: torch.dtype | None = None, grad: bool = True) -> list[torch.Tensor]:
        """Output, lse if asked for, and the gradient of every leaf for fixed random weights on both."""
        leaves, call = self.inputs(dtype)
        with torch.set_grad_enabled(grad):
            result = function(**call)
        outputs = list(result) if call["return_lse"] else [result]
        if not grad:
            return outputs
        finite = [t.masked_fill(t.isinf(), 0) for t in outputs]
        loss = sum((t * w.to(t)).sum() for t, w in zip(finite, self.parts["weights"], strict=False))
        return outputs + list(torch.autograd.grad(loss, leaves))

    @functools.cached_property
    def truth(self) -> list[torch.Tensor]:
        return self.run(functools.partial(attend, backend="reference"), torch.float64)

    @functools.cached_property
    def budgets(self) -> list[float]:
        """For every tensor of `run`: FACTOR times the error of plain attention in the dtype of the case.

        Never below the rounding of the largest number of the case: gradients that cancel to zero are sums of such
            numbers, and of sums over channels, which are float32 at least. That of a bias is a sum over all queries.
        """
        eps, top, plain = torch.finfo(self.parts["dtype"]).eps, max(map(largest, self.truth)), self.run(plain_attention)
        wide, out = min(eps, torch.finfo(torch.float32).eps), self.truth[0]
        sums = (out.masked_fill(out.isinf(), 0) * self.parts["weights"][0].to(out)).sum(-1)
        gradients = len(self.parts["leaves"])
        least = [eps * top] * (len(plain) - gradients) + [eps * top + wide * largest(sums)] * gradients
        if self.parts["biased"]:
            least[-1] += wide * top * math.sqrt(math.prod(out.shape[:-2]))
        errors = map(error, plain, self.truth)
        return [FACTOR * max(pair) for pair in zip(errors, least, strict=True)]

    def refusals(self, backend: str, grad: bool) -> list[str]:
        """Why `backend` cannot do this case."""
        _, call = self.inputs()
        with torch.set_grad_enabled(grad):
            return refuse(backend, describe(**prepared(**call)))

    def compare(self, backend: str) -> int:
        """Compare a backend with the truth, with gradients if it has them; raises AssertionError, returns the tensors
        compared."""
        grad = not self.refusals(backend, grad=True)
        if not grad and self.refusals(backend, grad=False):
            return 0
        results = self.run(functools.partial(attend, backend=backend), grad=grad)
        for i, got in enumerate(results):
            worst = error(got, self.truth[i])
            if not worst <= self.budgets[i]:
                raise AssertionError(
                    f"{backend}, seed {self.seed}: tensor {i} is off by {worst:.3g}, "
                    f"allowed {self.budgets[i]:.3g}; {self.parts}"
                )
        return len(results)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference; infinities must be in the same places, NaN is infinitely wrong."""
    if got.shape != want.shape or not torch.equal(got.isinf(), want.isinf()):
        return math.inf
    return (
        (got.double() - want).masked_fill(want.isinf(), 0).abs().nan_to_num(nan=math.inf).amax().item()
        if got.numel()
        else 0.0
    )


def largest(tensor: torch.Tensor) -> float:
    return tensor.masked_fill(tensor.isinf(), 0).abs().amax().item() if tensor.numel() else 0.0


def prepared(k, v, pattern, extra_kv, extra_mask, **rest) -> dict[str, Any]:
    """The arguments of a call after what the pattern does to keys and values."""
    k, v, extra_kv, extra_mask = pattern.prepare(k, v, extra_kv, extra_mask)
    return dict(k=k, v=v, pattern=pattern, extra_kv=extra_kv, extra_mask=extra_mask, **rest)


def plain_attention(**call):
    """What one would write without this package: everything in the dtype of the inputs, a dense mask, a softmax."""
    call = prepared(**call)
    q, k, v, pattern, extra_kv, extra_mask = (call[n] for n in ("q", "k", "v", "pattern", "extra_kv", "extra_mask"))
    grid, scale = tuple(q.shape[1:-2]), q.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
    tokens, group = math.prod(grid), q.shape[-2] // k.shape[-2]
    mask = pattern.mask(grid)  # [tokens, tokens], for block lists with heads, or batch and heads, in front
    mask = mask[(None,) * (4 - mask.ndim)].expand(q.shape[0], -1, -1, -1)
    key, value = k.flatten(1, -3), v.flatten(1, -3)
    if extra_kv is not None:
        key, value = torch.cat([key, extra_kv[0]], 1), torch.cat([value, extra_kv[1]], 1)
        visible = mask.new_ones(extra_kv[0].shape[:2]) if extra_mask is None else extra_mask
        visible = visible[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = torch.cat([mask, visible], -1)
    key, value = (t.repeat_interleave(group, 2).movedim(2, 1) for t in (key, value))
    scores = (q.flatten(1, -3).movedim(2, 1) * scale) @ key.transpose(-1, -2)
    on_grid, off_grid = scores[..., :tokens], scores[..., tokens:]
    rule, token = pattern.score_rule(grid), torch.arange(tokens)
    on_grid = on_grid if rule is None else rule(on_grid, token[:, None], token)
    on_grid = on_grid if call["bias"] is None else on_grid + pattern.spread_bias(call["bias"], grid)
    scores = torch.cat([on_grid, off_grid], -1)
    some = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & some, float("-inf"))
    out = (scores.softmax(-1) @ value) * some
    lse = scores.logsumexp(-1).masked_fill(~some.squeeze(-1), float("-inf"))
    out, lse = out.movedim(1, 2).reshape(*q.shape[:-1], -1), lse.movedim(1, 2).reshape(q.shape[:-1])
    return (out, lse) if call["return_lse"] else out
