"""FlexAttention of torch, compiled once per problem, with block masks built from intervals instead of by testing all
pairs.

Separable patterns run on tokens reordered so that a block of the sequence is a box of the grid; the others keep their
order. Extra tokens stand in front of the keys, padded to whole blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import types

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from ..patterns import Blocked, Dense, Pattern, Separable
from ..patterns.base import Predicate, ScoreRule
from ..patterns.blocks import lists_from_map, map_from_lists
from ..problem import Problem
from ..tiles import aligned_tile, tile_maps

WORTH_COMPILING = 4096  # tokens
# Compiled block lists were right with 2.11 and 2.15 on a CPU, and wrong with 2.6; nothing between was tried.
OLDEST_TORCH = (2, 11)


@functools.cache
def missing(device: str) -> list[str]:
    if torch.__version__ < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return [f"block masks may come out wrong with torch {torch.__version__}; needs torch {oldest} or later"]
    if device == "cuda":
        return [] if torch.cuda.is_available() else ["no CUDA device"]
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return ["compiling for a CPU needs a C++ compiler (c++, g++ or clang++) on the path"]
    return []


def limits(problem: Problem) -> list[str]:
    reasons = []
    if problem.device not in ("cpu", "cuda"):
        reasons.append("only cpu and cuda devices")
    if problem.dtype == torch.float64:
        reasons.append("no float64")
    if problem.device == "cpu" and problem.needs_grad:
        reasons.append("no gradients on a CPU")
    if problem.device == "cpu" and problem.return_lse:
        reasons.append("no lse on a CPU")
    if problem.bias:
        reasons.append("no bias")
    if isinstance(problem.pattern, Blocked) and any(b % 16 for b in problem.pattern.lists(problem.grid).block):
        reasons.append("blocks must be multiples of 16 tokens")
    return reasons


def by_name_only(problem: Problem) -> str | None:
    if problem.device == "cpu":
        return "compiles for up to half a minute, and is then slower than tiled on a CPU"
    if isinstance(problem.pattern, Dense):
        return "tiled calls the ordinary attention, which is as fast and needs no compiling"
    if problem.tokens < WORTH_COMPILING:
        return f"compiles for up to half a minute, which fewer than {WORTH_COMPILING} tokens do not repay"
    return None


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    layout = _layout(problem.pattern, problem.grid, problem.extra, q.device)
    query, key, value = (t.flatten(1, -3) for t in (q, k, v))
    if layout.order is not None:
        query, key, value = (t.index_select(1, layout.order) for t in (query, key, value))
    if extra_kv is not None:
        room = (0, 0, 0, 0, 0, layout.start - problem.extra)
        key, value = (torch.cat([F.pad(e, room), t], 1) for e, t in zip(extra_kv, (key, value), strict=True))
    mask = layout.plain if extra_mask is None else layout.block_mask(extra_mask)
    group = problem.heads != problem.kv_heads
    inputs = (t.transpose(1, 2) for t in (query, key, value))
    out = _compiled(problem, q.device)(*inputs, layout.rule, mask, scale, group, problem.return_lse)
    out, lse = (t.transpose(1, 2) for t in out) if problem.return_lse else (out.transpose(1, 2), None)
    if layout.places is not None:
        out, lse = (None if t is None else t.index_select(1, layout.places) for t in (out, lse))
    return out.reshape(*q.shape[:-1], -1), None if lse is None else lse.reshape(q.shape[:-1])


@functools.lru_cache(maxsize=128)
def _compiled(problem: Problem, device: torch.device):
    """One compiled function per problem.

    Each is a copy of `_call` with a code object, and so a compile cache, of its own: after a few shapes torch stops
    compiling a function, and FlexAttention that is not compiled computes all pairs.
    """
    code = _call.__code__.replace(co_name=f"attend_{_compiled.cache_info().misses}")
    return torch.compile(types.FunctionType(code, globals()), dynamic=False, fullgraph=True)


def _call(query, key, value, rule, block_mask, scale, enable_gqa, return_lse):
    if not return_lse:
        return flex.flex_attention(query, key, value, rule, block_mask, scale, enable_gqa)
    aux = flex.AuxRequest(lse=True)
    out, aux = flex.flex_attention(query, key, value, rule, block_mask, scale, enable_gqa, return_aux=aux)
    return out, aux.lse


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """The order of the grid tokens in the sequence, and which blocks of it see which.

    `order` holds the grid token at each place of the sequence (padding repeats token 0) and `places` the place of each
    grid token; both None when nothing moves. `allowed(query place, key place)` decides inside blocks that are not full.
    `visited` and `full` are bool `[*lead, query blocks, key blocks]`. In front of the keys stand `extra` tokens and
    padding up to `start`. `change` is the score rule of the pattern, of tokens that keep their order.
    """

    order: torch.Tensor | None
    places: torch.Tensor | None
    allowed: Predicate
    visited: torch.Tensor
    full: torch.Tensor
    block: tuple[int, int]
    length: int
    extra: int
    change: ScoreRule | None = None

    @functools.cached_property
    def rule(self):
        """The score rule as FlexAttention wants it; None when scores stay as they are."""
        change, start, last = self.change, self.start, self.length - 1
        if change is None:
            return None

        def score_mod(score, batch, head, query, key):
            changed = change(score, query.clamp(max=last), (key - start).clamp(0, last))
            return torch.where(key < start, score, changed)

        return score_mod

    @property
    def start(self) -> int:
        return -(-self.extra // self.block[1]) * self.block[1]

    @functools.cached_property
    def plain(self) -> BlockMask:
        return self.block_mask(None)

    def block_mask(self, extra_mask: torch.Tensor | None) -> BlockMask:
        allowed, start, extra = self.allowed, self.start, self.extra

        def grid_only(batch, head, query, key):
            return allowed(query, key)

        def with_extra(batch, head, query, key):
            return torch.where(key < start, key < extra, allowed(query, (key - start).clamp(min=0)))

        def with_mask(batch, head, query, key):
            visible = (key < extra) & extra_mask[batch, key.clamp(max=extra - 1)]
            return torch.where(key < start, visible, allowed(query, (key - start).clamp(min=0)))

        count = start // self.block[1]
        whole = extra // self.block[1] if extra_mask is None else 0
        visited = F.pad(self.visited, (count, 0), value=True)
        full = F.pad(F.pad(self.full, (count - whole, 0), value=False), (whole, 0), value=True)
        lead = (1,) * (4 - visited.ndim)
        partial, full = (lists_from_map(self.block, m) for m in (visited & ~full, full))
        tensors = [t.reshape(*lead, *t.shape) for t in (partial.count, partial.index, full.count, full.index)]
        test = grid_only if not extra else with_extra if extra_mask is None else with_mask
        lengths = (self.length, start + self.length)
        return BlockMask.from_kv_blocks(*tensors, BLOCK_SIZE=self.block, mask_mod=test, seq_lengths=lengths)


@functools.lru_cache(maxsize=32)
def _layout(pattern: Pattern, grid: tuple[int, ...], extra: int, device: torch.device) -> _Layout:
    return (_boxes if isinstance(pattern, Separable) else _in_order)(pattern, grid, extra, device)


def _boxes(pattern: Separable, grid: tuple[int, ...], extra: int, device: torch.device) -> _Layout:
    """Each block of the sequence is a box of the grid; axes are padded to whole boxes."""
    size = 64 if device.type == "cpu" else 128
    axes, sides = pattern.axes(grid), aligned_tile(pattern, grid, size)
    counts = [-(-axis.extent // side) for axis, side in zip(axes, sides, strict=True)]
    token, real = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    tables, maps = [], []
    for index, (axis, side, count) in enumerate(zip(axes, sides, counts, strict=True)):
        maps.append(tile_maps(axis, side))
        position = torch.arange(count * side)
        inside, padding = position.clamp(max=axis.extent - 1), position >= axis.extent
        order, lo, hi = (torch.tensor(t)[inside] for t in (axis.order, axis.lo, axis.hi))
        shape = [1] * (2 * len(grid))  # which box along each axis, then where in it along each axis
        shape[index], shape[len(grid) + index] = count, side
        spread = [t.view(shape).expand(*counts, *sides).flatten() for t in (lo, hi, position.masked_fill(padding, -1))]
        tables.append([t.to(device, torch.int32) for t in spread])
        token = token + (order * math.prod(grid[index + 1 :])).view(shape)
        real = real & ~padding.view(shape)
    token, real = token.flatten(), real.flatten()
    at, inside = token.to(device), pattern.inside(grid, device)
    places = torch.empty(math.prod(grid), dtype=torch.long)
    places[token[real]] = real.nonzero().squeeze(1)

    def allowed(query, key):
        tests = [(lo[query] <= position[key]) & (position[key] < hi[query]) for lo, hi, position in tables]
        tests += [] if inside is None else [inside(at[query], at[key])]
        return functools.reduce(torch.logical_and, tests)

    visited, full = (
        functools.reduce(_product, maps_of_one_kind).to(device) for maps_of_one_kind in zip(*maps, strict=True)
    )
    full = full if inside is None else torch.zeros_like(full)
    order = token.where(real, 0).to(device)
    return _Layout(order, places.to(device), allowed, visited, full, (size, size), len(order), extra)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a[:, None, :, None] & b[None, :, None, :]).flatten(2).flatten(0, 1)


def _in_order(pattern: Blocked, grid: tuple[int, ...], extra: int, device: torch.device) -> _Layout:
    """Row-major tokens and the pattern's own blocks."""
    tokens, lists = math.prod(grid), pattern.lists(grid, device)
    blocks = -(-tokens // lists.block[1])
    visited, full = (map_from_lists(lists.index, count, blocks) for count in (lists.count, lists.full_count))
    predicate = pattern.predicate(grid, device)

    def allowed(query, key):
        return predicate(query.clamp(max=tokens - 1), key.clamp(max=tokens - 1)) & (key < tokens)

    rule = pattern.score_rule(grid, device)
    return _Layout(None, None, allowed, visited, full, lists.block, tokens, extra, rule)
