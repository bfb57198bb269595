"""Published attention settings of pretrained models by name, and the nearest setting for another size."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vision_attn.diffusion.method import Preset
from vision_attn.kernels.advice import advise
from vision_attn.kernels.patterns import Neighborhood, Pattern, Radial, SlidingTile
from vision_attn.kernels.patterns.base import along, check_grid, is_int


@dataclasses.dataclass(frozen=True)
class Published(Preset):
    """A preset from a paper or its code, with the run it was published for.

    Args:
        grid: sizes in tokens of that run.
        steps: its denoising steps; 0 where they are not published.
        sparsity: its published share of query-key pairs that are left out; None where there is none.
    """

    grid: tuple[int, ...] = ()
    steps: int = 0
    sparsity: float | None = None


def presets() -> list[str]:
    """Names of the published presets, as `preset` takes them.

    >>> presets()[:2]
    ['radial/wan2.1-14b', 'radial/wan2.1-14b-2x']
    """
    return list(_published())


def preset(name: str) -> Published:
    """A published preset by name, to attach to a pipeline of the model it was made for.

    It is as published, for the grid in its `grid`; `fit_preset` carries it over to another size or number of steps.

    Raises:
        ValueError: there is no preset of that name.

    >>> wan = preset("radial/wan2.1-14b")
    >>> wan.pattern, wan.options
    (Radial(decay=0.2, block=64, sink=True, rule='block', thin=128), {'dense_steps': 12, 'dense_layers': 1})

    Papers: Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation; Generalized
    Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light; Fast Video Generation with Sliding
    Tile Attention.
    """
    known = _published()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no preset {name!r}{hint} Allowed: {', '.join(known)}")
    row = known[name]
    plain = Preset.from_dict({"method": "preset", **{k: row[k] for k in ("model", "note", "pattern", "options")}})
    run = {"grid": tuple(row["grid"]), "steps": row.get("steps", 0), "sparsity": row.get("sparsity")}
    return Published(plain.pattern, plain.options, plain.model, plain.note, **run)


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8"))


def fit_preset(preset: Preset, grid: tuple[int, ...], *, steps: int | None = None) -> Preset:
    """The nearest setting without partly filled tiles for another size, and for another number of steps.

    A window keeps its share of every axis, so that sparsity stays about as published; then it moves to the nearest
    window and stride that leave no tile partly filled (`vision_attn.kernels.advice.advise`), where there are any.
    Sliding tiles become such as divide the axes, of about the published size. Radial attention keeps its block where a
    frame has at least four of them and the block rule is sound on the grid, and otherwise scales the block or takes the
    exact rule. A preset that does not know the grid it was made for keeps its windows in tokens, cut down to the axes.

    Args:
        preset: what `preset(name)`, `Preset.load(path)` or a calibration gives.
        grid: sizes in tokens, with as many axes as the preset has.
        steps: denoising steps of the new run; `dense_steps` and `dense_last_steps` keep their share of the published
            number. None leaves them.

    Raises:
        TypeError: a preset of a pattern other than Neighborhood, SlidingTile and Radial.
        ValueError: a grid with another number of axes; steps for a preset that does not say how many it was made for.

    >>> flux = fit_preset(preset("gna/flux-4k"), (128, 128))
    >>> flux.pattern, 1 - flux.pattern.density((128, 128))
    (Neighborhood(window=(40, 40), stride=(8, 8), dilation=1, causal=False), 0.90234375)
    """
    check_grid(grid)
    made_for = getattr(preset, "grid", ())
    if made_for and len(made_for) != len(grid):
        raise ValueError(f"grid {grid} has {len(grid)} axes, and the preset is for {len(made_for)}, such as {made_for}")
    fitted, note = preset.pattern, preset.note
    if tuple(made_for) != tuple(grid):
        one = isinstance(preset.pattern, Pattern)
        parts = [_fit(each, made_for or None, tuple(grid)) for each in ([preset.pattern] if one else preset.pattern)]
        fitted = parts[0] if one else tuple(parts)
        note = f"Fitted to {'x'.join(map(str, grid))} tokens. {note}".strip()
    options = dict(preset.options)
    if steps is not None:
        if not is_int(steps) or steps < 1:
            raise ValueError(f"steps must be an int of at least 1; got {steps!r}")
        for name in {"dense_steps", "dense_last_steps"} & options.keys():
            of = getattr(preset, "steps", 0)
            if not of:
                raise ValueError(
                    f"this preset does not say of how many steps its {name}={options[name]} are; give no steps"
                )
            options[name] = round(options[name] * steps / of)
    return Preset(fitted, options, preset.model, note)


def _fit(pattern: Pattern, made_for: tuple[int, ...] | None, grid: tuple[int, ...]) -> Pattern:
    rule: Callable | None = {Neighborhood: _neighborhood, SlidingTile: _sliding_tile, Radial: _radial}.get(
        type(pattern)
    )
    if rule is None:
        raise TypeError(f"fit_preset knows Neighborhood, SlidingTile and Radial; got {pattern!r}")
    fitted = rule(pattern, made_for, grid)
    fitted.check(grid)
    return fitted


def _share(sizes: tuple[int, ...], made_for: tuple[int, ...] | None, grid: tuple[int, ...]) -> list[int]:
    """Tokens per axis that are the same share of `grid` as `sizes` of `made_for`."""
    return [min(n, max(1, round(size * n / was))) for size, was, n in zip(sizes, made_for or grid, grid, strict=True)]


def _neighborhood(pattern: Neighborhood, made_for: tuple[int, ...] | None, grid: tuple[int, ...]) -> Neighborhood:
    axes = [along(pattern, name, len(grid)) for name in ("dilation", "causal")]
    if any(d > 1 or c for d, c in zip(*axes, strict=True)):
        raise TypeError(f"fit_preset fits windows without dilation and causal axes; got {pattern!r}")
    advice = advise(grid, tuple(_share(along(pattern, "window", len(grid)), made_for, grid)))
    return (advice.nearest or advice.wanted).pattern


def _sliding_tile(pattern: SlidingTile, made_for: tuple[int, ...] | None, grid: tuple[int, ...]) -> SlidingTile:
    tiles, windows = (along(pattern, name, len(grid)) for name in ("tile", "window"))
    reach = _share([t * w for t, w in zip(tiles, windows, strict=True)], made_for, grid)
    sides = []
    for tile, was, n in zip(tiles, made_for or grid, grid, strict=True):
        tile = max(1, min(tile, 2 * tile * n // was))  # on a much shorter axis a tile would be all there is
        # A side that divides the axis, if there is one of about this size; otherwise the last tile is a shorter one.
        divisors = [side for side in range(1, n + 1) if n % side == 0 and 2 * tile <= 3 * side <= 4.5 * tile]
        sides.append(min(divisors, key=lambda side: abs(math.log(side / tile)), default=tile))
    windows = tuple(max(1, round(tokens / side)) for tokens, side in zip(reach, sides, strict=True))
    return SlidingTile(tuple(sides), windows)


def _radial(pattern: Radial, made_for: tuple[int, ...] | None, grid: tuple[int, ...]) -> Radial:
    if len(grid) == 1:
        return pattern  # its check says why this cannot be
    positions = math.prod(grid[1:])
    if positions < 4 * pattern.block and made_for:  # smaller, every far frame would be dropped: scale with the frame
        bits = positions.bit_length() - math.prod(made_for[1:]).bit_length()
        sizes = {name: max(1, int(getattr(pattern, name) * 2.0**bits)) for name in ("block", "thin")}
        pattern = dataclasses.replace(pattern, rule="token", **sizes)
    if pattern.rule == "block" and not pattern.block_map(grid).diagonal().all():
        return dataclasses.replace(pattern, rule="token")
    return pattern
