"""One attention call shared by processes of this machine: halo exchange against gathering all keys, and Ulysses."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..attend import attend
from ..parallel import Shards, count_traffic
from ..patterns import Neighborhood
from ..routes import Part, route, span, spans
from ..traffic import even, volumes

COLUMNS = (
    "scaling", "ranks", "grid", "axis", "window", "heads", "head_dim", "way", "received", "predicted", "ms", "ms_min",
    "ms_max", "difference", "cores", "date",
)  # fmt: skip
RESULTS = Path(__file__).parents[1] / "results" / "parallel" / "cpu.csv"
PATIENCE = datetime.timedelta(seconds=300)


def problems(ranks: tuple[int, ...] = (1, 2, 4)) -> list[tuple[str, int, tuple[int, int]]]:
    """Scaling, ranks and grid: 64 x 256 tokens over two, and 64 x 128 tokens for each rank (weak scaling)."""
    strong = [("strong", n, (64, 256)) for n in ranks if n == 2]
    return strong + [("weak", n, (64, 128 * n)) for n in ranks]


def measure(
    scaling: str,
    ranks: int,
    grid: tuple[int, int],
    window: int = 13,
    heads: int = 4,
    head_dim: int = 64,
    rounds: int = 7,
) -> list[dict[str, Any]]:
    """Rows of one problem: bytes that the busiest rank received, and the time until the slowest rank had its result.

    The grid is cut along its second axis, float32, one thread per process, gloo over loopback. "all-gather" computes
    exactly what "halo" does, after gathering all keys; "ulysses" the whole grid for some of the heads.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        task = (ranks, port, folder, grid, window, heads, head_dim, rounds)
        mp.start_processes(_enter, task, nprocs=ranks, start_method="spawn")
        found = json.loads((Path(folder) / "found.json").read_text())
    predicted = {}
    if ranks > 1:
        options = dict(axis=1, heads=heads, head_dim=head_dim, dtype=torch.float32)
        (volume,) = volumes(Neighborhood(window), grid, [ranks], **options)
        predicted = {"halo": volume.halo, "all-gather": volume.all_gather, "ulysses": volume.ulysses}
    return [
        {
            "scaling": scaling, "ranks": ranks, "grid": "x".join(map(str, grid)), "axis": 1, "window": window,
            "heads": heads, "head_dim": head_dim, "way": way, "received": one["received"],
            "predicted": predicted.get(way, 0), "ms": round(statistics.median(one["times"]) * 1e3, 2),
            "ms_min": round(min(one["times"]) * 1e3, 2), "ms_max": round(max(one["times"]) * 1e3, 2),
            "difference": one["difference"], "cores": _cores(), "date": datetime.date.today().isoformat(),
        }
        for way, one in found.items()
    ]  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _enter(rank: int, ranks: int, port: int, folder: str, grid, window, heads, head_dim, rounds) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=PATIENCE
    )
    found = _compare(rank, ranks, grid, Neighborhood(window), heads, head_dim, rounds)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _compare(rank: int, ranks: int, grid, pattern, heads: int, head_dim: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *grid, heads, head_dim, generator=generator) for _ in range(3))
    start, stop = spans(even(grid[1], ranks))[rank]
    own = [t[:, :, start:stop].contiguous() for t in (q, k, v)]
    wanted = attend(q, k, v, pattern)[:, :, start:stop]
    if ranks == 1:
        calls: dict[str, Callable] = {"one process": lambda: attend(*own, pattern)}
    else:
        calls = {
            "halo": lambda: attend(*own, pattern, parallel=Shards(axis=1)),
            "all-gather": lambda: _gathered(own, pattern, grid, rank, ranks),
            "ulysses": lambda: _ulysses(own, pattern, grid, rank, ranks),
        }
        if heads % ranks:
            del calls["ulysses"]
    found = {}
    for way, call in calls.items():
        _RECEIVED["bytes"] = 0
        with count_traffic() as traffic:
            out = call()
        received = traffic.received + _RECEIVED["bytes"]
        far = torch.tensor([(out - wanted).abs().max()])
        dist.all_reduce(far, dist.ReduceOp.MAX)
        most = torch.tensor([received])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found[way] = {"received": int(most), "difference": float(f"{far.item():.2g}"), "times": []}
    for _ in range(rounds):  # the ways take turns
        for way, call in calls.items():
            dist.barrier()
            began = time.perf_counter()
            call()
            seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            found[way]["times"].append(seconds.item())
    return found


_RECEIVED = {"bytes": 0}  # by the ways below; the halo way counts by itself


def _all(tensor: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """The shares of all ranks side by side."""
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(parts, tensor)
    _RECEIVED["bytes"] += sum(p.nbytes for other, p in enumerate(parts) if other != rank)
    return torch.cat(parts, 2)


def _gathered(own, pattern, grid, rank: int, ranks: int) -> torch.Tensor:
    q, k, v = own
    k, v = _all(k, ranks, rank), _all(v, ranks, rank)
    plan = route(pattern, grid, 1, even(grid[1], ranks))
    rows = plan.own[rank]
    low, high = span(rows, plan.need[rank])
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, rows[0] - low, high - rows[1]))
    part = Part(pattern, grid, 1, (low, high), rows)
    return attend(padded, k[:, :, low:high], v[:, :, low:high], part)[:, :, rows[0] - low : rows[1] - low]


def _ulysses(own, pattern, grid, rank: int, ranks: int) -> torch.Tensor:
    whole = [_swap(t, 3, 2, ranks, rank) for t in own]
    return _swap(attend(*whole, pattern), 2, 3, ranks, rank)


def _swap(tensor: torch.Tensor, cut: int, join: int, ranks: int, rank: int) -> torch.Tensor:
    """A share along `join` becomes one along `cut`."""
    give = [t.contiguous() for t in tensor.chunk(ranks, cut)]
    take = [torch.empty_like(t) for t in give]
    take[rank] = give[rank]
    ops = [dist.P2POp(dist.isend, t, other) for other, t in enumerate(give) if other != rank]
    ops += [dist.P2POp(dist.irecv, t, other) for other, t in enumerate(take) if other != rank]
    for work in dist.batch_isend_irecv(ops):  # gloo has no all_to_all of lists
        work.wait()
    _RECEIVED["bytes"] += sum(t.nbytes for other, t in enumerate(take) if other != rank)
    return torch.cat(take, join)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows without a header."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown; values may be text, as read from the CSV."""
    lines = [
        "| scaling | processes | grid | way | received, kB | of all-gather's | ms (min to max) | halo is faster by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = {r["way"]: r for r in rows if (r["scaling"], r["ranks"]) == (row["scaling"], row["ranks"])}
        moved, share, faster = int(row["received"]) / 1e3, "-", "-"
        if "halo" in same:
            share = f"{moved * 1e3 / int(same['all-gather']['received']):.1%}"
            faster = f"{float(row['ms']) / float(same['halo']['ms']):.2f}"
        lines.append(
            f"| {row['scaling']} | {row['ranks']} | {row['grid'].replace('x', ' x ')} | {row['way']} | {moved:.0f} | "
            f"{share} | {float(row['ms']):.1f} ({float(row['ms_min']):.1f} to {float(row['ms_max']):.1f}) | {faster} |"
        )
    return "\n".join(lines)


def table() -> str:
    """The table of the rows that are kept with the package."""
    with open(RESULTS, newline="") as file:
        return as_table(list(csv.DictReader(file)))
