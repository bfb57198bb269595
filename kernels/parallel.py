"""Attention on a grid that is cut along one axis over the ranks of a process group, exchanging only the rows or blocks
that the queries of other ranks see."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .exchange import Pending, SumOfParts, contact, count_traffic
from .patterns import Blocked, Circle, Dense, Pattern, Separable
from .patterns.circle import pool_tokens
from .problem import Problem, check_bias, check_lead, describe
from .routes import Part, block_route, inner, needed, route, span, spans

__all__ = ["Shards", "attend_sharded", "count_traffic", "route"]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a grid is cut over ranks: each holds neighbouring rows along one axis, as many as it likes.

    Args:
        axis: of the grid, from 0.
        group: of processes; all of them when None.
        overlap: compute what needs no rows of others while these are on their way.
    """

    axis: int = 0
    group: Any = None
    overlap: bool = True


def attend_sharded(q, k, v, pattern: Pattern, shards: Shards, options: dict[str, Any]):
    """`attend` on the rows of this rank: q, k and v are its shares, and so is the result."""
    extra_kv, extra_mask, lse = (options.get(name) for name in ("extra_kv", "extra_mask", "return_lse"))
    rank = rank_in(shards)
    bias = options.get("bias")
    try:
        problem = describe(q, k, v, Dense(), options.get("scale"), extra_kv, extra_mask, None, bool(lse))
        _check(pattern, shards, problem)
    except (TypeError, ValueError):
        if isinstance(q, torch.Tensor):  # the others wait for this rank
            _tell([0] * (1 + len(_AGREED) + 4), q.device, shards)
        raise
    grid, sizes = _agree(problem, pattern, bias, shards)
    check_lead(pattern, problem.batch, problem.heads)
    if bias is not None:
        check_bias(pattern, grid, problem.heads, tuple(bias.shape))
    if isinstance(pattern, Blocked):
        return _by_blocks(q, k, v, pattern, shards, grid, sizes, rank, options)
    if isinstance(pattern, Dense) and not lse and options.get("backend") is None:
        return _dense(q, k, v, shards, grid, sizes, rank, options)
    if isinstance(pattern, Circle) and pattern.pooled is not None:
        extra = _pooled(k, v, pattern, shards, grid, sizes, rank, extra_kv, extra_mask)
        pattern, options = Circle(pattern.radius), {**options, "extra_kv": extra[0], "extra_mask": extra[1]}
    return _by_rows(q, k, v, pattern, shards, grid, sizes, rank, options)


def rank_in(shards: Shards) -> int:
    """The number of this process in the group.

    Raises:
        ValueError: there is no group, or this process is not in it.
    """
    if not isinstance(shards, Shards):
        raise TypeError(f"parallel must be Shards(axis=...), got {shards!r}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "parallel= needs a process group, and there is none; call torch.distributed.init_process_group() first, "
            "in a program that torchrun started"
        )
    rank = dist.get_rank(shards.group)
    if rank < 0:
        members = dist.get_world_size()
        raise ValueError(
            f"rank {dist.get_rank()} of {members} is not in the group of Shards(group=...); call attend only on the "
            "ranks of that group, or leave group=None for all of them"
        )
    return rank


def _by_rows(q, k, v, pattern, shards: Shards, grid, sizes, rank: int, options: dict[str, Any]):
    """A pattern of windows: what needs no rows of others is computed while these are on their way."""
    from .attend import attend

    plan, lse = route(pattern, grid, shards.axis, sizes), options.get("return_lse")
    own = plan.own[rank]
    pending = Pending(plan.moves(rank), shards.group)
    k, v, *wide = pending.share(k, v)

    def local(keys: tuple[int, int], rows: tuple[int, int], k, v, held: tuple[int, int]):
        """Results of some rows, with keys and values of the rows `held`, of which `keys` are used."""
        cut = functools.partial(_rows, axis=shards.axis)
        padded = _rows(q, own, keys, shards.axis)
        found = attend(
            padded, cut(k, held, keys), cut(v, held, keys), _part(pattern, grid, shards.axis, keys, rows), **options
        )
        return [cut(t, keys, rows) for t in (found if lse else (found,))]

    alone = inner(pattern, grid, shards.axis, own)
    pieces = {}
    if shards.overlap and pending.busy and alone[1] > alone[0]:
        pieces[alone] = local(own, alone, k, v, own)
    else:
        alone = own[0], own[0]
    pending.put(*wide)
    for rows in ((own[0], alone[0]), (alone[1], own[1])):
        if rows[1] > rows[0]:
            keys = span(needed(pattern, grid, shards.axis, *rows), rows)
            pieces[rows] = local(keys, rows, *wide, plan.held(rank))
    parts = zip(*(pieces[rows] for rows in sorted(pieces)), strict=True)
    out = tuple(torch.cat(part, shards.axis + 1) for part in parts)
    return out if lse else out[0]


def _dense(q, k, v, shards: Shards, grid, sizes, rank: int, options: dict[str, Any]):
    """Nothing to leave out: one call of the ordinary attention, own queries on all keys."""
    pending = Pending(route(Dense(), grid, shards.axis, sizes).moves(rank), shards.group)
    _, _, *wide = pending.share(k, v)
    pending.put(*wide)
    keys, values = (t.flatten(1, -3) for t in wide)
    extra_kv, seen, mask = options.get("extra_kv"), options.get("extra_mask"), None
    if seen is not None:
        mask = torch.cat([seen.new_ones(keys.shape[:2]), seen], 1)[:, None, None]
    if extra_kv is not None:
        keys, values = (torch.cat(pair, 1) for pair in zip((keys, values), extra_kv, strict=True))
    heads_first = (t.transpose(1, 2) for t in (q.flatten(1, -3), keys, values))
    grouped = q.shape[-2] != k.shape[-2]
    with torch.autocast(q.device.type, enabled=False):  # as in attend
        out = F.scaled_dot_product_attention(*heads_first, mask, scale=options.get("scale"), enable_gqa=grouped)
    return out.transpose(1, 2).unflatten(1, q.shape[1:-2])


def _by_blocks(q, k, v, pattern, shards: Shards, grid, sizes, rank: int, options: dict[str, Any]):
    """A pattern of block lists, on a line of the tokens that this rank holds."""
    from .attend import attend

    with torch.device("cpu"):  # whatever the default is
        plan = block_route(pattern, grid, shards.axis, sizes, rank, q.device)
    moves, shape = plan.moves, q.shape[1:-2]
    pending = Pending(moves, shards.group)
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    k, v, *wide = pending.share(k, v)
    pending.put(*wide)
    room = q.new_zeros(len(q), moves.held, *q.shape[2:]).index_copy(1, moves.own, q)
    found = attend(room, *wide, plan.pattern, **{**options, "bias": plan.bias(options.get("bias"))})
    found = found if options.get("return_lse") else (found,)
    out = tuple(t.index_select(1, moves.own).unflatten(1, shape) for t in found)
    return out if options.get("return_lse") else out[0]


def _pooled(k, v, pattern: Circle, shards: Shards, grid, sizes, rank: int, extra_kv, extra_mask):
    """Extra tokens and their mask with the tokens pooled from the whole grid, each cell by whoever has some of it."""
    dim, side = shards.axis + 1, pattern.pooled
    pattern.check(grid)
    cells = tuple((first // side, -(-stop // side)) for first, stop in spans(sizes))
    start, stop = (x * side for x in cells[rank])
    both = torch.cat([_rows(t, spans(sizes)[rank], (start, stop), shards.axis) for t in (k, v)], -1)
    shape = [n // side if d >= len(grid) - 2 else n for d, n in enumerate(both.shape[1:-2])]
    part = pool_tokens(both, side, pattern.weight).unflatten(1, shape)
    whole = SumOfParts.apply(part, dim, cells, rank, shards.group).flatten(1, -3)
    key, value = whole.split((k.shape[-1], v.shape[-1]), -1)
    if extra_mask is not None:
        extra_mask = torch.cat([extra_mask, extra_mask.new_ones(len(key), key.shape[1])], 1)
    if extra_kv is not None:
        key, value = (torch.cat(pair, 1) for pair in zip(extra_kv, (key, value), strict=True))
    return (key, value), extra_mask


def _check(pattern: Pattern, shards: Shards, problem: Problem) -> None:
    axes, name = len(problem.grid), type(pattern).__name__
    if not isinstance(shards.axis, int) or not 0 <= shards.axis < axes:
        raise ValueError(f"Shards(axis={shards.axis!r}): the grid has {axes} axes, numbered from 0")
    if not isinstance(pattern, (Separable, Blocked)):
        raise ValueError(f"{name} gives neither windows nor block lists, so the rows that it needs are not known")
    if pattern.score_rule(problem.grid) is not None:
        raise ValueError(
            f"{name} lets every token see every token, by its distance in the whole sequence, so every rank would "
            "need all keys; use the Ulysses parallelism of diffusers, which moves less: "
            "enable_parallelism(config=ContextParallelConfig(ulysses_degree=...)), then attach"
        )
    if isinstance(pattern, Circle) and shards.axis < axes - 2:
        raise ValueError("Circle sees every frame, so nothing is gained by cutting frames; cut rows or columns")


_AGREED = (
    "grid axes", "batch", "heads", "KV heads", "head_dim", "value_dim", "dtype", "extra tokens", "pattern",
    "bias", "axis",
)  # fmt: skip


def _agree(
    problem: Problem, pattern: Pattern, bias: torch.Tensor | None, shards: Shards
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The whole grid and the rows of every rank; raises on all of them when their calls do not fit together."""
    grid = list(problem.grid)
    rows, grid[shards.axis] = grid[shards.axis], 0
    kind, form = (zlib.crc32(str(x).encode()) for x in (problem.dtype, None if bias is None else bias.shape))
    sizes = [len(grid), problem.batch, problem.heads, problem.kv_heads, problem.head_dim, problem.value_dim]
    mine = [*sizes, kind, problem.extra, _fingerprint(pattern), form, shards.axis]
    table = _tell([1, *mine, *grid, *[0] * (3 - len(grid)), rows], problem.device, shards)
    refused = [rank for rank, row in enumerate(table) if not row[0]]
    if refused:
        raise ValueError(f"the call was refused on rank {', '.join(map(str, refused))}; its error says why")
    for column, name in enumerate((*_AGREED, "grid", "grid", "grid"), 1):
        values = [row[column] for row in table]
        if len(set(values)) > 1:
            shown = "" if name in ("dtype", "pattern", "bias") else f": {values}, rank by rank"
            raise ValueError(f"the ranks differ in {name}{shown}; only the rows along the cut axis may differ")
    sizes = tuple(row[-1] for row in table)
    grid[shards.axis] = sum(sizes)
    return tuple(grid), sizes


def _tell(mine: list[int], device: Any, shards: Shards) -> list[list[int]]:
    """What each rank has to say."""
    tensor = torch.tensor(mine, device=device)
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(shards.group))]
    with contact(range(len(everyone)), shards.group):
        dist.all_gather(everyone, tensor, group=shards.group)
    return [t.tolist() for t in everyone]


def _fingerprint(pattern: Pattern) -> int:
    """The same for equal patterns, also for equal block lists."""
    code = zlib.crc32((f"{type(pattern).__name__} {pattern.spell()}").encode())
    for tensor in pattern.tensors():
        code = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), code)
    return code


def _part(
    pattern: Separable, grid: tuple[int, ...], axis: int, keys: tuple[int, int], rows: tuple[int, int]
) -> Pattern:
    if isinstance(pattern, Circle) or (keys == rows == (0, grid[axis])):
        return pattern  # a disc does not know where the grid ends
    return Part(pattern, grid, axis, keys, rows)


def _rows(tensor: torch.Tensor, held: tuple[int, int], wanted: tuple[int, int], axis: int) -> torch.Tensor:
    """Rows `wanted` along an axis of a tensor that holds rows `held`; zeros where it does not."""
    dim = axis + 1
    first, stop = max(held[0], wanted[0]), min(held[1], wanted[1])
    part = tensor.narrow(dim, first - held[0], stop - first)
    if (first, stop) == wanted:
        return part
    return F.pad(part, (*[0, 0] * (tensor.ndim - 1 - dim), first - wanted[0], wanted[1] - stop))
