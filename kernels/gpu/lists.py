"""Attention over block lists on a GPU: from a pattern to what the kernels of `list_kernels` need, forward, backward."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import torch
import triton

from ..patterns import Blocked, BlockList, LengthDecay
from ..patterns.blocks import Lists, lists_from_map, map_from_lists
from ..problem import Problem
from . import list_kernels as kernels
from .launch import (
    Call,
    Inputs,
    described,
    empty_lse,
    grad_extra,
    has_descriptors,
    launch,
    per_token,
    resources,
    widths,
)
from .launch import tokens as by_token
from .list_kernels import Visits
from .rules import Decay, Rule, decay, masks, tester, uniform

# Per kernel, bits of the dtype and head dim (padded to a power of two): choices of own tokens, visited tokens, warps,
# stages. Chosen from what the compiler reports (resources_lists.csv); none was timed.
CONFIGS = json.loads(pathlib.Path(__file__).with_name("list_configs.json").read_text())
NARROWEST = 64  # smaller heads use the configurations of this head dim


def limits(problem: Problem) -> list[str]:
    """Reasons that come from the lists, the test inside them, or the score rule."""
    pattern, reasons = problem.pattern, []
    if isinstance(pattern, BlockList) and tester(pattern.within, problem.grid, torch.device("cpu")) is None:
        reasons.append(f"no test within {type(pattern.within).__name__} for lists that come with the data")
    if pattern.score_rule(problem.grid) is not None and not isinstance(pattern, LengthDecay):
        reasons.append("no score rule but that of LengthDecay")
    return reasons


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A pattern on a grid, ready for the kernels.

    `order` says which row starts first. `loops` is 2 when there are partial blocks; `ragged`: full ones may be short.
    """

    lists: Lists
    order: torch.Tensor
    rule: Rule
    decay: tuple[Decay, int, bool]
    loops: int
    ragged: bool
    tokens: int

    @property
    def columns(self) -> int:
        return -(-self.tokens // self.lists.block[1])

    @property
    def lead(self) -> tuple[int, int]:
        """How many lists there are per (batch, heads)."""
        return (1, 1, *self.lists.index.shape[:-2])[-2:]

    @functools.cached_property
    def listed(self) -> Visits:
        ends = torch.stack((self.lists.full_count, self.lists.count), -1)
        return self._visits(self.order, self.lists.index.contiguous(), ends)

    @functools.cached_property
    def transposed(self) -> Visits:
        """The entries sorted by key block, the full ones of each first. Made on the device, without waiting for it."""
        index, full, count = self.lists.index, self.lists.full_count[..., None], self.lists.count[..., None]
        slot = torch.arange(index.shape[-1], device=index.device, dtype=torch.int32)
        rank = torch.where(slot < count, 2 * index + (slot >= full), 2 * self.columns).flatten(-2)
        rank, entries = rank.sort(dim=-1, stable=True)
        starts = torch.arange(2 * self.columns + 1, device=index.device, dtype=torch.int32)
        ends = torch.searchsorted(rank, starts.expand(*rank.shape[:-1], -1).contiguous(), out_int32=True)
        return self._visits(_longest_first(ends[..., 2::2] - ends[..., :-1:2]), entries.int(), ends)

    def _visits(self, order: torch.Tensor, entries: torch.Tensor, ends: torch.Tensor) -> Visits:
        batch, heads = self.lead
        rows, slots = self.lists.index.shape[-2:]
        return Visits(order, entries, ends, rows, self.columns, slots, heads if batch > 1 else 0, int(heads > 1))


def _longest_first(lengths: torch.Tensor) -> torch.Tensor:
    """Rows by falling length, summed over the lists."""
    lengths = lengths.reshape(-1, lengths.shape[-1]).sum(0)
    return lengths.argsort(descending=True, stable=True).to(torch.int32)


def plan(problem: Problem, device: torch.device) -> Plan:
    pattern, tokens = problem.pattern, problem.tokens
    if not isinstance(pattern, BlockList):
        return _kept(pattern, problem.grid, device)
    lists, within = pattern.lists(problem.grid, device), pattern.within
    order, rule = _ascending(lists.index.shape[-2], device), tester(within, problem.grid, device)
    loops, ragged = 1 if within is None else 2, tokens % lists.block[1] != 0
    return Plan(lists, order, rule, decay(pattern, problem.grid), loops, ragged, tokens)


@functools.lru_cache(maxsize=32)
def _ascending(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
def _kept(pattern: Blocked, grid: tuple[int, ...], device: torch.device) -> Plan:
    """Lists that every call has in common. Short blocks count as partial, so that full ones need no mask at all."""
    tokens, given = math.prod(grid), pattern.lists(grid)
    columns = -(-tokens // given.block[1])
    visited, full = (map_from_lists(given.index, count, columns) for count in (given.count, given.full_count))
    rule = tester(None if torch.equal(visited, full) else pattern, grid, device)
    full &= uniform(pattern, grid, given.block)
    if tokens % given.block[1]:
        full[..., -1] = False
    lists = lists_from_map(given.block, visited, full)
    index = lists.index[..., : max(int(lists.count.max()), 1)].contiguous()
    lists = Lists(given.block, index, lists.count, lists.full_count)
    rule = masks(pattern, grid, lists, device) if rule is None else rule
    order, loops = _longest_first(lists.count).to(device), 1 if torch.equal(visited, full) else 2
    lists = Lists(given.block, *(t.to(device) for t in (index, lists.count, lists.full_count)))
    return Plan(lists, order, rule, decay(pattern, grid), loops, False, tokens)


def run(problem: Problem, q, k, v, scale, extra_kv=None, extra_mask=None, bias=None):
    """Attention over the block lists of a pattern; shapes as in `attend`."""
    call = _Attend.apply if problem.needs_grad else _forward
    out, lse = call(problem, plan(problem, q.device), scale, extra_mask, q, k, v, *(extra_kv or (None, None)), bias)
    return out, lse if problem.return_lse else None


def backward(
    problem: Problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v, the extra keys and values, and the bias, None where there is no such input.

    No atomics: the same inputs give the same bits.
    """
    call = problem, plan(problem, q.device), scale, extra_mask, q, k, v, *(extra_kv or (None, None)), bias
    if out is None or lse is None:
        out, lse = _forward(*call)
    return _gradients(*call, out, lse, grad_out, grad_lse)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, steps, scale, extra_mask, *tensors):
        out, lse = _forward(problem, steps, scale, extra_mask, *tensors)
        ctx.save_for_backward(extra_mask, *tensors, out, lse)
        ctx.call = problem, steps, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        return None, None, None, None, *_gradients(*ctx.call, *ctx.saved_tensors, grad_out, grad_lse)


def _forward(problem: Problem, steps: Plan, scale: float, extra_mask, q, k, v, extra_k, extra_v, bias):
    out, lse = q.new_empty(*q.shape[:-1], problem.value_dim), empty_lse(problem, q)
    inputs = _inputs(problem, scale, extra_mask, q, k, v, extra_k, extra_v)
    launch(forward(inputs, steps, bias, out, lse))
    return out, lse


def _gradients(
    problem: Problem, steps: Plan, scale: float, extra_mask, q, k, v, extra_k, extra_v, bias,
    out, lse, grad_out, grad_lse,
) -> list[torch.Tensor | None]:  # fmt: skip
    inputs = _inputs(problem, scale, extra_mask, q, k, v, extra_k, extra_v)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    delta, by_bias = empty_lse(problem, q), None if bias is None else _room_for_bias(problem, steps, q.device)
    of_lse = grad_lse if problem.return_lse else None
    launch(grad_query(inputs, steps, bias, out, lse, grad_out, of_lse, delta, grads[0], by_bias))
    launch(grad_key(inputs, steps, bias, lse, grad_out, delta, *grads[1:]))
    if problem.extra:
        call, *shares = grad_extra(inputs, lse, grad_out, delta)
        launch(call)
        grads += [share.sum(1).to(q.dtype) for share in shares]
    else:
        grads += [None, None]
    return [*grads, None if bias is None else _sum_bias(by_bias, steps, bias)]


def _inputs(problem: Problem, scale: float, extra_mask, q, k, v, extra_k, extra_v) -> Inputs:
    extra_kv = None if extra_k is None else (extra_k, extra_v)
    return Inputs(problem, q, k, v, scale, extra_kv, extra_mask, has_descriptors(q.device))


def forward(inputs: Inputs, steps: Plan, bias, out, lse, only: list[int] | None = None) -> Call:
    """`only` is the configuration to use, here and below; otherwise `tiles` chooses."""
    return _by_query(kernels.forward, inputs, steps, bias, only, [_flat(out), _number(lse)])


def grad_query(
    inputs: Inputs, steps: Plan, bias, out, lse, grad_out, grad_lse, delta, grad_q, grad_bias, only=None
) -> Call:
    of_lse = None if grad_lse is None else _number(grad_lse)
    outputs = [_flat(out), _number(lse), _flat(grad_out), of_lse, _number(delta), _flat(grad_q), grad_bias]
    return _by_query(kernels.grad_query, inputs, steps, bias, only, outputs, LSE=grad_lse is not None)


def _by_query(kernel, inputs: Inputs, steps: Plan, bias, only, outputs: list, **flags: bool) -> Call:
    """A kernel whose programs own tiles of queries."""
    problem, block = inputs.problem, steps.lists.block
    constants = _constants(kernel, problem, steps, bias, only) | inputs.with_extra() | flags
    constants["RAGGED"] = steps.ragged or block[1] % constants["N"] != 0
    boxes, k, v = _visited(inputs, constants, inputs.k, inputs.v)
    programs = problem.batch * problem.heads * steps.listed.rows * -(-block[0] // constants["M"])
    tables = steps.listed, steps.rule.test, steps.decay[0]
    sizes = problem.tokens, problem.heads, problem.heads // problem.kv_heads, problem.extra, inputs.scale
    arguments = *boxes, _flat(inputs.q), k, v, *inputs.extra(), _contiguous(bias), *outputs, *tables, *sizes
    return Call(kernel, programs, arguments, constants)


def grad_key(inputs: Inputs, steps: Plan, bias, lse, grad_out, delta, grad_k, grad_v, only=None) -> Call:
    problem, block = inputs.problem, steps.lists.block
    constants = _constants(kernels.grad_key, problem, steps, bias, only)
    constants["RAGGED"] = problem.tokens % block[0] != 0 or block[0] % constants["N"] != 0
    boxes, q, outer = _visited(inputs, constants, inputs.q, grad_out)
    programs = problem.batch * problem.kv_heads * steps.columns * -(-block[1] // constants["M"])
    tables = steps.transposed, steps.rule.test, steps.decay[0]
    sizes = problem.tokens, problem.kv_heads, problem.heads // problem.kv_heads, inputs.scale
    own = *boxes, q, _flat(inputs.k), _flat(inputs.v), _contiguous(bias)
    arguments = *own, _number(lse), outer, _number(delta), _flat(grad_k), _flat(grad_v), *tables, *sizes
    return Call(kernels.grad_key, programs, arguments, constants)


def _constants(kernel, problem: Problem, steps: Plan, bias, only: list[int] | None) -> dict[str, Any]:
    """Tiles, head dims, test and score rule of a kernel, warps and stages."""
    block, by_key = steps.lists.block, kernel is kernels.grad_key
    own, seen = block[::-1] if by_key else block
    m, n, options = tiles(kernel, problem, own, seen, only)
    _, shape, bands = steps.decay
    return options | dict(
        BLOCK=block, M=m, N=n, DIM=problem.head_dim, VALUE=problem.value_dim,
        **dict(zip(("WIDTH", "VALUE_WIDTH"), widths(problem), strict=True)),
        KIND=steps.rule.kind, PARTS=steps.rule.parts(m if by_key else n, block[1]), LOOPS=steps.loops,
        SHAPE=shape, BANDS=bands, BIAS=bias is not None,
    )  # fmt: skip


def tiles(
    kernel, problem: Problem, own: int, seen: int, only: list[int] | None = None
) -> tuple[int, int, dict[str, Any]]:
    """Tokens of own and visited tiles for blocks of `own` and `seen` tokens; what the compiler is told.

    The first configuration whose own tile is not larger than the block, or the last, cut down to the block.
    """
    own, seen = (max(triton.next_power_of_2(n), 16) for n in (own, seen))
    width = max(*widths(problem), NARROWEST)
    choices = CONFIGS[kernel.fn.__name__][str(8 * problem.dtype.itemsize)][str(width)]
    m, n, warps, stages = only or next((c for c in choices if c[0] <= own), choices[-1])
    return min(m, own), min(n, seen), resources(warps, stages)


def _visited(inputs: Inputs, constants: dict[str, Any], *pair: torch.Tensor) -> tuple:
    """The two tensors that a kernel visits: their descriptors, None unless both can have one, and themselves."""
    pair, sides = [t.flatten(1, -3) for t in pair], (1, 1, constants["N"])
    made = [described(t, sides, w) if inputs.boxed else None for t, w in zip(pair, widths(inputs.problem), strict=True)]
    constants["BOXED"] = all(made)
    boxes, tensors = zip(*made, strict=True) if all(made) else ((None, None), map(by_token, pair))
    return boxes, *tensors


def _flat(tensor: torch.Tensor):
    return by_token(tensor.flatten(1, -3))


def _number(tensor: torch.Tensor):
    return per_token(tensor.flatten(1, -2))


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def _room_for_bias(problem: Problem, steps: Plan, device: torch.device) -> torch.Tensor:
    block, (rows, slots) = steps.lists.block, steps.lists.index.shape[-2:]
    m, n, _ = tiles(kernels.grad_query, problem, *block)
    parts = rows, -(-block[0] // m), slots, -(-block[1] // n)
    return torch.zeros(problem.batch, problem.heads, *parts, device=device)


def _sum_bias(parts: torch.Tensor, steps: Plan, bias: torch.Tensor) -> torch.Tensor:
    total = parts.sum((3, 5))
    for axis, lists in enumerate(steps.lead):
        total = total.sum(axis, keepdim=True) if lists == 1 else total
    return total.view(bias.shape).to(bias.dtype)
