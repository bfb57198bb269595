"""Pictures of a pattern: who a query sees, how many keys each query sees, and the mask itself when it is small.

Where a pattern changes scores, the pictures show what scores of at least 0 are multiplied by.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .patterns import BlockList, Pattern, PerHead

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MASK_TOKENS = 400  # the mask is drawn up to this many tokens; a larger one would be grey dust
FRAMES = 10  # frames of a (t, h, w) grid that are drawn
PAIRS = 1 << 26  # query-key pairs looked at for the map of keys per query, about a second's work
COLORS = ["#f1f1ee", "#2a78b8", "#e0532f"]  # not seen, seen, the query


def draw(
    pattern: Pattern, grid: tuple[int, ...], query: tuple[int, ...] | None = None, path: str | os.PathLike | None = None
) -> Figure:
    """Draw what a query sees and how many keys each query sees; no `[tokens, tokens]` mask unless the grid is small.

    Args:
        pattern: any pattern that can be laid on `grid`.
        grid: sizes in tokens, one to three axes; the frames of a `(t, h, w)` grid are drawn side by side.
        query: coordinates of the query, one per axis; None takes the middle.
        path: where to write the picture (.png, .svg, .pdf); None only returns the figure.

    Raises:
        ValueError: a pattern that does not fit the grid, or a query outside it.
        TypeError: a BlockList or a PerHead, which have no one picture.

    >>> from vision_attn import Neighborhood
    >>> figure = draw(Neighborhood(window=3), (8, 8), query=(0, 7))
    >>> [part.get_suptitle() for part in figure.subfigs]  # doctest: +NORMALIZE_WHITESPACE
    ['what query (0, 7) sees: 9 of 64 keys', 'keys per query: 9 everywhere',
     'mask: query (down) by key (across)']
    """
    from matplotlib.figure import Figure

    if isinstance(pattern, BlockList):
        raise TypeError("BlockList can differ per head and per sample; draw pattern.mask(grid)[head] instead")
    if isinstance(pattern, PerHead):
        raise TypeError("PerHead has one picture per part; draw the patterns in pattern.parts")
    pattern.check(grid)
    query = tuple(size // 2 for size in grid) if query is None else tuple(query)
    if len(query) != len(grid) or not all(0 <= at < size for at, size in zip(query, grid, strict=True)):
        raise ValueError(
            f"query {query} is not on the grid {grid}; give {len(grid)} coordinates, each from 0 to size - 1"
        )
    tokens = math.prod(grid)
    seen = keys_seen(pattern, grid, query)
    shares = f"what query {_text(query)} sees: {int(seen.sum())} of {tokens} keys"
    pairs, look = _pairs(pattern, grid)
    token = torch.arange(tokens)
    marked = pairs(token.reshape(grid)[query][None], token).reshape(grid)
    if look["bar"]:
        shares += "\nand what scores that are not negative are multiplied by"
    else:
        marked[query] = 2
    counts, steps = keys_per_query(pattern, grid)
    low, high = int(counts.min()), int(counts.max())
    spread = f"keys per query: {low} to {high}" if low < high else f"keys per query: {low} everywhere"
    if max(steps) > 1:
        spread += f" (counted at every {_text(steps)}-th token)"

    frames = _frames(marked, query[0])
    for axis, step in enumerate(steps):  # every counted query stands for its neighbours
        counts = counts.repeat_interleave(step, axis).narrow(axis, 0, grid[axis])
    counted = _frames(counts, query[0])
    with_mask = tokens <= MASK_TOKENS
    panels = 2 + with_mask
    if len(grid) == 2:
        figure = Figure(figsize=(4.4 * panels, 4.6), layout="constrained", dpi=120)
        parts = figure.subfigures(1, panels)
    else:
        row = 1.3 if len(grid) == 1 else 0.8 + min(1.6 * grid[1] / grid[2], 3.0)
        heights = [row, row] + [4.2] * with_mask
        figure = Figure(figsize=(max(7.0, 1.6 * len(frames) + 1.0), sum(heights) + 0.6), layout="constrained", dpi=120)
        parts = figure.subfigures(panels, 1, height_ratios=heights)
    sizes = " x ".join(map(str, grid))
    figure.suptitle(f"{pattern}\ngrid {sizes}, density {pattern.density(grid):.1%}", fontsize=9)
    own = _panel(parts[0], shares, frames, **look)[f"t = {query[0]}" if len(grid) == 3 else ""]
    if max(grid) > 24 or look["bar"]:  # a single cell is hard to find, or has no colour of its own
        own.plot(query[-1], query[-2] if len(grid) > 1 else 0, "o", mfc="none", mec=COLORS[2], ms=9)
    _panel(parts[1], spread, counted, bar=True, cmap="viridis", vmin=0, vmax=high)
    if with_mask:
        mask = {"": pairs(token[:, None], token)}
        _panel(parts[2], "mask: query (down) by key (across)", mask, **look | {"bar": False})  # the same bar as above
    if path is not None:
        figure.savefig(path)
    return figure


def _pairs(pattern: Pattern, grid: tuple[int, ...]) -> tuple[Callable, dict[str, Any]]:
    """What to show of a pair, a function of query and key tokens, and how: seen or not, or the factor on its score."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    allowed, rule = pattern.predicate(grid), pattern.score_rule(grid)
    if rule is None:
        return lambda query, key: allowed(query, key).int(), dict(
            cmap=ListedColormap(COLORS), vmin=0, vmax=2, bar=False
        )

    def factor(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = allowed(query, key)
        return rule(torch.ones(seen.shape), query, key).masked_fill(~seen, float("nan"))

    token = torch.arange(math.prod(grid))
    least = min(0.9, rule(torch.ones(len(token)), token[:1], token).min().item())
    colors = colormaps["viridis"].with_extremes(bad=COLORS[0])
    return factor, dict(cmap=colors, vmin=least, vmax=1, bar=True)


def keys_seen(pattern: Pattern, grid: tuple[int, ...], query: tuple[int, ...]) -> torch.Tensor:
    """Bool tensor of the shape of the grid: True where `query` (one coordinate per axis) sees the key."""
    index = 0
    for at, size in zip(query, grid, strict=True):
        index = index * size + at
    keys = torch.arange(math.prod(grid))
    return pattern.predicate(grid)(torch.tensor([index]), keys).expand(len(keys)).reshape(grid)


def keys_per_query(
    pattern: Pattern, grid: tuple[int, ...], pairs: int | None = None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """How many keys each query sees, int64 of the shape of the grid; of a large grid every n-th query per axis.

    Args:
        pattern: any pattern that can be laid on `grid`.
        grid: sizes in tokens.
        pairs: of a query and a key that may be looked at; None is `PAIRS`.

    Returns:
        The counts, and the step between the queries along each axis (1 when every query was counted).
    """
    tokens, pairs = math.prod(grid), PAIRS if pairs is None else pairs
    steps = [1] * len(grid)
    weights = (
        (0.1, 1, 1) if len(grid) == 3 else (1,) * len(grid)
    )  # frames are few and differ most: thin out space first
    while math.prod(-(-size // step) for size, step in zip(grid, steps, strict=True)) * tokens > pairs:
        longest = max(range(len(grid)), key=lambda axis: weights[axis] * grid[axis] / steps[axis])
        steps[longest] += 1
    chosen = torch.arange(tokens).reshape(grid)[tuple(slice(None, None, step) for step in steps)]
    allowed, keys = pattern.predicate(grid), torch.arange(tokens)
    chunks = chosen.flatten().split(max(1, (1 << 22) // tokens))
    counts = torch.cat([allowed(chunk[:, None], keys[None, :]).expand(len(chunk), tokens).sum(1) for chunk in chunks])
    return counts.reshape(chosen.shape), tuple(steps)


def _frames(values: torch.Tensor, query_frame: int) -> dict[str, torch.Tensor]:
    """The images of a panel by label: one strip, one image, or evenly spaced frames, always with that of the query."""
    if values.ndim < 3:
        return {"": values.reshape(-1, values.shape[-1])}
    count = min(FRAMES, len(values))
    shown = [round(i * (len(values) - 1) / max(1, count - 1)) for i in range(count)]
    if query_frame not in shown:
        shown[min(range(count), key=lambda i: abs(shown[i] - query_frame))] = query_frame
    return {f"t = {t}": values[t] for t in shown}


def _panel(
    part: SubFigure, title: str, images: dict[str, torch.Tensor], *, bar: bool = False, **colors: Any
) -> dict[str, Axes]:
    part.suptitle(title, fontsize=8)
    row = part.subplots(1, len(images), squeeze=False)[0]
    for axes, (label, image) in zip(row, images.items(), strict=True):
        aspect = "auto" if len(image) == 1 else "equal"
        drawn = axes.imshow(image.numpy(), interpolation="nearest", aspect=aspect, **colors)
        axes.set_title(label, fontsize=7)
        axes.tick_params(labelsize=6)
        axes.locator_params(integer=True, nbins=5)
        if axes is not row[0] or len(image) == 1:
            axes.set_yticks([])
    if bar:
        part.colorbar(drawn, ax=list(row), shrink=0.9).ax.tick_params(labelsize=6)
    return dict(zip(images, row, strict=True))


def _text(numbers: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, numbers))})"
