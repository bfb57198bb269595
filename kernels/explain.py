"""What would run, what would not and why, and how much there is to win."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from .backends import BACKENDS, choose, refuse
from .patterns import Pattern, PerHead, Separable
from .problem import DTYPES, Problem, check_bias, check_heads
from .tiles import best_bound


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One backend: `status` is "used", "by name" (it can, when named) or "cannot", with the reasons in words."""

    backend: str
    status: str
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Answer of `explain`; print it for a table, `to_dict` for JSON.

    `density` is the share of allowed query-key pairs, `bound` the most that leaving out the others can gain (1 /
    density), and `tile_bound` the most that a kernel can gain that works in the best tiles of 64 queries and 64 keys,
    `tiles`. A PerHead pattern has one explanation per part, in `parts`, and no backends of its own.
    """

    problem: Problem
    backends: tuple[Verdict, ...]
    density: float
    bound: float
    tile_bound: float
    tiles: str
    parts: tuple[Explanation, ...] = ()

    @property
    def used(self) -> str:
        """The backend that `attend` would use; of several parts, their backends."""
        if self.parts:
            return ", ".join(dict.fromkeys(part.used for part in self.parts))
        return next(v.backend for v in self.backends if v.status == "used")

    def to_dict(self) -> dict[str, Any]:
        problem = {f.name: getattr(self.problem, f.name) for f in dataclasses.fields(self.problem)}
        problem |= {
            "pattern": self.problem.pattern.to_dict(),
            "grid": list(self.problem.grid),
            "dtype": str(problem["dtype"]),
        }
        numbers = {name: getattr(self, name) for name in ("density", "bound", "tile_bound", "tiles", "used")}
        numbers = {n: None if isinstance(x, float) and math.isinf(x) else x for n, x in numbers.items()}
        parts = {"parts": [part.to_dict() for part in self.parts]} if self.parts else {}
        return {"problem": problem, "backends": [dataclasses.asdict(v) for v in self.backends], **numbers, **parts}

    def __str__(self) -> str:
        p = self.problem
        size = " x ".join(map(str, p.grid)) + (f" = {p.tokens}" if len(p.grid) > 1 else "")
        heads = f"{p.heads} heads of {p.head_dim}" if p.heads > 1 else f"1 head of {p.head_dim}"
        lines = [
            f"{p.pattern}",
            f"on {size} tokens, {heads}, {str(p.dtype).removeprefix('torch.')}, {p.device}"
            + (", backward" if p.needs_grad else ""),
            f"density {self.density:.1%}: at most {self.bound:.3g} times faster than dense, "
            f"{self.tile_bound:.3g} with {self.tiles}",
            *(str(part) for part in self.parts),
        ]
        lines += [f"  {v.backend:<10} {v.status:<8} {'; '.join(v.reasons)}".rstrip() for v in self.backends]
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    pattern: Pattern,
    grid: tuple[int, ...],
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    extra: int = 0,
    extra_mask: bool = False,
    bias: bool = False,
    return_lse: bool = False,
    needs_grad: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Say which backend `attend` would use for a problem, why the others would not do, and what sparsity can gain.

    Args:
        pattern: who sees whom.
        grid: sizes in tokens, one to three axes.
        batch, heads, kv_heads, head_dim, value_dim, dtype, device: sizes as in `attend`; no tensor is made.
        extra: number of extra KV tokens; `extra_mask` says whether they come with a mask.
        bias: whether the call has one.
        return_lse, needs_grad: what is asked of the call.
        backend: ask for this one; raises ValueError with the reasons when it cannot.

    Raises:
        TypeError, ValueError: as `attend` would.

    >>> from vision_attn import Neighborhood
    >>> answer = explain(Neighborhood(window=13), (64, 64), heads=4, dtype=torch.float64)
    >>> answer.used, round(answer.bound, 1), round(answer.tile_bound, 2)
    ('tiled', 24.2, 9.85)
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as Neighborhood(window=7) or Dense(); got {pattern!r}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
    grid = tuple(grid)
    pattern.check(grid)
    kv_heads = kv_heads or heads
    options = dict(
        batch=batch, head_dim=head_dim, value_dim=value_dim or head_dim, dtype=dtype, device=torch.device(device).type,
        extra=extra, extra_mask=extra_mask, bias=bias, return_lse=return_lse, needs_grad=needs_grad,
    )  # fmt: skip
    problem = Problem(pattern, grid, heads=heads, kv_heads=kv_heads, **options)
    if isinstance(pattern, PerHead):
        check_heads(pattern, heads, kv_heads, bias)
        parts = tuple(
            explain(part, grid, heads=n, kv_heads=n * kv_heads // heads, backend=backend, **options)
            for n, part in pattern.parts
        )
        density = pattern.density(grid)
        tile_bound = heads / sum(part.problem.heads / part.tile_bound for part in parts)
        return Explanation(
            problem,
            (),
            density,
            1 / density if density else math.inf,
            tile_bound,
            "the best tiles of every part",
            parts,
        )
    if bias:
        check_bias(pattern, grid, heads)
    used = choose(problem, backend)
    verdicts = []
    for name, module in BACKENDS.items():
        reasons, why = refuse(name, problem), module.by_name_only(problem)
        status = "used" if name == used else "cannot" if reasons else "by name"
        notes = reasons or ([why or f"{used} is preferred"] if name != used else [])
        verdicts.append(Verdict(name, status, tuple(notes)))
    density = pattern.density(grid)
    tile_bound, tiles = _tile_bound(pattern, grid)
    bound = 1 / density if density else math.inf
    return Explanation(problem, tuple(verdicts), density, bound, tile_bound, tiles)


def _tile_bound(pattern: Pattern, grid: tuple[int, ...]) -> tuple[float, str]:
    if isinstance(pattern, Separable):
        value, queries, keys = best_bound(pattern, grid)
        return value, f"tiles of {_sides(queries)} queries and {_sides(keys)} keys"
    lists = pattern.lists(grid)
    visits = float(lists.count.double().sum(-1).mean())
    tokens = math.prod(grid)
    area = visits * math.prod(lists.block)
    return tokens**2 / area if area else math.inf, f"blocks of {lists.block[0]} queries and {lists.block[1]} keys"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def support_table() -> str:
    """Markdown table of what each backend computes, by dtype and device, whatever is installed here."""
    from .patterns import Neighborhood

    cells = {(False, False): "no", (True, False): "forward", (True, True): "forward, backward"}
    devices = ("cpu", "cuda")
    lines = [
        "| backend | dtype | " + " | ".join(devices) + " |",
        "| --- | --- | " + " | ".join("---" for _ in devices) + " |",
    ]
    for name, module in reversed(BACKENDS.items()):
        for dtype in DTYPES:
            row = []
            for device in devices:
                sample = Problem(Neighborhood(7), (16, 16), dtype=dtype, device=device)
                able = [not module.limits(dataclasses.replace(sample, needs_grad=grad)) for grad in (False, True)]
                row.append(cells[able[0], able[1]])
            lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | " + " | ".join(row) + " |")
    return "\n".join(lines)
