"""Token merging: which tokens are averaged into one, and how each gets its own place back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

PARTITIONS = ("tome", "grid", "vggt")
ROWS = 5000  # similarities are computed for so many tokens at a time
_DEFAULT = {  # what None means in each partition
    "tome": {"ratio": 8, "protect": 0.0, "proportional": True},
    "grid": {"ratio": 0.5, "protect": 0.0, "proportional": False},
    "vggt": {"ratio": 0.9, "protect": 0.1, "proportional": False},
}


@dataclasses.dataclass(frozen=True)
class TokenMerge:
    """Fewer tokens: those that look alike are averaged. `attach(model, TokenMerge())` puts it into a transformer.

    - "tome": between attention and MLP of every block, for good: tokens go from layer to layer as averages, weighted
      by how many each stands for. Every other token may merge into one of the rest. After the last block all get their
      place back, so that maps and pooling keep their meaning.
    - "grid": around attention alone: one token of every cell takes in others, attention and its projections run on
      what is left, and each token gets the result of where it went. The rest of the block sees all tokens.
    - "vggt": the same for queries, keys and values, after rotary positions, over frames: the frames `dst_frames`,
      special tokens, and one token per cell of the other frames take in others.

    Args:
        partition: "tome", "grid" or "vggt".
        ratio: how many merge. "tome": an int per layer (8 by default), a pair `(int, inflect)` for a number that goes
            linearly from `int * (1 - inflect)` to `int * (1 + inflect)` over the layers, or a share of the patch tokens
            per layer; never more than half of them. Otherwise a share of all tokens, 0.5 for "grid" and 0.9 for "vggt";
            never more than may merge.
        protect: "vggt": share of the tokens, at equal distances, that never merge; 0.1 by default.
        cell: "grid" and "vggt": height and width of a cell in tokens.
        seed: picks the token of a cell, the same in every layer and call; None is the first one.
        dst_frames: "vggt": frames whose tokens all stay.
        num_special: "vggt": tokens before the grid of every frame; a tower that is known tells them itself.
        proportional: a key that stands for s tokens counts s times, by `log(s)` on its scores; by default for "tome".
        strict: "vggt": protected tokens that also take in others are kept twice, as in the published code.

    Raises:
        TypeError, ValueError: an option of the wrong kind, out of range, or of another partition.

    >>> TokenMerge(ratio=(8, -0.5)).schedule(4)
    [12, 9, 6, 4]

    Papers: Token Merging: Your ViT But Faster; Token Merging for Fast Stable Diffusion; FastVGGT.
    """

    partition: str = "tome"
    ratio: int | float | tuple[int, float] | None = None
    protect: float | None = None
    cell: int | tuple[int, int] = 2
    seed: int | None = 33
    dst_frames: tuple[int, ...] = (0,)
    num_special: int = 0
    proportional: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}; got {self.partition!r}")
        for name, value in _DEFAULT[self.partition].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("ratio", "cell", "dst_frames"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self._ratio_fits():
            allowed = "a share from 0 to 1"
            if self.partition == "tome":
                allowed = "an int of at least 0, a share from 0.0 to 0.5, or (int, inflect from -1 to 1)"
            raise ValueError(f"ratio of partition {self.partition!r} must be {allowed}; got {self.ratio!r}")
        if not _is_number(self.protect) or not 0 <= self.protect < 1:
            raise ValueError(f"protect must be a share, at least 0 and below 1; got {self.protect!r}")
        cell = self.cell if isinstance(self.cell, tuple) else (self.cell, self.cell)
        if len(cell) != 2 or not all(_is_count(n, 1) for n in cell):
            raise ValueError(f"cell must be one or two ints of at least 1; got {self.cell!r}")
        object.__setattr__(self, "cell", cell)
        if self.seed is not None and not _is_count(self.seed, 0):
            raise ValueError(f"seed must be an int of at least 0, or None; got {self.seed!r}")
        if not isinstance(self.dst_frames, tuple) or not all(_is_count(n, 0) for n in self.dst_frames):
            raise ValueError(f"dst_frames must be numbers of frames from 0; got {self.dst_frames!r}")
        if not _is_count(self.num_special, 0):
            raise ValueError(f"num_special must be an int of at least 0; got {self.num_special!r}")
        for name in ("proportional", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        self._check_partition()

    def _ratio_fits(self) -> bool:
        ratio = self.ratio
        if self.partition != "tome":
            return _is_number(ratio) and 0 <= ratio <= 1
        if isinstance(ratio, tuple):
            return len(ratio) == 2 and _is_count(ratio[0], 0) and _is_number(ratio[1]) and -1 <= ratio[1] <= 1
        return _is_count(ratio, 0) or (isinstance(ratio, float) and 0 <= ratio <= 0.5)

    def _check_partition(self) -> None:
        """Nothing that is given may have no effect."""
        others = {"protect": 0.0, "dst_frames": (0,), "num_special": 0, "strict": False}
        if self.partition == "tome":
            others |= {"cell": (2, 2), "seed": 33}
        if self.partition == "grid":
            others["proportional"] = False
        idle = [name for name, value in others.items() if self.partition != "vggt" and getattr(self, name) != value]
        if idle:
            raise ValueError(f"partition {self.partition!r} has no {', '.join(idle)}")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values, as of a pattern."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"pattern": "token-merge"} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def schedule(self, layers: int) -> list[int] | None:
        """Tokens that merge in each layer; None where that is a share of what is there."""
        if isinstance(self.ratio, float):
            return None
        count, inflect = self.ratio if isinstance(self.ratio, tuple) else (self.ratio, 0.0)
        low = int(count * (1 - inflect))
        step = (2 * count - 2 * low) / max(layers - 1, 1)
        return [int(low + step * layer) for layer in range(layers)]


@dataclasses.dataclass(frozen=True)
class Merge:
    """Where tokens went. `index` `[batch, tokens]` is the place of each among `count` averages; the tokens `copies` are
    kept once more behind them, and get their own place back from there."""

    index: torch.Tensor
    count: int
    copies: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens that are left."""
        return self.count + (0 if self.copies is None else len(self.copies))

    def merge(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Means over what went to the same place, `[batch, tokens, channels]` to `[batch, length, channels]`.

        Args:
            weight: `[batch, tokens]`, how many tokens each stands for already.
        """
        weight = torch.ones_like(self.index, dtype=torch.float32) if weight is None else weight
        share = (weight / self.sizes(weight)[:, : self.count].gather(1, self.index)).to(x.dtype)
        out = x.new_zeros(x.shape[0], self.count, x.shape[2])
        out = out.scatter_add(1, self.index[..., None].expand(x.shape), x * share[..., None])
        return out if self.copies is None else torch.cat([out, x[:, self.copies]], 1)

    def sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """How many tokens each of those that are left stands for, `[batch, length]`."""
        sums = weight.new_zeros(weight.shape[0], self.count).scatter_add(1, self.index, weight)
        return sums if self.copies is None else torch.cat([sums, weight[:, self.copies]], 1)

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """Give every token what is at its place: `[batch, length, channels]` to `[batch, tokens, channels]`."""
        index = self.index
        if self.copies is not None:
            index = index.clone()
            index[:, self.copies] = self.count + torch.arange(len(self.copies), device=index.device)
        return y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))


def most_alike(
    metric: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, merging: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every source the most similar target by cosine, and the sources in the order of that similarity.

    Args:
        metric: `[batch, tokens, channels]`.
        sources, targets: token numbers.
        merging: how many of the sources are going to merge; the order is not needed when all do.

    Returns:
        `[batch, sources]` each: numbers in `targets`, and numbers in `sources`, the best first.
    """
    metric = F.normalize(metric, dim=-1)
    aim = metric[:, targets].transpose(1, 2)
    best = [(metric[:, rows] @ aim).max(-1) for rows in sources.split(ROWS)]
    value, target = (torch.cat(part, 1) for part in zip(*best, strict=True))
    order = torch.arange(len(sources), device=metric.device).expand_as(target)
    return target, order if merging == len(sources) else value.argsort(dim=-1, descending=True, stable=True)


def alternate(metric: torch.Tensor, merging: int, prefix: int) -> Merge:
    """ToMe: tokens at even places, the first `prefix` apart, merge into those at odd places.

    Args:
        metric: `[batch, tokens, channels]`, by which tokens are alike: the mean of their keys over the heads.
        merging: tokens that merge, at most half of the patch tokens.

    Returns:
        A `Merge` whose result is: the first `prefix` tokens, the even ones that are left, the odd ones. Those that are
        left are in order of place, or without a prefix the most similar first, as in the published code.
    """
    batch, tokens, _ = metric.shape
    device = metric.device
    every = torch.arange(tokens, device=device)
    patches = every[prefix:]
    even, odd = patches[patches % 2 == 0], patches[patches % 2 == 1]
    target, order = most_alike(metric, even, odd, 0)
    gone, stay = order[:, :merging], order[:, merging:]
    if prefix:
        stay = stay.sort(-1).values
    index = every.expand(batch, tokens).clone()
    left = prefix + len(even) - merging
    index[:, odd] = left + torch.arange(len(odd), device=device)
    places = torch.arange(prefix, left, device=device).expand(batch, -1)
    index = index.scatter(1, even[stay], places)
    index = index.scatter(1, even[gone], left + target.gather(1, gone))
    return Merge(index, tokens - merging)


@dataclasses.dataclass(frozen=True)
class Roles:
    """Who may merge into whom; the rest stays as it is. Token numbers."""

    sources: torch.Tensor
    targets: torch.Tensor
    kept: torch.Tensor  # neither
    copies: torch.Tensor | None  # kept once more


def grid_roles(grid: tuple[int, int], prefix: int, method: TokenMerge, device: Any) -> Roles:
    """One target per whole cell; the other patch tokens are sources, the first `prefix` tokens are kept."""
    targets = prefix + _cells(grid, method, _generator(method.seed))
    rest = torch.arange(prefix, prefix + math.prod(grid))
    sources = rest[~torch.isin(rest, targets)]
    return Roles(sources.to(device), targets.to(device), torch.arange(prefix, device=device), None)


def frame_roles(grid: tuple[int, int, int], special: int, method: TokenMerge, device: Any) -> Roles:
    """FastVGGT: targets are all tokens of some frames, special tokens, and one token per cell of the other frames."""
    frames, height, width = grid
    length = special + height * width
    absent = [frame for frame in method.dst_frames if frame >= frames]
    if absent:
        raise ValueError(f"dst_frames={method.dst_frames}, but there are {frames} frames; allowed: 0 to {frames - 1}")
    generator = _generator(method.seed)
    targets = []
    for frame in range(frames):
        whole = torch.arange(length)
        if frame not in method.dst_frames:
            whole = torch.cat([whole[:special], special + _cells((height, width), method, generator)])
        targets.append(frame * length + whole)
    targets = torch.cat(targets)
    every = torch.arange(frames * length)
    count = int(method.protect * len(every))
    protected = every[:: len(every) // count][:count] if count else every[:0]
    target = torch.isin(every, targets)
    sources = every[~target & ~torch.isin(every, protected)]
    kept = protected[~target[protected]]
    copies = protected[target[protected]].to(device) if method.strict else None
    return Roles(sources.to(device), targets.to(device), kept.to(device), copies)


def towards(metric: torch.Tensor, roles: Roles, share: float) -> Merge:
    """The sources that are most like a target merge into it, `share` of all tokens if there are so many sources.

    The result is: kept tokens, sources that are left, targets, copies.
    """
    batch, tokens, _ = metric.shape
    merging = min(int(share * tokens), len(roles.sources))
    target, order = most_alike(metric, roles.sources, roles.targets, merging)
    gone, stay = order[:, :merging], order[:, merging:].sort(-1).values
    first = len(roles.kept)
    left = first + len(roles.sources) - merging
    device = metric.device
    index = torch.empty(batch, tokens, dtype=torch.long, device=device)
    index[:, roles.kept] = torch.arange(first, device=device)
    index[:, roles.targets] = left + torch.arange(len(roles.targets), device=device)
    index.scatter_(1, roles.sources[stay], torch.arange(first, left, device=device).expand(batch, -1))
    index.scatter_(1, roles.sources[gone], left + target.gather(1, gone))
    return Merge(index, tokens - merging, roles.copies)


def _cells(grid: tuple[int, int], method: TokenMerge, generator: torch.Generator | None) -> torch.Tensor:
    """One token number of every whole cell."""
    (height, width), (rows, columns) = grid, method.cell
    down, across = height // rows, width // columns
    corner = (torch.arange(down) * rows)[:, None] * width + torch.arange(across) * columns
    if generator is None:
        return corner.flatten()
    pick = torch.randint(rows * columns, (down, across), generator=generator)
    return (corner + pick // columns * width + pick % columns).flatten()


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
