"""Is a result right? Some rows of the output, or whole heads with their gradients, against float64."""

from __future__ import annotations

import dataclasses
import random

import torch

from ..patterns import Dense
from ..problem import Problem
from ..testing import FACTOR, error, largest

ROWS, HEADS = 64, 3
CHUNK = 2**24  # scores at a time


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is looked at, and what it must be: per (batch entry, head) the tensors of `_slice`, with how far off each
    may be.

    `rows` are query tokens; None all of them, which gradients of keys need.
    """

    heads: tuple[tuple[int, int], ...]
    rows: torch.Tensor | None
    truth: tuple[list[torch.Tensor], ...]
    budgets: tuple[list[float], ...]

    def compare(self, outputs: list[torch.Tensor | None]) -> tuple[float, float]:
        """The error that is largest in terms of its budget, and that budget.

        `outputs`: out, lse or None, and the gradients of q, k and v when they are wanted.
        """
        worst = (0.0, 1.0)
        for place, truth, budgets in zip(self.heads, self.truth, self.budgets, strict=True):
            for got, want, budget in zip(self._cut(outputs, *place), truth, budgets, strict=True):
                off = 0.0 if got is None else error(got, want)
                worst = max(worst, (off, budget), key=lambda pair: pair[0] / pair[1])
        return worst

    def _cut(self, outputs: list[torch.Tensor | None], batch: int, head: int) -> list[torch.Tensor | None]:
        """The part of each output that belongs to one head."""
        parts = []
        for index, tensor in enumerate(outputs):
            if tensor is None:
                parts.append(None)
                continue
            part = tensor[batch].flatten(0, -2)[:, head] if index == 1 else tensor[batch].flatten(0, -3)[:, head]
            parts.append(part if self.rows is None else part[self.rows])
        return parts


def sample(problem: Problem, q, k, v, grad: torch.Tensor | None, dense: bool, seed: int = 0) -> Sample:
    """Choose heads and rows of a problem and compute them in float64, of all pairs when `dense`."""
    pick = random.Random(seed)
    places = {(0, 0), (problem.batch - 1, problem.heads - 1)}
    places |= {(pick.randrange(problem.batch), pick.randrange(problem.heads)) for _ in range(HEADS - 2)}
    rows = None
    if not problem.needs_grad:
        some = {0, problem.tokens - 1, *(pick.randrange(problem.tokens) for _ in range(ROWS - 2))}
        rows = torch.tensor(sorted(some), device=q.device)
    pattern = Dense() if dense else problem.pattern
    allowed = pattern.predicate(problem.grid, q.device)
    truths, budgets = [], []
    for batch, head in sorted(places):
        flat = [t[batch].flatten(0, -3)[:, head] for t in (q, k, v)]
        own = None if grad is None else grad[batch].flatten(0, -3)[:, head]
        truth = _slice(allowed, *flat, own, rows, torch.float64)
        plain = _slice(allowed, *flat, own, rows, problem.dtype)
        truths.append(truth)
        # rounding of the largest number is allowed even if plain attention happens to be exact
        eps = torch.finfo(problem.dtype).eps
        budgets.append([max(FACTOR * error(p, t), eps * largest(t)) for p, t in zip(plain, truth, strict=True)])
    return Sample(tuple(sorted(places)), rows, tuple(truths), tuple(budgets))


def _slice(allowed, q, k, v, grad, rows, dtype: torch.dtype) -> list[torch.Tensor]:
    """Attention of one head, `[tokens, dim]`: out and lse of `rows`, and the gradients of q, k and v with `grad`."""
    q, k, v = (t.to(dtype) for t in (q, k, v))
    tokens, scale = len(k), q.shape[-1] ** -0.5
    rows = torch.arange(tokens, device=q.device) if rows is None else rows
    key = torch.arange(tokens, device=q.device)
    parts, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for chunk in rows.split(max(CHUNK // tokens, 1)):
        scores = (q[chunk] @ k.T * scale).masked_fill(
            ~allowed(chunk[:, None], key[None]).expand(len(chunk), -1), -torch.inf
        )
        lse = scores.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1)
        weights = scores.softmax(-1)
        out = weights @ v
        part = [out, lse]
        if grad is not None:
            outer = grad[chunk].to(dtype)
            inner = weights * (outer @ v.T - (outer * out).sum(-1, keepdim=True))
            dv += weights.T @ outer
            dk += scale * inner.T @ q[chunk]
            part.append(scale * inner @ k)
        parts.append(part)
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return joined if grad is None else [*joined, dk, dv]
