"""The picture of a calibration: how attention falls off with distance, and what was picked."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vision_attn.diffusion.calibration import Calibration


def draw_calibration(found: Calibration, path: str | os.PathLike | None = None) -> Figure:
    """Four panels: weight of a key by distance in frames and within a frame, the same as one line per layer over time
    and over space, and the share of pairs that the preset computes per layer and head.

    Weights are relative to uniform attention: 1 is what every key would get. A layer with another grid than the first
    is left out of the first panel.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    energy = [each.mean(0) for each in found.energy]  # [frames, distance], over heads
    whole = torch.stack([e for e, grid in zip(energy, found.grids, strict=True) if grid == found.grids[0]]).mean(0)
    figure = Figure(figsize=(11, 8), layout="constrained", dpi=120)
    (both, time), (chosen, space) = figure.subplots(2, 2)
    shades = colormaps["viridis"]([i / max(len(energy) - 1, 1) for i in range(len(energy))])

    seen = whole[whole > 0]
    norm = LogNorm(float(seen.min()), float(seen.max()))
    image = both.imshow(whole.numpy(), norm=norm, cmap="magma", aspect="auto", origin="lower")
    figure.colorbar(image, ax=both, label="weight of a key, 1 is uniform")
    both.set(
        xlabel="distance within a frame, tokens", ylabel="distance in frames", title="mean of all layers and heads"
    )

    for axes, lines, label, title in (
        (time, [e[:, 0] for e in energy], "distance in frames", "same place in other frames"),
        (space, [e[0] for e in energy], "distance in tokens", "same frame"),
    ):
        for layer, line in enumerate(lines):
            axes.plot(line.numpy(), color=shades[layer], lw=1, marker=".", ms=3)
        axes.axhline(1, color="#444", lw=0.8, ls="--")
        axes.set(yscale="log", xlabel=label, ylabel="weight of a key", title=f"{title}, one line per layer")
        axes.grid(True, alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for layer in sorted({0, len(energy) - 1}):
        time.plot([], [], color=shades[layer], label=f"layer {layer}")
    time.legend(fontsize=8)

    densities = found.head_densities()
    most = max(map(len, densities))  # layers of a U-Net have more or fewer heads
    shares = torch.tensor([heads + [math.nan] * (most - len(heads)) for heads in densities])
    image = chosen.imshow(shares.T.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    figure.colorbar(image, ax=chosen, label="share of pairs computed")
    kept = torch.tensor([recall for heads in found.kept() for recall in heads]).mean()
    title = f"preset: {float(shares.nanmean()):.1%} of the pairs, {float(kept):.1%} of the mass"
    chosen.set(xlabel="layer", ylabel="head", title=title)
    for axis in (chosen.xaxis, chosen.yaxis):
        axis.get_major_locator().set_params(integer=True)
    size, prompts = " x ".join(map(str, found.grids[0])), f"{found.prompts} prompt{'s' * (found.prompts > 1)}"
    figure.suptitle(f"{found.model}, {size} tokens, {prompts}, {found.rows} rows per head and layer")
    if path is not None:
        figure.savefig(path)
    return figure
