"""Which stride makes a window fast: the nearest window and stride that leave no tile partly filled."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import torch

from .patterns import Dense, Neighborhood
from .patterns.base import Ints, along, check_grid, is_int
from .rates import Profile, load_profile, short
from .simulate import predict
from .tiles import best_bound, bound, boxes

TILES = ((128, 128), (64, 64))  # queries and keys that GPU kernels work with, in the order they are tried
LARGEST = 2**22  # tokens up to which a break-even is looked for


@dataclasses.dataclass(frozen=True)
class Choice:
    """A window and a stride, and what they cost on `grid` with tiles of `query_tile` and `key_tile` tokens.

    `bound` is the speed-up over dense attention at equal arithmetic rate, and `full` the share of the visited tiles
    that need no mask. `aligned` key tiles start at multiples of their sides, others where the window of their queries
    starts. `overlap` is the share of query-key pairs in common with the wanted window at stride 1, of those that either
    has. `seconds` is the predicted time of a forward call and `break_even` the smallest grid of about these proportions
    on which it is predicted to be faster than dense attention; None without a profile of the device, or when there is
    none up to 4 million tokens. Predictions know rates only: what starting a kernel costs is not in them.
    """

    pattern: Neighborhood
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    aligned: bool
    bound: float
    full: float
    overlap: float
    seconds: float | None
    break_even: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Advice:
    """Answer of `advise`; print it, or `to_dict` for JSON.

    `wanted` is the window as given at stride 1, `nearest` the nearest choice without partly filled tiles, or None.
    `dense_seconds` is predicted; `note` says why there are no predictions.
    """

    grid: tuple[int, ...]
    wanted: Choice
    nearest: Choice | None
    device: str
    dense_seconds: float | None
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        def plain(choice: Choice | None) -> dict[str, Any] | None:
            return choice and dataclasses.asdict(choice) | {"pattern": choice.pattern.to_dict()}

        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return own | {"grid": list(self.grid), "wanted": plain(self.wanted), "nearest": plain(self.nearest)}

    def __str__(self) -> str:
        lines = ["as given:", *_describe(self.wanted)]
        if self.nearest is None:
            lines += ["no window near this one fills tiles of this size"]
        else:
            where = "" if self.nearest.aligned else ", where key tiles start at the window of their queries"
            lines += [f"nearest without partly filled tiles{where}:", *_describe(self.nearest)]
            lines += [f"  {self.nearest.overlap:.0%} of the query-key pairs are those of the window as given"]
        if self.note:
            return "\n".join([*lines, f"no predicted times: {self.note}"])
        lines += [f"predicted, not measured, for {self.device}:", f"  dense {_time(self.dense_seconds)}"]
        for name, choice in (("as given", self.wanted), ("nearest", self.nearest)):
            if choice is not None:
                size = choice.break_even
                where = f"from about {_sides(size)} tokens on" if size else "on no grid of these proportions"
                lines += [f"  {name} {_time(choice.seconds)}; faster than dense {where}"]
        return "\n".join(lines)

    __repr__ = __str__


def advise(
    grid: tuple[int, ...],
    window: Ints,
    *,
    tiles: tuple[int, int] | None = None,
    heads: int = 1,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str | os.PathLike = "h100",
) -> Advice:
    """Say which window and stride near the wanted ones leave no tile partly filled, and from which size on they pay.

    A tile of keys that all queries of a tile see completely needs no mask. At stride 1 many are not; with the strides
    found here all are. The window stays as it is where there are such strides for it; otherwise it moves to a multiple
    of the sides of a tile. Of what is left, choices count as near that have at least nine tenths of the overlap of the
    nearest one; of these the largest tiles are taken, and tiles that any kernel can use before others.

    Args:
        grid: sizes in tokens, one to three axes.
        window: wanted keys per axis, at stride 1; one int or one per axis.
        tiles: queries and keys per tile, powers of two from 16 to 128; None tries 128 x 128 and 64 x 64.
        heads, head_dim, dtype: of the call, for predicted times.
        device: name or file of a profile as in `simulate`; without one there are no predicted times.

    Raises:
        TypeError, ValueError: a window that does not fit the grid, or tiles of another size.

    >>> flux = advise((256, 256), 80)
    >>> flux.nearest.pattern.stride, round(flux.wanted.full, 2), flux.nearest.full
    ((16, 16), 0.64, 1.0)
    >>> advise((30, 48, 80), (18, 24, 24)).nearest.pattern.stride
    (2, 8, 8)

    Paper: Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light.
    """
    check_grid(grid)
    plain = Neighborhood(window)
    plain.check(grid)
    wanted = along(plain, "window", len(grid))
    sizes = TILES if tiles is None else (_check_tiles(tiles),)
    found = _nearest(grid, wanted, sizes)
    profile, note = _profile(device, dtype)
    options = dict(heads=heads, head_dim=head_dim, dtype=dtype, device=device)

    def choice(pattern: Neighborhood, shapes: tuple[tuple[int, ...], tuple[int, ...]], aligned: bool) -> Choice:
        by_tiles, full = bound(pattern, grid, *shapes, aligned)
        seconds = None if profile is None else predict(pattern, grid, **options)
        size = None if profile is None else _break_even(pattern, grid, options)
        return Choice(pattern, *shapes, aligned, by_tiles, full, _overlap(grid, wanted, pattern), seconds, size)

    pair, aligned = (sizes[0], False) if found is None else found[:2]
    return Advice(
        grid,
        choice(plain, best_bound(plain, grid, *pair)[1:], False),
        None if found is None else choice(*found[2:], aligned),
        str(device) if profile is None else f"{profile.device} ({profile.origin})",
        None if profile is None else predict(Dense(), grid, **options),
        note,
    )


def _nearest(grid, wanted, sizes):
    """Size of the tiles, whether they are aligned, pattern and shapes of the choice; None when there is none."""
    for keep in (True, False):
        options = []
        for pair, aligned in itertools.product(sizes, (True, False)):
            best = _best_shapes(grid, wanted, pair, aligned, keep)
            if best is not None:
                options.append((_overlap(grid, wanted, best[0]), pair, aligned, *best))
        if options:
            most = max(option[0] for option in options)
            return next(option[1:] for option in options if option[0] >= 0.9 * most)
    return None


def _best_shapes(grid, wanted, pair, aligned, keep):
    """Of all tile shapes those whose strides keep most in common and waste least on padding; with that pattern."""
    rank = len(grid)
    axes = [_full_tiles(extent, window, keep) for extent, window in zip(grid, wanted, strict=True)]
    best, chosen = 0.0, None
    for query_tile, key_tile in itertools.product(*(boxes(size, rank) for size in pair)):
        parts = [axis.get((tq, tk, aligned)) for axis, tq, tk in zip(axes, query_tile, key_tile, strict=True)]
        if all(parts) and (score := math.prod(part[0] for part in parts)) > best:
            window, stride = (tuple(part[i] for part in parts) for i in (1, 2))
            best, chosen = score, (Neighborhood(window, stride), (query_tile, key_tile))
    return chosen


@functools.lru_cache(maxsize=256)
def _full_tiles(extent: int, window: int, keep: bool) -> dict[tuple[int, int, bool], tuple[float, int, int]]:
    """On one axis, for sides of query and key tile and alignment: the window and stride that fill all tiles, if any.

    The first number is what they have in common with the wanted window at stride 1, times the share of queries that
    are not padding.
    """
    sides = [2**i for i in range(max(map(max, TILES)).bit_length())]
    x = torch.arange(extent)
    plain = _starts(x, window, 1)
    out = {}
    for keys in sides:
        near = {window} if keep else {window // keys * keys, -(-window // keys) * keys}
        for size in sorted(n for n in near if 0 < n <= extent and n % keys == 0):
            for stride in (s for s in sides if s <= size):
                start = _starts(x, size, stride)
                common = (torch.minimum(plain + window, start + size) - torch.maximum(plain, start)).clamp(min=0).sum()
                overlap = float(common / (extent * (window + size) - common))
                in_place = not bool((start % keys).any())
                for queries in sides:
                    if not torch.equal(start, start[x // queries * queries]):
                        break
                    score = overlap * extent / (-(-extent // queries) * queries)
                    for key in ((queries, keys, aligned) for aligned in (False, True) if in_place or not aligned):
                        if score > out.get(key, (0.0,))[0]:  # of equal ones the smallest stride
                            out[key] = score, size, stride
    return out


def _starts(x: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    leader = (x // stride * stride + stride // 2).clamp(max=len(x) - 1)
    return (leader - window // 2).clamp(0, len(x) - window)


def _overlap(grid: tuple[int, ...], wanted: tuple[int, ...], pattern: Neighborhood) -> float:
    """Query-key pairs in common with the wanted window at stride 1, of those that either has."""
    common = 1
    for mine, theirs in zip(Neighborhood(wanted).axes(grid), pattern.axes(grid), strict=True):
        ends = zip(mine.lo, mine.hi, theirs.lo, theirs.hi, strict=True)
        common *= sum(max(min(b, d) - max(a, c), 0) for a, b, c, d in ends)
    sizes = math.prod(grid) * (math.prod(wanted) + math.prod(along(pattern, "window", len(grid))))
    return common / (sizes - common)


def _break_even(pattern: Neighborhood, grid: tuple[int, ...], options: dict[str, Any]) -> tuple[int, ...] | None:
    """The smallest grid of about these proportions on which the pattern is predicted to win, by doubling, then halving
    steps."""
    window = along(pattern, "window", len(grid))

    def size(factor: float) -> tuple[int, ...]:
        return tuple(max(w, round(n * factor)) for n, w in zip(grid, window, strict=True))

    def wins(factor: float) -> bool:
        scaled = size(factor)  # a sparse kernel that sees everything is dense too: a faster kernel is not a sparser one
        dense = min(predict(way, scaled, **options) for way in (Dense(), Neighborhood(scaled)))
        return predict(pattern, scaled, **options) < dense

    low = high = min(w / n for n, w in zip(grid, window, strict=True))  # here every query sees every key
    while not wins(high):
        low, high = high, high * 2 ** (1 / len(grid))
        if math.prod(size(high)) > LARGEST:
            return None
    for _ in range(4):
        middle = (low + high) / 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return size(high)


def _profile(device: str | os.PathLike, dtype: torch.dtype) -> tuple[Profile | None, str | None]:
    try:
        profile = load_profile(device)
    except ValueError as error:
        return None, str(error)
    if short(dtype) in profile.flops_per_s:
        return profile, None
    known = ", ".join(profile.flops_per_s)
    return None, f"the profile of {profile.device} has no rate for {short(dtype)}, only for {known}"


def _check_tiles(tiles: Any) -> tuple[int, int]:
    pair = tuple(tiles) if isinstance(tiles, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_int(n) and n in (16, 32, 64, 128) for n in pair):
        raise ValueError(f"tiles must be two of 16, 32, 64 and 128, queries and keys; got {tiles!r}")
    return pair


def _describe(choice: Choice) -> list[str]:
    pattern = choice.pattern
    rank = len(choice.query_tile)
    window, stride = (_sides(along(pattern, name, rank)) for name in ("window", "stride"))
    kind = "aligned" if choice.aligned else "unaligned"
    shapes = f"{kind} tiles of {_sides(choice.query_tile)} queries and {_sides(choice.key_tile)} keys"
    return [
        f"  Neighborhood: window {window}, stride {stride}",
        f"  at most {choice.bound:.3g} times faster than dense with {shapes}, {choice.full:.0%} of them full",
    ]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
