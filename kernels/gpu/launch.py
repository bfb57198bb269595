"""From tensors to launches of the box kernels: what every kernel is given, and the order in which they run.

Each function below returns calls, so that the same arguments can be run, or compiled ahead of time for a machine that
is not there.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..patterns import Circle, Pattern
from ..problem import Problem
from . import boxes
from .boxes import Tables, Tokens
from .common import INTERPRETED
from .tables import Boxes, axes, best_boxes, rows, steps

# Per kernel, bits of the dtype and head dim (padded to a power of two): choices of own tokens, visited tokens, warps,
# stages. Chosen from what the compiler reports (resources.csv) and by counting visits; none was timed.
CONFIGS: dict[str, Any] = json.loads(pathlib.Path(__file__).with_name("configs.json").read_text())

# A box of keys is read from the L2 cache for each visit. With fewer queries than this it takes longer to read than to
# multiply: at 450 TFLOP/s and 5.5 TB/s (round numbers of an H100) both take the same time at 2 * 450 / (2 * 5.5).
FEW_QUERIES = 80

PROGRAMS = 264  # enough for an H100, two for each of its 132 multiprocessors


class Call(NamedTuple):
    """A kernel, how many programs, its arguments in order, and its compile-time constants, warps and stages."""

    kernel: Any
    programs: int
    arguments: tuple
    options: dict[str, Any]


def launch(call: Call) -> None:
    call.kernel[(call.programs,)](*call.arguments, **call.options)


def widths(problem: Problem) -> tuple[int, int]:
    """Head dims of keys and values as the kernels hold them: powers of two, at least 16."""
    return tuple(max(triton.next_power_of_2(n), 16) for n in (problem.head_dim, problem.value_dim))


def choices(kernel: str, problem: Problem) -> list[list[int]]:
    return CONFIGS[kernel]["32" if problem.dtype == torch.float32 else "16"][str(max(widths(problem)))]


def choose(kernel: str, problem: Problem, only: list[int] | None = None) -> tuple[Boxes, dict[str, int]]:
    """The boxes of the configuration whose visits cost least (or of this one), and warps, stages and what else the
    compiler is told."""

    def boxes_of(config: list[int]) -> Boxes:
        own, seen = config[:2]
        extra = 0 if kernel == "grad_key" else -(-problem.extra // seen)
        return best_boxes(problem.pattern, problem.grid, own, seen, kernel == "grad_key", extra)

    options = [(boxes_of(config), config) for config in ([only] if only else choices(kernel, problem))]
    found, (*_, warps, stages) = min(options, key=lambda o: o[0].visits * max(o[1][0], FEW_QUERIES) * o[1][1])
    return found, resources(warps, stages)


def resources(warps: int, stages: int) -> dict[str, Any]:
    """Options of the compiler. Scores become weights by one multiply-add each, which it must be allowed to fuse."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@functools.lru_cache(maxsize=256)
def tables(pattern: Pattern, grid: tuple[int, ...], found: Boxes, keys_own: bool, device: torch.device) -> Tables:
    both = axes(pattern, grid, keys_own)
    sides = zip(both, found.own, found.seen, strict=True)
    cut = [rows(*pair, own, seen) for pair, own, seen in sides]
    return Tables(
        *(torch.tensor(r, dtype=torch.int32, device=device) for r in cut),
        *(torch.tensor([axis.lo, axis.hi], dtype=torch.int32, device=device) for axis, _ in both),
        *map(len, cut),
        *(axis.extent for axis, _ in both),
        *steps(pattern, grid),
        pattern.radius**2 if isinstance(pattern, Circle) else 0,
    )


def tokens(tensor: torch.Tensor) -> Tokens:
    """A tensor `[batch, *grid, heads, dim]`; extra tokens `[batch, extra, heads, dim]` lie along w."""
    batch, *grid, head, dim = tensor.stride()
    return Tokens(tensor, batch, *(0,) * (3 - len(grid)), *grid, head, dim)


def per_token(tensor: torch.Tensor) -> Tokens:
    """One number per token and head: `[batch, *grid, heads]`."""
    return tokens(tensor[..., None])


def described(tensor: torch.Tensor, sides: tuple[int, int, int], width: int) -> tuple[TensorDescriptor, Tokens] | None:
    """A tensor `[batch, *grid, heads, dim]` as a descriptor of boxes `[1, *sides, width]`; None where its strides or
    sizes do not allow one.

    The heads of a token lie side by side, or else batch and heads together form the first axis.
    """
    batch, *grid, heads, dim = tensor.shape
    by_batch, *by_grid, by_head, by_dim = tensor.stride()
    span = (heads - 1) * by_head + dim
    if heads == 1 or dim <= by_head and span <= by_grid[-1]:
        outer, inner, place = (batch, by_batch), span, (1, 0, by_head if heads > 1 else 0)
    elif batch == 1 or by_batch == heads * by_head:
        outer, inner, place = (batch * heads, by_head), dim, (heads, 1, 0)
    else:
        return None
    sizes = [outer[0], *(1,) * (3 - len(grid)), *grid, inner]
    strides = [outer[1], *(0,) * (3 - len(grid)), *by_grid, 1]
    for axis in range(3, -1, -1):  # where there is one step only, any stride will do
        if sizes[axis] == 1:
            strides[axis] = -(-inner // 16) * 16 if axis == 3 else strides[axis + 1]
    unit = tensor.element_size()
    fits = by_dim == 1 and dim == width and tensor.data_ptr() % 16 == 0 and max(sizes) < 2**31
    fits = fits and all(s > 0 and s * unit % 16 == 0 and s * unit < 2**40 for s in (*strides[:-1], place[2] or 16))
    # the driver asks for strides that divide the next one
    if not fits or strides[3] < inner or any(a % b for a, b in itertools.pairwise(strides)):
        return None
    by_batch, by_head, inner = place
    seen = tokens(tensor)._replace(by_batch=by_batch, by_head=by_head, inner=inner)
    return TensorDescriptor(tensor, sizes, strides, [1, *sides, width]), seen


def has_descriptors(device: torch.device) -> bool:
    """Boxes are loaded by hardware from compute capability 9.0 on; the interpreter knows them as well."""
    return INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))


def _visited(problem: Problem, found: Boxes, pair: tuple[torch.Tensor, torch.Tensor], boxed: bool) -> tuple:
    """The two tensors that a kernel visits: their descriptors, None unless both can have one, and their tokens."""
    if boxed and set(steps(problem.pattern, problem.grid)) == {1}:
        made = [described(t, found.seen, width) for t, width in zip(pair, widths(problem), strict=True)]
        if all(made):
            return (*zip(*made, strict=True),)
    return (None, None), tuple(map(tokens, pair))


class Inputs(NamedTuple):
    """What `run` and `backward` of the backend are given, and whether boxes may be loaded by descriptor."""

    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    extra_kv: tuple[torch.Tensor, torch.Tensor] | None
    extra_mask: torch.Tensor | None
    boxed: bool

    def extra(self) -> tuple[Tokens | None, Tokens | None, Tokens | None]:
        if self.extra_kv is None:
            return None, None, None
        mask = self.extra_mask
        mask = None if mask is None else tokens(mask.view(torch.uint8)[..., None, None])
        return *map(tokens, self.extra_kv), mask

    def constants(self, found: Boxes, descriptors: tuple) -> dict[str, Any]:
        problem, (width, value_width) = self.problem, widths(self.problem)
        return dict(
            OWN=found.own, SEEN=found.seen, DIM=problem.head_dim, VALUE=problem.value_dim,
            WIDTH=width, VALUE_WIDTH=value_width, RANK=len(problem.grid),
            BOXED=descriptors[0] is not None, DISC=isinstance(problem.pattern, Circle),
        )  # fmt: skip

    def with_extra(self) -> dict[str, bool]:
        return {"EXTRA": self.problem.extra > 0, "MASKED": self.extra_mask is not None}


def empty_lse(problem: Problem, like: torch.Tensor) -> torch.Tensor:
    """float32 `[batch, *grid, heads]`, stored heads first: the tokens of a box lie together."""
    return like.new_empty(problem.batch, problem.heads, *problem.grid, dtype=torch.float32).movedim(1, -1)


def forward(call: Inputs, out: torch.Tensor, lse: torch.Tensor, only=None) -> Call:
    problem = call.problem
    found, options = choose("forward", problem, only)
    descriptors, visited = _visited(problem, found, (call.k, call.v), call.boxed)
    arguments = (
        *descriptors, tokens(call.q), *visited, *call.extra(), tokens(out), per_token(lse),
        tables(problem.pattern, problem.grid, found, False, call.q.device),
        problem.heads, problem.heads // problem.kv_heads, problem.extra, call.scale,
    )  # fmt: skip
    constants = call.constants(found, descriptors) | call.with_extra()
    return Call(boxes.forward, found.tiles * problem.batch * problem.heads, arguments, constants | options)


def grad_query(call: Inputs, out, lse, grad_out, grad_lse: torch.Tensor | None, delta, grad_q, only=None) -> Call:
    problem = call.problem
    found, options = choose("grad_query", problem, only)
    descriptors, visited = _visited(problem, found, (call.k, call.v), call.boxed)
    arguments = (
        *descriptors, tokens(call.q), *visited, *call.extra(), tokens(out), per_token(lse), tokens(grad_out),
        None if grad_lse is None else per_token(grad_lse), per_token(delta), tokens(grad_q),
        tables(problem.pattern, problem.grid, found, False, call.q.device),
        problem.heads, problem.heads // problem.kv_heads, problem.extra, call.scale,
    )  # fmt: skip
    constants = call.constants(found, descriptors) | call.with_extra() | {"LSE": grad_lse is not None}
    return Call(boxes.grad_query, found.tiles * problem.batch * problem.heads, arguments, constants | options)


def grad_key(call: Inputs, lse, grad_out, delta, grad_k, grad_v, only=None) -> Call:
    problem = call.problem
    found, options = choose("grad_key", problem, only)
    descriptors, (q, outer) = _visited(problem, found, (call.q, grad_out), call.boxed)
    arguments = (
        *descriptors, q, tokens(call.k), tokens(call.v), per_token(lse), outer, per_token(delta),
        tokens(grad_k), tokens(grad_v),
        tables(problem.pattern, problem.grid, found, True, call.q.device),
        problem.kv_heads, problem.heads // problem.kv_heads, call.scale,
    )  # fmt: skip
    programs = found.tiles * problem.batch * problem.kv_heads
    return Call(boxes.grad_key, programs, arguments, call.constants(found, descriptors) | options)


def grad_extra(call: Inputs, lse, grad_out, delta, only=None) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """Gradients of the extra tokens in float32, `[batch, shares, extra, kv_heads, dim]`; their sum over the shares."""
    problem = call.problem
    own, seen, warps, stages = only or choices("grad_extra", problem)[0]
    programs = -(-problem.extra // own) * problem.batch * problem.kv_heads
    shares = max(min(PROGRAMS // programs, problem.tokens // (4 * seen)), 1)
    share = -(-problem.tokens // (shares * seen)) * seen
    shares = -(-problem.tokens // share)
    grad_k, grad_v = (call.q.new_empty(problem.batch, shares, *t.shape[1:], dtype=torch.float32) for t in call.extra_kv)
    width, value_width = widths(problem)
    arguments = (
        tokens(call.q), *call.extra(), per_token(lse), tokens(grad_out), per_token(delta),
        *(tokens(t[:, :, None]) for t in (grad_k, grad_v)),
        (1, 1, 1, *problem.grid)[-3:],
        problem.kv_heads, problem.heads // problem.kv_heads, problem.extra, call.scale, share,
    )  # fmt: skip
    constants = dict(
        M=own, N=seen, DIM=problem.head_dim, VALUE=problem.value_dim, WIDTH=width, VALUE_WIDTH=value_width,
        MASKED=call.extra_mask is not None,
    )  # fmt: skip
    return Call(boxes.grad_extra, programs * shares, arguments, constants | resources(warps, stages)), grad_k, grad_v


def run(problem: Problem, q, k, v, scale, extra_kv, extra_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[batch, *grid, heads, value_dim]` and lse `[batch, *grid, heads]`."""
    call = Inputs(problem, q, k, v, scale, extra_kv, extra_mask, has_descriptors(q.device))
    out, lse = q.new_empty(*q.shape[:-1], problem.value_dim), empty_lse(problem, q)
    launch(forward(call, out, lse))
    return out, lse


def backward(
    problem: Problem, q, k, v, scale, extra_kv, extra_mask, out, lse, grad_out, grad_lse
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the extra keys and values, the last two None without extra tokens. No atomics: the same
    inputs give the same bits."""
    call = Inputs(problem, q, k, v, scale, extra_kv, extra_mask, has_descriptors(q.device))
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    delta = empty_lse(problem, q)
    launch(grad_query(call, out, lse, grad_out, grad_lse, delta, grads[0]))
    launch(grad_key(call, lse, grad_out, delta, *grads[1:]))
    if extra_kv is None:
        return [*grads, None, None]
    of_extra, *parts = grad_extra(call, lse, grad_out, delta)
    launch(of_extra)
    return grads + [part.sum(1).to(q.dtype) for part in parts]
