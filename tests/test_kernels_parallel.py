"""Attention on a cut grid equals attention on the whole one, and moves the bytes that the formula says."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vision_attn import Circle, Dense, LengthDecay, Neighborhood, PerHead, Radial, SlidingTile, Window, attend
from vision_attn.kernels.parallel import Shards, count_traffic
from vision_attn.kernels.patterns import BlockList, PowerStep, Separable, Streaming
from vision_attn.kernels.patterns.blocks import map_from_lists

FAR_BLOCKS = torch.eye(9, dtype=torch.bool).roll(4, 1).repeat_interleave(2, 0)  # none sees itself
# pattern, grid, axis, rows of every rank
CASES = {
    "window": (Neighborhood(window=5), (13, 6), 0, (4, 4, 5)),
    "columns": (Neighborhood(window=(3, 5)), (6, 17), 1, (2, 11, 4)),
    "strided": (Neighborhood(window=6, stride=3), (20, 6), 0, (7, 5, 8)),
    "dilated": (Neighborhood(window=3, dilation=2), (14, 7), 0, (5, 4, 5)),
    "causal": (Neighborhood(window=(4, 3), causal=(True, False)), (15, 5), 0, (6, 3, 6)),
    "far": (Neighborhood(window=9), (12, 9), 0, (1, 2, 9)),  # windows reach past the neighbour
    "video": (Neighborhood(window=3), (3, 5, 9), 2, (4, 4, 1)),
    "line": (Neighborhood(window=7), (31,), 0, (10, 1, 20)),
    "tiles": (SlidingTile(tile=2, window=3), (12, 8), 0, (4, 5, 3)),
    "windows": (Window(size=4), (12, 8), 0, (3, 5, 4)),
    "pooled": (Circle(radius=3, pooled=2), (12, 8), 0, (3, 4, 5)),
    "pooled columns": (Circle(radius=2, pooled=3), (2, 6, 9), 2, (1, 7, 1)),
    "radial frames": (Radial(decay=0.2, block=4, thin=8), (7, 3, 5), 0, (3, 1, 3)),
    "radial rows": (Radial(decay=0.2, block=4, thin=8, rule="block"), (5, 6, 3), 1, (1, 3, 2)),
    "streaming": (Streaming(window=9, sink=3), (11, 25), 0, (3, 4, 4)),
    "power": (PowerStep(block=4, window=5, sink=1), (13, 22), 0, (5, 3, 5)),
    "lists": (
        BlockList.from_mask(torch.rand(4, 17, 9, generator=torch.Generator().manual_seed(0)) < 0.4, (4, 8)),
        (11, 6),
        0,
        (2, 4, 5),
    ),
    "lists elsewhere": (BlockList.from_mask(FAR_BLOCKS, (4, 8)), (12, 6), 0, (3, 4, 5)),
    "lists within": (
        BlockList.from_mask(
            torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.5, 8, Neighborhood(window=5)
        ),
        (11, 6),
        1,
        (1, 3, 2),
    ),
    "disc": (Circle(radius=3), (11, 7), 0, (4, 3, 4)),
    "dense": (Dense(), (6, 4), 0, (1, 2, 3)),
    "heads": (PerHead(((2, Neighborhood(window=3)), (2, Dense()))), (9, 4), 0, (3, 3, 3)),
}

BIASED = ("window", "dilated", "lists")


# Processes start as copies of one that has these: importing them takes longer than most tests.
mp.set_forkserver_preload(["torch.distributed", "torch._dynamo", "vision_attn.kernels.parallel"])


def processes(work: Callable[[int], object], count: int, folder: Path) -> list:
    """What `work(rank)` gives, as JSON, on each of some processes that share a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_enter, (work, count, port, folder), nprocs=count, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _enter(rank: int, work: Callable[[int], object], count: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address, patience = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=patience)
    (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
    dist.barrier()
    dist.destroy_process_group()


def tensors(grid: tuple[int, ...], heads: int = 4, kv_heads: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=dtype)
    q, k, v = draw(2, *grid, heads, 8), draw(2, *grid, kv_heads, 8), draw(2, *grid, kv_heads, 6)
    extra = draw(2, 3, kv_heads, 8), draw(2, 3, kv_heads, 6)
    return q, k, v, extra, draw(2, *grid, heads, 6)


def shares(rank: int) -> dict[str, object]:
    """The largest differences to the whole, and the bytes moved."""
    found = {}
    for name, (pattern, grid, axis, sizes) in CASES.items():
        q, k, v, extra, outer = tensors(grid)
        bias = None
        if name in BIASED:
            shape = pattern.bias_shape(grid, 4)
            bias = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whole = [t if t is None else t.clone().requires_grad_() for t in (q, k, v, *extra, bias)]
        options = dict(return_lse=True, backend="tiled")
        wanted, wanted_lse = attend(*whole[:3], pattern, extra_kv=whole[3:5], bias=whole[5], **options)
        (wanted * outer).sum().add(wanted_lse.sum()).backward()
        start = sum(sizes[:rank])
        cut = functools.partial(torch.narrow, dim=axis + 1, start=start, length=sizes[rank])
        for overlap in (True, False):
            own = [cut(t).clone().requires_grad_() for t in (q, k, v)]
            own += [t if t is None else t.clone().requires_grad_() for t in (*extra, bias)]
            options["parallel"] = Shards(axis, overlap=overlap)
            with count_traffic() as forward:
                out, lse = attend(*own[:3], pattern, extra_kv=own[3:5], bias=own[5], **options)
            with count_traffic() as backward:
                (out * cut(outer)).sum().add(lse.sum()).backward()
            pairs = [(out, cut(wanted)), (lse, cut(wanted_lse))]
            pairs += [(a.grad, cut(b.grad)) for a, b in zip(own[:3], whole[:3], strict=True)]
            for a, b in zip(own[3:], whole[3:], strict=True):
                if a is not None:  # every rank has a share of the gradient of what all of them have
                    dist.all_reduce(a.grad)
                    pairs.append((a.grad, b.grad))
            far = max((a - b).abs().max().item() for a, b in pairs)
            found[f"{name} {overlap}"] = far, forward.received, forward.sent, backward.received, backward.sent
    return found


def work(rank: int) -> dict[str, object]:
    groups = dist.new_group([0, 1]), dist.new_group([0])
    return {"shares": shares(rank), "said": wrong(rank, *groups) if rank < 2 else None}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What three processes found, which takes longer to start than to do."""
    return processes(work, 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_a_cut_grid_is_the_whole_grid(found, name):
    pattern, grid, axis, sizes = CASES[name]
    token = 2 * (8 + 6) * 8  # batch, dims, bytes
    parts = ((2, pattern),) if not isinstance(pattern, PerHead) else ((1, part) for _, part in pattern.parts)
    formula = torch.zeros(3, 2, dtype=torch.long)  # taken, given
    for kv_heads, part in parts:
        moved = [tokens_moved(part, grid, axis, sizes, rank) for rank in range(3)]
        formula += torch.tensor(moved) * token * kv_heads
    for overlap in (True, False):
        each = [one["shares"][f"{name} {overlap}"] for one in found]
        assert max(far for far, *_ in each) < 1e-12, each
        for (_, received, sent, back_received, back_sent), (takes, gives) in zip(each, formula.tolist(), strict=True):
            assert received == back_sent == takes and sent == back_received == gives


def tokens_moved(pattern, grid: tuple[int, ...], axis: int, sizes: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Tokens that a rank takes and gives, from the definition: who sees what, as a mask."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    owner = owner.view(-1, *[1] * (len(grid) - axis - 1)).expand(grid).flatten()
    if isinstance(pattern, Separable):
        # rows along the axis that any of a rank's rows sees, and what lies between them
        seen = dataclasses.replace(pattern, pooled=None) if isinstance(pattern, Circle) else pattern
        seen, rows = seen.mask(grid), torch.arange(grid[axis]).view(-1, *[1] * (len(grid) - axis - 1))
        rows, need = rows.expand(grid).flatten(), []
        for r in range(len(sizes)):
            reached = rows[seen[owner == r].any(0)]
            need.append((reached.min() <= rows) & (rows <= reached.max()))
    else:
        lists = pattern.lists(grid)
        blocks = map_from_lists(lists.index, lists.count, -(-len(owner) // lists.block[1])).reshape(
            -1, lists.index.shape[-2], -(-len(owner) // lists.block[1])
        ).any(0)  # fmt: skip
        seen = blocks.repeat_interleave(lists.block[0], 0).repeat_interleave(lists.block[1], 1)
        seen = seen[: len(owner), : len(owner)]
        assert not (pattern.mask(grid) & ~seen).any()
        need = [seen[owner == r].any(0) for r in range(len(sizes))]
    takes = int((need[rank] & (owner != rank)).sum())
    gives = sum(int((need[r] & (owner == rank)).sum()) for r in range(len(sizes)) if r != rank)
    if isinstance(pattern, Circle) and pattern.pooled:
        ends = [sum(sizes[: r + 1]) for r in range(len(sizes))]
        lines = [
            -(-end // pattern.pooled) - (end - size) // pattern.pooled for end, size in zip(ends, sizes, strict=True)
        ]
        line = math.prod(grid) // grid[axis] // pattern.pooled
        takes += line * (sum(lines) - lines[rank])
        gives += line * lines[rank] * (len(sizes) - 1)
    return takes, gives


def wrong(rank: int, group, alone) -> list[str]:
    """What is said when the calls of the ranks do not fit together."""
    both = functools.partial(Shards, group=group)
    q, k, v, _, _ = tensors((8, 6))
    same = functools.partial(attend, q, k, v)
    lists = torch.zeros(6, 6, dtype=torch.bool)
    lists[rank] = True
    said = []
    for change in (
        lambda: attend(q[: 1 + rank], k[: 1 + rank], v[: 1 + rank], Neighborhood(window=3), parallel=both()),
        lambda: attend(q[:, :, : 3 + rank], k[:, :, : 3 + rank], v[:, :, : 3 + rank], Dense(), parallel=both()),
        lambda: same(Neighborhood(window=3 + 2 * rank), parallel=both()),
        lambda: same(BlockList.from_mask(lists, 16), parallel=both()),
        lambda: same(Neighborhood(window=3), parallel=both(axis=rank)),
        lambda: same(Neighborhood(window=17), parallel=both()),
        lambda: same(Neighborhood(window=3), parallel=both(axis=2)),
        lambda: same(Neighborhood(window=3), parallel=both(axis="rows")),
        lambda: same(Circle(radius=2, pooled=5), parallel=both()),
        lambda: same(LengthDecay(train_frames=2), parallel=both()),
        lambda: same(BlockList.from_mask(torch.ones(5, 6, dtype=torch.bool), 16), parallel=both()),
        lambda: same(Neighborhood(window=3), bias=torch.zeros(4, 3, 3, dtype=q.dtype), parallel=both()),
        lambda: attend(q[:, :rank], k[:, :rank], v[:, :rank], Dense(), parallel=both()),
        lambda: same(Neighborhood(window=3), parallel=Shards(group=alone)) if rank else _refuse("is not in the group"),
        lambda: same(Neighborhood(window=3), parallel="rows"),
    ):
        try:
            change()
            said.append("nothing")
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said


def _refuse(text: str) -> None:
    raise ValueError(text)


def test_calls_that_do_not_fit_together(found):
    for rank, said in enumerate(one["said"] for one in found[:2]):
        for text, part in zip(
            said,
            (
                "differ in batch: [1, 2]", "differ in grid: [3, 4]", "differ in pattern", "differ in pattern",
                "differ in axis: [0, 1]", "window", "has 2 axes", "axis='rows'", "cells of 5 x 5",
                "use the Ulysses parallelism", "BlockList has 5 rows, but 96 tokens", "bias must be [4, 5, 5]",
                "refused on rank 0" if rank else "every size of a grid",
                "is not in the group", "parallel must be Shards",
            ),
            strict=True,
        ):  # fmt: skip
            assert part in text, (part, text)


def test_parallel_without_a_process_group():
    q, k, v, _, _ = tensors((4, 4))
    with pytest.raises(ValueError, match="init_process_group"):
        attend(q, k, v, Neighborhood(window=3), parallel=Shards())
