"""Moving keys and values between the ranks of a process group, and their gradients back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass
class Traffic:
    """Bytes that this process received and sent in sharded attention."""

    received: int = 0
    sent: int = 0


_COUNTING: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes of keys, values and their gradients that sharded attention moves meanwhile, in this process."""
    traffic = Traffic()
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        _COUNTING.remove(traffic)


class Exchange:
    """Tensors on their way: `give[rank]` to each, and what `take[rank]` (shapes) says from each."""

    def __init__(self, give: dict[int, torch.Tensor], take: dict[int, torch.Tensor], group: Any) -> None:
        self.take, self.group = take, group
        peer = functools.partial(dist.get_global_rank, group or dist.group.WORLD)
        ops = [dist.P2POp(dist.isend, tensor, peer(rank), group) for rank, tensor in give.items()]
        ops += [dist.P2POp(dist.irecv, tensor, peer(rank), group) for rank, tensor in take.items()]
        self.give = give  # alive until it is sent
        for traffic in _COUNTING:
            traffic.sent += sum(t.nbytes for t in give.values())
            traffic.received += sum(t.nbytes for t in take.values())
        self.peers = sorted({*give, *take})
        with contact(self.peers, group):
            self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> dict[int, torch.Tensor]:
        with contact(self.peers, self.group):
            for work in self.works:
                work.wait()
        return self.take


@contextlib.contextmanager
def contact(peers: Any, group: Any) -> Iterator[None]:
    """Say in words what a failure inside is about."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} could not exchange rows with ranks {list(peers)}: one of them ended, or did "
            f"not make the same call in time. See the output of those ranks first. ({str(error).splitlines()[0]})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Moves:
    """What one rank gives and takes: rows along dimension `dim` of its keys and values, as slices or by number.

    Args:
        held: rows it has in the end.
        own: where its own rows are among those.
        give: which of its own rows each rank gets.
        take: where the rows from each rank go among those held.
    """

    dim: int
    held: int
    own: slice | torch.Tensor
    give: dict[int, slice | torch.Tensor]
    take: dict[int, slice | torch.Tensor]

    def at(self, rows: slice | torch.Tensor) -> tuple[Any, ...]:
        return (*[slice(None)] * self.dim, rows)

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """Where the rows held go; zeros where none will come."""
        shape = (*like.shape[: self.dim], self.held, *like.shape[self.dim + 1 :])
        filled = count(self.own) + sum(count(rows) for rows in self.take.values())
        return like.new_empty(shape) if filled == self.held else like.new_zeros(shape)


def count(rows: slice | torch.Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


class Pending:
    """Rows of other ranks on their way to this one."""

    def __init__(self, moves: Moves, group: Any) -> None:
        self.moves, self.group = moves, group
        self.exchange: Exchange | None = None

    @property
    def busy(self) -> bool:
        return bool(self.exchange.works)

    def share(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k and v, and room for all rows held of both, with the own ones in place."""
        return _Share.apply(k, v, self)

    def put(self, *rooms: torch.Tensor) -> None:
        """Wait, and put the rows where they belong."""
        moves = self.moves
        with torch.no_grad():
            for rank, flat in self.exchange.wait().items():
                for room, part in zip(rooms, _parts(flat, rooms, moves, moves.take[rank]), strict=True):
                    room[moves.at(moves.take[rank])] = part


class _Share(torch.autograd.Function):
    """Backward sends gradients back to where the rows came from.

    One function gives own and held rows, so that its backward runs on every rank, whatever its queries see.
    """

    @staticmethod
    def forward(ctx, k, v, pending: Pending):
        moves = ctx.moves = pending.moves
        ctx.group = pending.group
        give = {rank: _flat((k, v), moves, rows) for rank, rows in moves.give.items()}
        take = {rank: _empty((k, v), moves, rows) for rank, rows in moves.take.items()}
        pending.exchange = Exchange(give, take, pending.group)
        rooms = [moves.room(t) for t in (k, v)]
        for room, own in zip(rooms, (k, v), strict=True):
            room[moves.at(moves.own)] = own
        return k.view_as(k), v.view_as(v), *rooms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        moves: Moves = ctx.moves
        own, held = [g.clone() for g in grads[:2]], grads[2:]
        give = {rank: _flat(held, moves, rows) for rank, rows in moves.take.items()}
        take = {rank: _empty(own, moves, rows) for rank, rows in moves.give.items()}
        exchange = Exchange(give, take, ctx.group)
        for mine, all_of_it in zip(own, held, strict=True):
            mine += all_of_it[moves.at(moves.own)]
        for rank, flat in sorted(exchange.wait().items()):
            rows = moves.give[rank]
            for mine, part in zip(own, _parts(flat, own, moves, rows), strict=True):
                mine[moves.at(rows)] += part  # no row goes to the same rank twice
        return *own, None


def _flat(tensors: Any, moves: Moves, rows: slice | torch.Tensor) -> torch.Tensor:
    """Rows of keys and of values as one message."""
    return torch.cat([t[moves.at(rows)].flatten() for t in tensors])


def _empty(tensors: Any, moves: Moves, rows: slice | torch.Tensor) -> torch.Tensor:
    numbers = sum(t.numel() // t.shape[moves.dim] for t in tensors) * count(rows)
    return tensors[0].new_empty(numbers)


def _parts(flat: torch.Tensor, like: Any, moves: Moves, rows: slice | torch.Tensor) -> list[torch.Tensor]:
    """The reverse of `_flat`."""
    shapes = [(*t.shape[: moves.dim], count(rows), *t.shape[moves.dim + 1 :]) for t in like]
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


class SumOfParts(torch.autograd.Function):
    """The whole of which every rank has a part, `spans[rank]` along dimension `dim`; where parts overlap they are
    added. Backward adds up the gradients that the ranks have for the own part."""

    @staticmethod
    def forward(ctx, part, dim: int, spans: tuple[tuple[int, int], ...], rank: int, group: Any):
        ctx.dim, ctx.spans, ctx.rank, ctx.group = dim, spans, rank, group
        shape = list(part.shape)
        take = {}
        for other, (start, stop) in enumerate(spans):
            shape[dim] = stop - start
            if other != rank:
                take[other] = part.new_empty(shape)
        exchange = Exchange({other: part.contiguous() for other in take}, take, group)
        shape[dim] = max(stop for _, stop in spans)
        parts = {rank: part, **exchange.wait()}
        whole = part.new_zeros(shape)
        for other in sorted(parts):  # in the same order everywhere, for the same bits
            start, stop = spans[other]
            whole.narrow(dim, start, stop - start).add_(parts[other])
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cuts = [grad.narrow(ctx.dim, start, stop - start) for start, stop in ctx.spans]
        own = cuts.pop(ctx.rank).clone()
        others = [other for other in range(len(ctx.spans)) if other != ctx.rank]
        give = {other: cut.contiguous() for other, cut in zip(others, cuts, strict=True)}
        exchange = Exchange(give, {other: torch.empty_like(own) for other in others}, ctx.group)
        for _, part in sorted(exchange.wait().items()):
            own += part
        return own, None, None, None, None
