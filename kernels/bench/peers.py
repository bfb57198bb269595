"""Who is timed: dense attention of torch, compiled FlexAttention, natten, and the backends of this package.

A peer takes and returns heads-last tensors on the grid, so every permutation and copy it needs is inside its time.
What depends on the pattern alone (block masks, compiling) is made before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..attend import attend
from ..backends import BACKENDS, refuse
from ..patterns import Dense, Pattern, Separable
from ..patterns.base import Predicate
from ..patterns.blocks import lists_from_map
from ..problem import Problem

Forward = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]
MOST_DENSE_FLOPS = 3e11  # on a CPU; some seconds
MOST_SCORES = 2**24  # of attention that computes and keeps them all on a CPU: natten, sdpa-math
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Peer:
    """`limits(problem)` says why not; `make(problem, device)` returns `forward(q, k, v) -> (out, lse or None)`.

    `dense`: it attends to everything, whatever the pattern, and is checked against that. `compiles`: the first call
    takes long.
    """

    limits: Callable[[Problem], list[str]]
    make: Callable[[Problem, torch.device], Forward]
    dense: bool = False
    compiles: bool = False


def peers() -> dict[str, Peer]:
    """Every peer by name: dense attention first, then the others, then the backends of this package."""
    found = {"sdpa": Peer(_dense_limits(None), functools.partial(_sdpa, None), dense=True)}
    for name, backend in SDPA.items():
        found[name] = Peer(_dense_limits(name), functools.partial(_sdpa, backend), dense=True)
    found["flex-rows"] = Peer(_flex_limits, _flex_rows, compiles=True)
    for name in BACKENDS:
        if name != "reference":
            limits = functools.partial(_backend_limits, name)
            found[name] = Peer(limits, functools.partial(_backend, name), compiles=name == "flex")
    return found


def default_peers(device: str) -> list[str]:
    """The peers that are timed unless others are named."""
    dense = ["sdpa-cudnn", "sdpa-flash"] if device == "cuda" else ["sdpa"]
    return dense + [name for name in peers() if not name.startswith("sdpa")]


SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def _dense_limits(name: str | None) -> Callable[[Problem], list[str]]:
    def limits(problem: Problem) -> list[str]:
        reasons = []
        flops = 4.0 * problem.tokens**2 * problem.head_dim * problem.heads * problem.batch
        if problem.device == "cpu" and flops > MOST_DENSE_FLOPS:
            reasons.append(f"{flops / 1e12:.2g} TFLOP of dense attention take long on a CPU")
        if problem.device == "cpu" and name in ("sdpa-cudnn", "sdpa-efficient"):
            reasons.append("CUDA only")
        if problem.device == "cpu" and name == "sdpa-math" and problem.tokens**2 * problem.heads > MOST_SCORES:
            reasons.append("keeps tokens x tokens scores")
        return reasons

    return limits


def _sdpa(backend: SDPBackend | None, problem: Problem, device: torch.device) -> Forward:
    def forward(q, k, v):
        query, key, value = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
        if backend is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).reshape(q.shape), None

    return forward


def _backend_limits(name: str, problem: Problem) -> list[str]:
    reasons = refuse(name, problem)
    if name == "natten" and problem.device == "cpu" and problem.tokens**2 * problem.heads * problem.batch > MOST_SCORES:
        reasons.append("on a CPU it keeps tokens x tokens scores, too many here")
    return reasons


def _backend(name: str, problem: Problem, device: torch.device) -> Forward:
    def forward(q, k, v):
        result = attend(q, k, v, problem.pattern, return_lse=problem.return_lse, backend=name)
        return result if problem.return_lse else (result, None)

    return forward


def _flex_limits(problem: Problem) -> list[str]:
    reasons = refuse("flex", dataclasses.replace(problem, pattern=Dense()))  # blocks are made to fit any pattern
    if problem.pattern.score_rule(problem.grid) is not None:
        reasons.append("no score rule")
    return reasons


def _flex_rows(problem: Problem, device: torch.device) -> Forward:
    """FlexAttention as one would write it: tokens in row-major order, a block mask of the pattern, compiled."""
    mask = block_mask(problem, device)

    def call(query, key, value, mask):
        return flex_attention(query, key, value, block_mask=mask)

    # a code object of its own: torch stops compiling a function after some shapes
    own = call.__code__.replace(co_name=f"flex_rows_{next(_count)}")
    compiled = torch.compile(types.FunctionType(own, globals()), dynamic=False)

    def forward(q, k, v):
        out = compiled(*(t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)), mask)
        return out.transpose(1, 2).reshape(q.shape), None

    return forward


def block_mask(problem: Problem, device: torch.device) -> BlockMask:
    """The block mask of a pattern on row-major tokens, made row by row of blocks."""
    tokens, blocks = problem.tokens, -(-problem.tokens // BLOCK)
    allowed = _by_token(problem.pattern, problem.grid, device)
    visited, full = (torch.zeros(blocks, blocks, dtype=torch.bool, device=device) for _ in range(2))
    key = torch.arange(blocks * BLOCK, device=device)
    for row in range(blocks):
        query = torch.arange(row * BLOCK, min((row + 1) * BLOCK, tokens), device=device)
        seen = allowed(query[:, None], key.clamp(max=tokens - 1)) & (key < tokens)
        seen = seen.view(len(query), blocks, BLOCK)
        visited[row], full[row] = seen.any(-1).any(0), seen.all(-1).all(0) & (len(query) == BLOCK)
    partial, full = (lists_from_map((BLOCK, BLOCK), part) for part in (visited & ~full, full))
    tensors = [t[None, None] for t in (partial.count, partial.index, full.count, full.index)]

    def mask_mod(batch, head, query, key):
        return allowed(query.clamp(max=tokens - 1), key.clamp(max=tokens - 1)) & (key < tokens)

    lengths = (tokens, tokens)
    return BlockMask.from_kv_blocks(*tensors, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod, seq_lengths=lengths)


_count = iter(range(10**9))


def _by_token(pattern: Pattern, grid: tuple[int, ...], device: torch.device) -> Predicate:
    """The predicate of a pattern; of a product over the axes from tables by token, the fastest of four ways to write it
    on a CPU."""
    if not isinstance(pattern, Separable) or pattern.inside(grid) is not None:
        return pattern.predicate(grid, device)
    tables, token = [], torch.arange(math.prod(grid))
    for index, axis in enumerate(pattern.axes(grid)):
        x = token // math.prod(grid[index + 1 :]) % axis.extent
        place = torch.tensor(axis.places)[x]
        rows = (torch.tensor(axis.lo)[place], torch.tensor(axis.hi)[place], place)
        tables.append([row.to(device, torch.int32) for row in rows])

    def allowed(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        tests = [(lo[query] <= place[key]) & (place[key] < hi[query]) for lo, hi, place in tables]
        return functools.reduce(torch.logical_and, tests)

    return allowed
