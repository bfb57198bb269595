"""Clocks: wall and CPU time of a call, interleaved rounds, peak memory, and what machine it was."""

from __future__ import annotations

import ctypes
import ctypes.util
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SHORTEST = 0.02  # seconds; a faster call is repeated within one measurement
Call = Callable[[], Any]


def clock(call: Call, device: str, repeat: int = 1) -> tuple[float, float | None]:
    """Seconds per call: on the wall (on a GPU between two events of its stream), and of the CPU in all threads."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeat, None
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat


def repeats(call: Call, device: str) -> int:
    """How many calls of one that is warm make a measurement long enough."""
    return max(1, min(100, round(SHORTEST / max(clock(call, device)[0], 1e-7))))


def interleave(calls: dict[str, Call], device: str, rounds: int) -> Iterator[dict[str, tuple[float, float | None]]]:
    """Time all calls once per round, one after the other, beginning with another one in every round."""
    names, often = list(calls), {name: repeats(call, device) for name, call in calls.items()}
    for index in range(rounds):
        first = index % max(len(names), 1)
        yield {name: clock(calls[name], device, often[name]) for name in names[first:] + names[:first]}


def seconds_per_call(call: Call, device: str, rounds: int = 7) -> float:
    """Seconds of the fastest of some measurements: what the machine can do when nobody disturbs it. With one thread it
    is CPU time, which others disturb least."""
    call()
    often = repeats(call, device)
    alone = device == "cpu" and torch.get_num_threads() == 1
    return min(clock(call, device, often)[alone] for _ in range(rounds))


def peak_bytes(call: Call, device: str) -> int | None:
    """The most memory that a call takes at a time, beyond what it returns; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        if not _reset_peak():
            return None
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    return max(peak - before - sum(t.nbytes for t in _tensors(result)), 0)


def _reset_peak() -> bool:
    """Give freed memory back to the system, so that it counts when it is taken again, and forget the old peak."""
    try:
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result or () for t in _tensors(part)]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def machine(device: str) -> dict[str, Any]:
    """Date, device, versions and commit, for the rows of results."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "date": datetime.date.today().isoformat(),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "natten")},
        "commit": commit,
    }


def _processor() -> str:
    """Model of the CPU; family and model number too where the name says little, as on virtual machines."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    number = f" (family {fields['cpu family']} model {fields['model']})" if "model" in fields else ""
    return f"{name}{number}, {os.cpu_count()} cores"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
