"""Measuring this machine for a device profile."""

from __future__ import annotations

import math

import torch

from ..attend import attend
from ..backends import BACKENDS, refuse
from ..patterns import Dense, Neighborhood, Pattern
from ..problem import Problem
from ..rates import Profile, short
from ..simulate import gathered_pairs
from ..tiles import best_bound, bound
from .timing import machine, seconds_per_call

# Per device type: dtype, heads, head_dim, side of the grid, window, stride that leaves full tiles only, dense tokens.
SAMPLES = {
    "cpu": (torch.float32, 4, 64, 64, 13, None, 2048),
    "cuda": (torch.bfloat16, 24, 128, 256, 80, 16, 16384),
}
COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}


def measure(device: str = "cpu") -> Profile:
    """Time dense attention, sparse attention and a copy on this machine; some seconds on a CPU.

    On "cpu" the sparse rates are those of the backends `tiled` and, where it can run, `cpu`, per gathered query-key
    pair. On "cuda" they are those of full and of masked tiles of 128 x 128 with the backend that `attend` picks; this
    path has not been run on a GPU.
    """
    dtype, heads, head_dim, side, window, stride, tokens = SAMPLES[device]

    def rate(pattern: Pattern, grid: tuple[int, ...], pairs: float, backend: str | None = None) -> float:
        qkv = [torch.randn(1, *grid, heads, head_dim, device=device, dtype=dtype) for _ in range(3)]
        with torch.no_grad():
            return (
                4 * head_dim * heads * pairs / seconds_per_call(lambda: attend(*qkv, pattern, backend=backend), device)
            )

    rates = {"dense": rate(Dense(), (tokens,), tokens**2, "tiled")}  # which calls SDPA
    grid, pattern = (side, side), Neighborhood(window)
    if stride is None:
        problem = Problem(pattern, grid, 1, heads, heads, head_dim, head_dim, dtype, device)
        for name in ("tiled", "cpu"):
            if name in BACKENDS and not refuse(name, problem):
                rates[name] = rate(pattern, grid, gathered_pairs(pattern, grid), name)
    else:
        rates |= tile_rates(rate, grid, Neighborhood(window, stride), pattern)
    source, target = torch.empty(2, COPY_BYTES[device], dtype=torch.uint8, device=device)
    bandwidth = 2 * source.nbytes / seconds_per_call(lambda: target.copy_(source), device)
    what = machine(device)
    threads = f", {what['threads']} thread" + "s" * (what["threads"] > 1) if device == "cpu" else ""
    origin = f"measured on {what['date']} with torch {what['torch']}{threads}"
    problem = f"{pattern} on {grid[0]} x {grid[1]} tokens, {heads} heads of {head_dim}; dense {tokens} tokens"
    return Profile(
        what["device_name"], origin, head_dim, round(bandwidth),
        {short(dtype): {way: round(value) for way, value in rates.items()}},
        sources={"command": "vision-attn simulate --measure", "problem": problem},
    )  # fmt: skip


def tile_rates(rate, grid: tuple[int, ...], strided: Neighborhood, sliding: Neighborhood) -> dict[str, float]:
    """Rates of full and of masked tiles, from a pattern that has full tiles only and from one that has both."""
    pairs = math.prod(grid) ** 2
    full = rate(strided, grid, pairs / best_bound(strided, grid, 128, 128)[0])
    by_tiles, query_tile, key_tile = best_bound(sliding, grid, 128, 128)
    share = bound(sliding, grid, query_tile, key_tile)[1]
    both = rate(sliding, grid, pairs / by_tiles)
    # 1 / both = share / full + (1 - share) / masked, and a mask is never a gain
    return {"full": full, "masked": min((1 - share) / max(1 / both - share / full, 1e-30), full)}
