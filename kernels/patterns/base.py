"""What every pattern can do, and the part that all separable patterns share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Union

import torch

MOST_TOKENS = 2**31 - 1  # kernels number them in int32
Ints = Union[int, "tuple[int, ...]"]
Predicate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ScoreRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Tensors = Union["tuple[torch.Tensor, torch.Tensor]", None]


class Pattern:
    """Who may look at whom on a grid of tokens. Subclasses are frozen dataclasses whose fields are their options.

    A grid is a tuple of one to three sizes in tokens, for example `(t, h, w)`. Tokens are numbered row-major, last axis
    fastest.
    """

    name: ClassVar[str] = ""

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise ValueError when the pattern cannot be laid on `grid`."""
        check_grid(grid)

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        """Return a function of two integer tensors, query token and key token, that says whether the query sees the
        key."""
        raise NotImplementedError

    def mask(self, grid: tuple[int, ...], device: Any = "cpu") -> torch.Tensor:
        """The definition: bool `[tokens, tokens]`, True where the row's query sees the column's key. For small
        grids."""
        self.check(grid)
        tokens = torch.arange(math.prod(grid), device=device)
        return self.predicate(grid, device)(tokens[:, None], tokens[None, :])

    def density(self, grid: tuple[int, ...]) -> float:
        """Share of the query-key pairs that are allowed, from 0 to 1."""
        raise NotImplementedError

    def is_dense(self, grid: tuple[int, ...]) -> bool:
        """Whether this is plain attention on `grid`: nothing is left out and nothing is changed."""
        plain = self.score_rule(grid) is None and type(self).prepare is Pattern.prepare
        return plain and self.density(grid) == 1.0

    def score_rule(self, grid: tuple[int, ...], device: Any = "cpu") -> ScoreRule | None:
        """A function of (scaled scores, query token, key token) that gives the scores to use; None leaves them as they
        are.

        The token numbers are integer tensors that broadcast against the scores. Extra tokens are not touched.
        """
        return None

    def prepare(
        self, k: torch.Tensor, v: torch.Tensor, extra_kv: Tensors, extra_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors, torch.Tensor | None]:
        """What `attend` does to keys, values and extra tokens before any backend sees them; by default nothing."""
        return k, v, extra_kv, extra_mask

    def bias_shape(self, grid: tuple[int, ...], heads: int) -> tuple[int, ...] | None:
        """Shape of the additive bias that `attend` takes with this pattern; None when it takes none."""
        return None

    def spread_bias(self, bias: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """The definition of `bias`: what it adds to the scaled scores, `[..., tokens, tokens]`. For small grids."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain JSON values; `Pattern.from_dict` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"pattern": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Pattern:
        """Rebuild a pattern from `to_dict`.

        >>> from vision_attn import Neighborhood
        >>> Pattern.from_dict(Neighborhood(window=(3, 5)).to_dict())
        Neighborhood(window=(3, 5), stride=1, dilation=1, causal=False)
        """
        from . import PATTERNS

        options = dict(data)
        name = options.pop("pattern", None)
        if name not in PATTERNS:
            raise ValueError(f"unknown pattern {name!r}; allowed: {', '.join(PATTERNS)}")
        cls = PATTERNS[name]
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
            )
        fields = dataclasses.fields(cls)
        absent = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in options]
        if absent:
            raise ValueError(f"{cls.__name__} needs {', '.join(absent)}; got {', '.join(options) or 'no options'}")
        return cls._from_options(options)

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> Pattern:
        return cls(**options)

    def spell(self) -> str:
        """The pattern without its tensors as the text of a Python literal, `("name", {option: value})`.

        Plain string building, because torch.compile traces it: a graph holds the text, and `vision_attn::attend` reads
        it.
        """
        return f"('{self.name}', {{" + ", ".join([f"'{n}': {getattr(self, n)!r}" for n in self.__match_args__]) + "})"

    def tensors(self) -> list[torch.Tensor]:
        """What `spell` leaves out."""
        return []


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a separable pattern, laid out so that the keys of every query are one interval.

    The coordinates of the axis are listed group by group (`order[p]` is the coordinate at position p; without dilation
    there is one group and `order` is 0, 1, 2, ...). The query at position p sees the keys at positions `lo[p] <= p' <
    hi[p]`, all of its own group. Both ends never decrease along the axis. `groups` holds the position where each group
    starts, then the extent.
    """

    order: tuple[int, ...]
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def extent(self) -> int:
        return len(self.order)

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """The position of every coordinate: the inverse of `order`."""
        places = [0] * self.extent
        for position, coordinate in enumerate(self.order):
            places[coordinate] = position
        return tuple(places)


class Separable(Pattern):
    """A pattern that is a product over the axes. A subclass gives the axes; everything else follows from them."""

    def axis(self, extent: int, index: int) -> Axis:
        """Intervals of axis number `index`, which is `extent` tokens long."""
        raise NotImplementedError

    def axes(self, grid: tuple[int, ...]) -> tuple[Axis, ...]:
        """Intervals of every axis; checks the grid."""
        return _axes(self, tuple(grid))

    def inside(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate | None:
        """A further test on (query token, key token), for shapes that are not quite a product over the axes."""
        return None

    def reach(self, rank: int) -> tuple[int, ...] | None:
        """Per axis, one more than the largest distance between a query and a key, in steps of the dilation.

        With it the pattern takes a relative bias `[heads, *(2 * reach - 1)]`, whose entry `key - query + reach - 1` is
        added to the score. None: it takes no bias.
        """
        return None

    def bias_shape(self, grid: tuple[int, ...], heads: int) -> tuple[int, ...] | None:
        reach = self.reach(len(grid))
        return None if reach is None else (heads, *(2 * r - 1 for r in reach))

    def spread_bias(self, bias: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        index = torch.zeros(1, 1, dtype=torch.long, device=bias.device)
        for axis, reach in zip(self.axes(grid), self.reach(len(grid)), strict=True):
            place = torch.tensor(axis.places, device=bias.device)
            offset = (place - place[:, None] + reach - 1).clamp(0, 2 * reach - 2)  # out of reach: not allowed anyway
            index = (index[:, None, :, None] * (2 * reach - 1) + offset[:, None]).flatten(2).flatten(0, 1)
        return bias.flatten(1)[:, index]

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        tables = []
        for axis in self.axes(grid):
            rows = (axis.places, [axis.lo[p] for p in axis.places], [axis.hi[p] for p in axis.places])
            tables.append([torch.tensor(row, device=device) for row in rows])
        inside = self.inside(grid, device)

        def allowed(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = None if inside is None else inside(query, key)
            for (place, lo, hi), extent in zip(reversed(tables), reversed(grid), strict=False):
                x, y = query % extent, place[key % extent]
                query, key = query // extent, key // extent
                here = (lo[x] <= y) & (y < hi[x])
                seen = here if seen is None else seen & here
            return seen

        return allowed

    def density(self, grid: tuple[int, ...]) -> float:
        return math.prod(sum(a.hi) - sum(a.lo) for a in self.axes(grid)) / math.prod(grid) ** 2


@functools.lru_cache(maxsize=256)
def _axes(pattern: Separable, grid: tuple[int, ...]) -> tuple[Axis, ...]:
    pattern.check(grid)
    return tuple(pattern.axis(extent, index) for index, extent in enumerate(grid))


def plain_axis(intervals: list[tuple[int, int]]) -> Axis:
    """An axis without dilation: one `(first, one past the last)` pair per coordinate."""
    extent = len(intervals)
    return Axis(tuple(range(extent)), tuple(a for a, _ in intervals), tuple(b for _, b in intervals), (0, extent))


def check_grid(grid: Any, rank: tuple[int, ...] = (1, 2, 3)) -> None:
    if not isinstance(grid, tuple) or not all(is_int(n) for n in grid):
        raise TypeError(f"grid must be a tuple of ints, sizes in tokens such as (t, h, w); got {grid!r}")
    if len(grid) not in rank:
        raise ValueError(f"grid {grid} has {len(grid)} axes; allowed: {' or '.join(map(str, rank))}")
    if min(grid) < 1:
        raise ValueError(f"every size of a grid must be at least 1; got {grid}")
    if math.prod(grid) > MOST_TOKENS:
        raise ValueError(f"grid {grid} has {math.prod(grid)} tokens; allowed: up to {MOST_TOKENS}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def set_ints(pattern: Pattern, minimum: int, *names: str) -> None:
    """Check fields that hold an int or one int per axis, and turn lists (JSON) into tuples."""
    for name in names:
        value = getattr(pattern, name)
        value = tuple(value) if isinstance(value, list) else value
        entries = value if isinstance(value, tuple) else (value,)
        where = f"{type(pattern).__name__}({name}={value!r})"
        if not all(is_int(n) for n in entries):
            raise TypeError(f"{where}: {name} must be an int, or a tuple with one int per axis")
        if not 1 <= len(entries) <= 3:
            raise ValueError(
                f"{where}: {name} has {len(entries)} entries; give one int, or one per axis of a grid of 1 to 3 axes"
            )
        if min(entries) < minimum:
            raise ValueError(f"{where}: {name} must be at least {minimum} on every axis")
        object.__setattr__(pattern, name, value)


def along(pattern: Pattern, name: str, rank: int) -> tuple:
    """A field as one entry per axis: a single value repeats, a tuple must fit the rank of the grid."""
    value = getattr(pattern, name)
    if not isinstance(value, tuple):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(
            f"{type(pattern).__name__}({name}={value}) has {len(value)} entries but the grid has {rank} axes; "
            f"give one value, or {rank}"
        )
    return value
