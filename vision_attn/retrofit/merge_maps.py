"""Which tokens are averaged into one, and how each gets its own place back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from vision_attn.merging import TokenMerge

ROWS = 5000  # similarities are computed for so many tokens at a time


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
    even, odd = every[prefix + prefix % 2 :: 2], every[prefix + 1 - prefix % 2 :: 2]
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
    sources, targets = _grid_numbers(*grid, prefix, method.cell, method.seed)
    return _roles(sources, targets, range(prefix), None, device)


def frame_roles(grid: tuple[int, int, int], special: int, method: TokenMerge, device: Any) -> Roles:
    """FastVGGT: targets are all tokens of some frames, special tokens, and one token per cell of the other frames."""
    absent = [frame for frame in method.dst_frames if frame >= grid[0]]
    if absent:
        raise ValueError(f"dst_frames={method.dst_frames}, but there are {grid[0]} frames; allowed: 0 to {grid[0] - 1}")
    sources, targets, kept, copies = _frame_numbers(
        *grid, special, method.cell, method.seed, method.dst_frames, method.protect
    )
    return _roles(sources, targets, kept, copies if method.strict else None, device)


def _roles(sources: Any, targets: Any, kept: Any, copies: Any, device: Any) -> Roles:
    def tensor(numbers: Any) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device=device)

    return Roles(tensor(sources), tensor(targets), tensor(kept), None if copies is None else tensor(copies))


# Plain numbers in and out, so that compiled code takes them as constants.


@torch.compiler.assume_constant_result
def _grid_numbers(height: int, width: int, prefix: int, cell: tuple[int, int], seed: int | None) -> tuple:
    targets = prefix + _cells((height, width), cell, _generator(seed))
    rest = torch.arange(prefix, prefix + height * width)
    return tuple(rest[~torch.isin(rest, targets)].tolist()), tuple(targets.tolist())


@torch.compiler.assume_constant_result
def _frame_numbers(
    frames: int,
    height: int,
    width: int,
    special: int,
    cell: tuple[int, int],
    seed: int | None,
    whole: tuple[int, ...],
    protect: float,
) -> tuple:
    length, generator = special + height * width, _generator(seed)
    targets = []
    for frame in range(frames):
        chosen = torch.arange(length)
        if frame not in whole:
            chosen = torch.cat([chosen[:special], special + _cells((height, width), cell, generator)])
        targets.append(frame * length + chosen)
    targets = torch.cat(targets)
    every = torch.arange(frames * length)
    count = int(protect * len(every))
    protected = every[:: len(every) // count][:count] if count else every[:0]
    target = torch.isin(every, targets)
    sources = every[~target & ~torch.isin(every, protected)]
    both = target[protected]
    return tuple(tuple(n.tolist()) for n in (sources, targets, protected[~both], protected[both]))


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


def _cells(grid: tuple[int, int], cell: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
    """One token number of every whole cell."""
    (height, width), (rows, columns) = grid, cell
    down, across = height // rows, width // columns
    corner = (torch.arange(down) * rows)[:, None] * width + torch.arange(across) * columns
    if generator is None:
        return corner.flatten()
    pick = torch.randint(rows * columns, (down, across), generator=generator)
    return (corner + pick // columns * width + pick % columns).flatten()


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)
