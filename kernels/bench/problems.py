"""The problems that are timed, by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch

from ..patterns import Dense, Neighborhood, Pattern, Radial, SlidingTile
from ..problem import Problem


def _gpu(pattern: Pattern, grid: tuple[int, ...], heads: int = 24, head_dim: int = 128, **options: Any) -> Problem:
    sizes = dict(heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim)
    return Problem(pattern, grid, dtype=torch.bfloat16, device="cuda", **sizes, **options)


def _cpu(pattern: Pattern, grid: tuple[int, ...], heads: int = 4, head_dim: int = 64, **options: Any) -> Problem:
    sizes = dict(heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim)
    return Problem(pattern, grid, dtype=torch.float32, device="cpu", **sizes, **options)


_FLUX, _HUNYUAN, _WAN = (256, 256), (30, 48, 80), (21, 45, 80)

GPU = {
    "flux-s16": _gpu(Neighborhood(80, stride=16), _FLUX),
    "flux-s1": _gpu(Neighborhood(80), _FLUX),
    "hunyuan-s16": _gpu(Neighborhood((18, 24, 24), stride=(16, 8, 8)), _HUNYUAN),
    "hunyuan-s1": _gpu(Neighborhood((18, 24, 24)), _HUNYUAN),
    "wan-s4": _gpu(Neighborhood((12, 24, 40), stride=(4, 8, 8)), _WAN),
    "wan-s1": _gpu(Neighborhood((12, 24, 40)), _WAN),
    "radial-wan": _gpu(Radial(decay=0.2), (18, 48, 80)),
    "vit-56": _gpu(Neighborhood(7), (56, 56), heads=4, head_dim=32, batch=64),
    "flux-s16-train": _gpu(Neighborhood(80, stride=16), _FLUX, needs_grad=True),
    "dense-16k": _gpu(Dense(), (16384,), heads=16),
}
# Sizes that a processor can do; a fixed window on four grids shows how time grows with the tokens.
GROWTH = {f"grow-{side}": _cpu(Neighborhood(13), (side, side)) for side in (32, 64, 128, 256)}
CPU = {
    "image-64": _cpu(Neighborhood(13), (64, 64)),
    "image-64-lse": _cpu(Neighborhood(13), (64, 64), return_lse=True),
    "image-64-train": _cpu(Neighborhood(13), (64, 64), needs_grad=True),
    "vit-56-small": _cpu(Neighborhood(7), (56, 56), head_dim=32, batch=2),
    "tiles-64": _cpu(SlidingTile(tile=8, window=3), (64, 64)),
    "video-8x24x24": _cpu(Neighborhood((5, 9, 9)), (8, 24, 24)),
    "radial-small": _cpu(Radial(decay=0.2, block=32), (18, 16, 24)),  # about as dense as radial-wan
    **GROWTH,
}
TINY = {
    "tiny-plain": _cpu(Neighborhood(3), (8, 8), heads=2, head_dim=16),
    "tiny-lse": _cpu(Neighborhood(3), (8, 8), heads=2, head_dim=16, return_lse=True),
    "tiny-train": _cpu(Neighborhood(3), (8, 8), heads=2, head_dim=16, needs_grad=True),
    "tiny-radial": _cpu(Radial(decay=0.5, block=16), (3, 4, 8), heads=2, head_dim=16),
}
SETS = {"cpu": CPU, "gpu": GPU, "tiny": TINY}
PROBLEMS = {**GPU, **CPU, **TINY}


def pick(names: str | None, device: str) -> dict[str, Problem]:
    """Problems by name or by set, separated by commas, on a device type; the set of the device when None.

    >>> list(pick("tiny-lse,dense-16k", "cpu"))
    ['tiny-lse', 'dense-16k']
    """
    chosen: dict[str, Problem] = {}
    for name in (names or {"cuda": "gpu"}.get(device, device)).split(","):
        name = name.strip()
        if name not in SETS and name not in PROBLEMS:
            close = difflib.get_close_matches(name, [*SETS, *PROBLEMS], 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            known = f"Sets: {', '.join(SETS)}. Problems: {', '.join(PROBLEMS)}"
            raise ValueError(f"unknown problem {name!r}{hint} {known}")
        chosen |= SETS.get(name) or {name: PROBLEMS[name]}
    return {name: dataclasses.replace(problem, device=device) for name, problem in chosen.items()}


def describe(problem: Problem) -> str:
    """One line: pattern, sizes, dtype and what is asked."""
    heads = f"batch {problem.batch}, {problem.heads} heads of {problem.head_dim}"
    asked = ("forward and backward" if problem.needs_grad else "forward") + ", with lse" * problem.return_lse
    grid = " x ".join(map(str, problem.grid))
    return f"{problem.pattern} on {grid} tokens, {heads}, {str(problem.dtype).removeprefix('torch.')}, {asked}"
