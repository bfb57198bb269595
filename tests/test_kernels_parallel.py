"""Attention on a cut grid equals attention on the whole one, and moves the bytes that the formula says."""

from __future__ import annotations

import datetime
import functools
import json
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vision_attn import Circle, Dense, Neighborhood, PerHead, SlidingTile, Window, attend
from vision_attn.kernels.parallel import Shards, count_traffic, route

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
    "disc": (Circle(radius=3), (11, 7), 0, (4, 3, 4)),
    "dense": (Dense(), (6, 4), 0, (1, 2, 3)),
    "heads": (PerHead(((2, Neighborhood(window=3)), (2, Dense()))), (9, 4), 0, (3, 3, 3)),
}


def processes(work: Callable[[int], object], count: int, folder: Path) -> list:
    """What `work(rank)` gives, as JSON, on each of some processes that share a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_enter, (work, count, port, folder), nprocs=count, start_method="spawn")
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
        whole = [t.clone().requires_grad_() for t in (q, k, v)]
        wanted, wanted_lse = attend(*whole, pattern, extra_kv=extra, return_lse=True, backend="tiled")
        (wanted * outer).sum().add(wanted_lse.sum()).backward()
        start = sum(sizes[:rank])
        cut = functools.partial(torch.narrow, dim=axis + 1, start=start, length=sizes[rank])
        for overlap in (True, False):
            own = [cut(t).clone().requires_grad_() for t in (q, k, v)]
            shards = Shards(axis, overlap=overlap)
            with count_traffic() as forward:
                out, lse = attend(*own, pattern, extra_kv=extra, return_lse=True, parallel=shards, backend="tiled")
            with count_traffic() as backward:
                (out * cut(outer)).sum().add(lse.sum()).backward()
            pairs = [(out, cut(wanted)), (lse, cut(wanted_lse))]
            pairs += [(a.grad, cut(b.grad)) for a, b in zip(own, whole, strict=True)]
            far = max((a - b).abs().max().item() for a, b in pairs)
            found[f"{name} {overlap}"] = far, forward.received, forward.sent, backward.received, backward.sent
    return found


def test_a_cut_grid_is_the_whole_grid(tmp_path):
    found = processes(shares, 3, tmp_path)
    for name, (pattern, grid, axis, sizes) in CASES.items():
        for overlap in (True, False):
            each = [one[f"{name} {overlap}"] for one in found]
            assert max(far for far, *_ in each) < 1e-12, (name, each)
            if isinstance(pattern, PerHead):
                continue
            plan = route(pattern, grid, axis, sizes)
            row = 2 * torch.Size(grid).numel() // grid[axis] * 2 * (8 + 6) * 8  # batch, KV heads, dims, bytes
            for rank, (_, received, sent, back_received, back_sent) in enumerate(each):
                assert received == back_sent == plan.received(rank) * row
                assert sent == back_received == sum(b - a for a, b in (plan.rows(rank, r) for r in range(3))) * row


def wrong(rank: int) -> list[str]:
    """What is said when the calls of the ranks do not fit together."""
    q, k, v, _, _ = tensors((8, 6))
    said = []
    for change in (
        lambda: attend(q[: 1 + rank], k[: 1 + rank], v[: 1 + rank], Neighborhood(window=3), parallel=Shards()),
        lambda: attend(q[:, :, : 3 + rank], k[:, :, : 3 + rank], v[:, :, : 3 + rank], Dense(), parallel=Shards()),
        lambda: attend(q, k, v, Neighborhood(window=3 + 2 * rank), parallel=Shards()),
        lambda: attend(q, k, v, Neighborhood(window=17), parallel=Shards()),
        lambda: attend(q, k, v, Neighborhood(window=3), parallel=Shards(axis=2)),
        lambda: attend(q, k, v, Circle(radius=2, pooled=2), parallel=Shards()),
    ):
        try:
            change()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_calls_that_do_not_fit_together(tmp_path):
    for said in processes(wrong, 2, tmp_path):
        for text, part in zip(
            said,
            (
                "differ in batch: [1, 2]", "differ in grid: [3, 4]", "differ in pattern", "window", "has 2 axes",
                "pooled keys of the whole grid",
            ),
            strict=True,
        ):  # fmt: skip
            assert part in text, (part, text)
