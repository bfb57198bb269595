"""Pictures of bounds and of measured speed-ups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .report import milliseconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..simulate import Simulation

COLORS = ["#2a78b8", "#e0832f", "#4a9a5b", "#8a62ad", "#b8473d", "#7a7a74", "#c9a227", "#3aa6a6"]


def draw_bounds(simulation: Simulation, path: str | os.PathLike | None = None) -> Figure:
    """Bars of the bound by tile pair, aligned and unaligned, under the bound by density.

    >>> from vision_attn import Neighborhood
    >>> from vision_attn.kernels.simulate import simulate
    >>> len(draw_bounds(simulate(Neighborhood(13), (64, 64))).axes[0].patches)
    8
    """
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys((t.queries, t.keys) for t in simulation.tiles))
    kinds = list(dict.fromkeys(t.aligned for t in simulation.tiles))
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    for tile in simulation.tiles:
        place = pairs.index((tile.queries, tile.keys)) + (kinds.index(tile.aligned) - (len(kinds) - 1) / 2) * 0.38
        bar = axes.bar(place, tile.bound, 0.36, color=COLORS[kinds.index(tile.aligned)])
        axes.bar_label(bar, [f"{tile.bound:.2f}\n{tile.full:.0%} full"], fontsize=7)
    axes.axhline(simulation.bound, color="#444", lw=1, ls="--")
    axes.text(-0.45, simulation.bound, f"1 / density = {simulation.bound:.4g}", fontsize=8, va="bottom")
    axes.set_xticks(range(len(pairs)), [f"{q} queries x {k} keys" for q, k in pairs], fontsize=8)
    axes.set_xlim(-0.55, len(pairs) - 0.45)
    axes.set_ylim(0, 1.18 * max([simulation.bound, *(t.bound for t in simulation.tiles)]))
    axes.set_ylabel("times faster than dense, at most", fontsize=8)
    if len(kinds) > 1:
        handles = [axes.patches[0], axes.patches[1]]
        axes.legend(handles, ["aligned key tiles", "key tiles start at the window"], fontsize=8, loc="upper right")
    sizes = " x ".join(map(str, simulation.grid))
    axes.set_title(f"{simulation.pattern}\non {sizes} tokens", fontsize=9)
    if path is not None:
        figure.savefig(path)
    return figure


def draw_results(rows: list[dict[str, Any]], path: str | os.PathLike | None = None) -> Figure:
    """Bars of the measured speed-up over the baseline, by problem and peer; whiskers are the smallest and largest."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["speedup"] not in ("", None)]
    problems, peers = (list(dict.fromkeys(row[key] for row in timed)) for key in ("problem", "peer"))
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(timed) + 0.3 * len(problems)), layout="constrained", dpi=120)
    axes = figure.subplots()
    place, ticks = 0.0, []
    for problem in problems:
        own = [row for row in timed if row["problem"] == problem]
        for row in own:
            middle, low, high = (float(row[key]) for key in ("speedup", "speedup_min", "speedup_max"))
            color = COLORS[peers.index(row["peer"]) % len(COLORS)]
            whisker = {"xerr": [[middle - low], [high - middle]], "error_kw": {"lw": 0.8}}
            axes.barh(place, middle - 1, 0.8, left=1, color=color, **whisker)
            label = f"  {row['peer']} {middle:.3g}x, {milliseconds(row['ms'])} ms"
            axes.text(max(high, 1), place, label, fontsize=6, va="center")
            place += 1
        ticks.append((place - len(own) / 2 - 0.5, f"{problem}\nagainst {own[0]['baseline']}"))
        place += 0.8
    axes.axvline(1, color="#444", lw=0.8, ls="--")
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.set_xscale("log")
    if timed:
        axes.set_xlim(right=3 * max(float(row["speedup_max"]) for row in timed))
        title = f"{timed[-1]['device_name']}, threads: {timed[-1]['threads']}, {timed[-1]['date']}"
        axes.set_title(title, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster (log scale)", fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure
