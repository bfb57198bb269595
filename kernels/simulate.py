"""What a pattern costs before anything runs: bounds by tile pair, bytes moved, and a predicted time on a device.

Times are predictions from a device profile, never measurements: the longest of the arithmetic of all visited tiles,
keys and values read tile by tile from the cache, and inputs and outputs moved once, each at the rate of the profile.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import torch

from .patterns import Blocked, Dense, Pattern, Separable
from .rates import Profile, load_profile, short
from .tiles import CHUNK_COST, KEY_COST, TILE_COST, best_bound, bound, cut, tile_sides
from .traffic import size as _bytes

SIZES = (64, 128)  # queries and keys per tile that GPU kernels work with


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One way to cut the problem into tiles: `queries` x `keys` tokens, of shapes `query_tile` and `key_tile`.

    `aligned` key tiles start at multiples of their sides, which takes tokens copied into tile order; the others start
    where the keys of a query tile start. `bound` is the speed-up over dense at equal arithmetic rate, `full` the share
    of visited tiles that need no mask, `loads` the bytes of keys and values read tile by tile, mostly from the cache.
    `seconds` is predicted, copies included; None where the profile has no rate.
    """

    queries: int
    keys: int
    aligned: bool
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    bound: float
    full: float
    loads: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Answer of `simulate`; print it for a table, `to_dict` for JSON.

    `inputs_outputs` and `copies` are bytes: q, k, v and out once, and what copying them into tile order and back takes.
    `seconds` holds predicted times by way of computing that does not depend on the choice of tiles, "dense" first.
    """

    pattern: Pattern
    grid: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    profile: Profile
    density: float
    bound: float
    tiles: tuple[Tiles, ...]
    inputs_outputs: int
    copies: int
    seconds: dict[str, float]

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest way that leaves out what is not visible, and its predicted seconds; any way for `Dense`."""
        ways = {f"{_pair(t)} {_kind(self.pattern, t)}": t.seconds for t in self.tiles if t.seconds is not None}
        ways |= {
            way: seconds for way, seconds in self.seconds.items() if way != "dense" or isinstance(self.pattern, Dense)
        }
        return min(ways.items(), key=lambda item: item[1]) if ways else None

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= {"pattern": self.pattern.to_dict(), "grid": list(self.grid), "dtype": short(self.dtype)}
        plain |= {"profile": dataclasses.asdict(self.profile), "tiles": [dataclasses.asdict(t) for t in self.tiles]}
        for each in (plain, *plain["tiles"]):  # nothing is visible: no bound, and JSON knows no infinity
            each["bound"] = None if math.isinf(each["bound"]) else each["bound"]
        return plain | {"predicted": True}

    def __str__(self) -> str:
        tokens = math.prod(self.grid)
        size = " x ".join(map(str, self.grid)) + (f" = {tokens}" if len(self.grid) > 1 else "")
        heads = f"{self.heads} heads of {self.head_dim}" if self.heads > 1 else f"1 head of {self.head_dim}"
        lines = [
            f"{self.pattern}",
            f"on {size} tokens, {heads}, {short(self.dtype)}",
            f"density {self.density:.1%}: at most {self.bound:.4g} times faster than dense",
            "",
            f"{'tile pair':<10} {'key tiles':<10} {'bound':>6} {'full':>5}  {'best shapes':<22} {'K/V loads':>10} "
            f"{'predicted':>10}",
        ]
        for t in self.tiles:
            shapes = f"{_sides(t.query_tile)} / {_sides(t.key_tile)}"
            lines.append(
                f"{_pair(t):<10} {_kind(self.pattern, t):<10} {t.bound:>6.2f} {t.full:>5.0%}  {shapes:<22} "
                f"{_bytes(t.loads):>10} {'-' if t.seconds is None else _time(t.seconds):>10}"
            )
        copies = f"; {_bytes(self.copies)} more to copy them into aligned tiles and back" if self.copies else ""
        lines += ["", f"q, k, v and out: {_bytes(self.inputs_outputs)}{copies}"]
        return "\n".join(lines + self._prediction())

    def _prediction(self) -> list[str]:
        profile = self.profile
        lines = [f"predicted, not measured, for {profile.device} ({profile.origin}):"]
        rates = profile.flops_per_s.get(short(self.dtype))
        if not rates:
            known = ", ".join(profile.flops_per_s)
            return [*lines, f"  no rate for {short(self.dtype)} in this profile; it has {known}"]
        lines += [f"  {way:<8} {_time(seconds)}" for way, seconds in self.seconds.items()]
        if self.best and "dense" in self.seconds and not isinstance(self.pattern, Dense):
            way, seconds = self.best
            lines.append(f"  {self.seconds['dense'] / seconds:.3g} times faster than dense with {way}")
        if profile.head_dim != self.head_dim:
            lines.append(f"  the rates of this profile were taken at head_dim {profile.head_dim}, not {self.head_dim}")
        return lines

    __repr__ = __str__


def simulate(
    pattern: Pattern,
    grid: tuple[int, ...],
    *,
    heads: int = 1,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str | os.PathLike = "h100",
) -> Simulation:
    """What a forward call costs: bounds by tile pair, bytes moved, and predicted times on a device.

    Args:
        pattern: who sees whom; Separable patterns get every pair of tile sizes, patterns of block lists their own.
        grid: sizes in tokens, one to three axes.
        heads: attention heads, times the batch.
        head_dim: channels per head, of values too.
        dtype: of the inputs.
        device: name or file of a profile, see `load_profile`.

    Raises:
        TypeError, ValueError: a pattern that does not fit the grid or has neither intervals nor lists, sizes below 1,
            or an unknown profile.

    >>> from vision_attn import Neighborhood
    >>> answer = simulate(Neighborhood((18, 24, 24)), (30, 48, 80), heads=24)
    >>> [f"{t.queries} x {t.keys}: {t.bound:.2f}" for t in answer.tiles if not t.aligned]
    ['64 x 64: 7.79', '64 x 128: 7.53', '128 x 64: 7.20', '128 x 128: 6.99']
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as Neighborhood(window=7) or Dense(); got {pattern!r}")
    for name, value in (("heads", heads), ("head_dim", head_dim)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    grid = tuple(grid)
    pattern.check(grid)
    profile = load_profile(device)
    rates = profile.flops_per_s.get(short(dtype), {})
    flops = 4.0 * head_dim * heads  # per query-key pair
    moved = 4 * math.prod(grid) * heads * head_dim * dtype.itemsize
    in_order = not isinstance(pattern, Separable)
    copies = 0 if in_order else 2 * moved

    def slower(arithmetic: float, loads: float = 0, extra: int = 0) -> float:
        loading = loads / profile.cache_bytes_per_s if profile.cache_bytes_per_s else 0
        return max(arithmetic, loading, moved / profile.bytes_per_s) + extra / profile.bytes_per_s

    tiles = []
    for queries, keys, aligned, query_tile, key_tile, by_tiles, full in _tilings(pattern, grid):
        pairs = math.prod(grid) ** 2 / by_tiles if by_tiles < math.inf else 0
        loads = round(pairs / queries * 2 * head_dim * heads * dtype.itemsize)
        seconds = None
        if "full" in rates:
            arithmetic = flops * pairs * (full / rates["full"] + (1 - full) / rates["masked"])
            seconds = slower(arithmetic, loads, copies if aligned else 0)
        tiles.append(Tiles(queries, keys, aligned, query_tile, key_tile, by_tiles, full, loads, seconds))
    seconds = {"dense": slower(flops * math.prod(grid) ** 2 / rates["dense"])} if "dense" in rates else {}
    ways = [] if isinstance(pattern, Dense) else [way for way in rates if way not in ("dense", "full", "masked")]
    for way in ways:
        seconds[way] = slower(flops * gathered_pairs(pattern, grid) / rates[way])
    density = pattern.density(grid)
    by_density = 1 / density if density else math.inf
    return Simulation(
        pattern, grid, heads, head_dim, dtype, profile, density, by_density, tuple(tiles), moved, copies, seconds
    )


def predict(pattern: Pattern, grid: tuple[int, ...], **options: Any) -> float:
    """Predicted seconds of a forward call, by the fastest way that the profile knows; arguments as for `simulate`.

    `Dense()` gives the time of dense attention.

    Raises:
        ValueError: also when the profile has no rate for the dtype.

    >>> from vision_attn import Dense, Neighborhood
    >>> round(predict(Dense(), (256, 256), heads=24) / predict(Neighborhood(80, stride=16), (256, 256), heads=24), 1)
    11.7
    """
    answer = simulate(pattern, grid, **options)
    if isinstance(pattern, Dense) and "dense" in answer.seconds:
        return answer.seconds["dense"]
    if answer.best is None:
        known = ", ".join(answer.profile.flops_per_s)
        raise ValueError(f"the profile of {answer.profile.device} has no rate for {short(answer.dtype)}, only {known}")
    return answer.best[1]


def _tilings(pattern: Pattern, grid: tuple[int, ...]):
    """Queries, keys, aligned, shapes, bound and share of full tiles of every tiling that is looked at."""
    if isinstance(pattern, Separable):
        further_test = pattern.inside(grid) is not None or pattern.score_rule(grid) is not None
        for queries, keys, aligned in itertools.product(SIZES, SIZES, (True, False)):
            by_tiles, query_tile, key_tile = best_bound(pattern, grid, queries, keys, aligned)
            full = 0.0 if further_test else bound(pattern, grid, query_tile, key_tile, aligned)[1]
            yield queries, keys, aligned, query_tile, key_tile, by_tiles, full
    else:
        block, visits, full = _listed(pattern, grid)
        by_tiles = math.prod(grid) ** 2 / (visits * math.prod(block)) if visits else math.inf
        full = 0.0 if pattern.score_rule(grid) is not None else full / visits if visits else 1.0
        yield *block, True, block[:1], block[1:], by_tiles, full


def _listed(pattern: Pattern, grid: tuple[int, ...]) -> tuple[tuple[int, int], float, float]:
    """Block size, visited blocks and full blocks of a pattern of block lists, per head."""
    if not isinstance(pattern, Blocked):
        raise TypeError(
            f"{type(pattern).__name__} has neither intervals nor block lists; simulate its parts one by one"
        )
    lists = pattern.lists(grid)
    visits, full = (float(t.double().sum(-1).mean()) for t in (lists.count, lists.full_count))
    return lists.block, visits, full


@functools.lru_cache(maxsize=256)
def gathered_pairs(pattern: Pattern, grid: tuple[int, ...]) -> float:
    """What the tiled backend works through per head: query-key pairs in its boxes, plus copying keys and starting tiles
    in equivalent pairs."""
    if isinstance(pattern, Separable):
        rows = []
        for axis, side in zip(pattern.axes(grid), tile_sides(pattern, grid), strict=True):
            boxes = [(stop - first, high - low) for first, stop, low, high in cut(axis, side)]
            rows.append((sum(q * k for q, k in boxes), sum(k for _, k in boxes), len(boxes), len(set(boxes))))
        pairs, keys, tiles, kinds = map(math.prod, zip(*rows, strict=True))
    else:
        block, visits, _ = _listed(pattern, grid)
        pairs, keys = visits * math.prod(block), visits * block[1]
        tiles = kinds = -(-math.prod(grid) // block[0])
    return pairs + KEY_COST * keys + TILE_COST * tiles + CHUNK_COST * kinds


def _pair(tiles: Tiles) -> str:
    return f"{tiles.queries} x {tiles.keys}"


def _kind(pattern: Pattern, tiles: Tiles) -> str:
    return "listed" if not isinstance(pattern, Separable) else "aligned" if tiles.aligned else "unaligned"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
