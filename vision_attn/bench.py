"""Time and memory of the attention layers on one map after the other, next to timm's dense attention."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vision_attn.kernels.bench.timing import interleave, machine, peak_bytes, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = (14, 56, 112, 224)
DIM, HEADS = 64, 2
LEAST = 56 * 56  # tokens in a call: small maps come in batches
MOST_BYTES = 4 * 2**30  # a published form that copies more than this is not run
RESULTS = Path(__file__).parent / "results" / "bench.csv"
COLUMNS = (
    "date", "layer", "form", "side", "batch", "tokens", "status", "ms", "ms_min", "ms_max",
    "speedup", "speedup_min", "speedup_max", "peak_mb", "error", "rounds", "threads", "device_name", "torch", "commit",
    "note",
)  # fmt: skip
Row = dict[str, Any]


class Dense(nn.Module):
    """timm's attention, through SDPA, on a map `[batch, height, width, dim]`."""

    def __init__(self, dim: int, num_heads: int):
        from timm.layers import Attention

        super().__init__()
        self.tokens = Attention(dim, num_heads, qkv_bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x.flatten(1, 2)).view(x.shape)


def layers() -> dict[str, Callable[[int, int], nn.Module]]:
    """Name -> what makes the layer from channels and heads; "dense" is the one that the others are compared with."""
    from vision_attn.modules import (
        BiLevelRoutingAttention,
        LinearAttention2d,
        NeighborhoodAttention,
        VariedWindowAttention,
    )
    from vision_attn.modules.linear import KINDS

    found = {
        "dense": Dense,
        "neighborhood 7x7": partial(NeighborhoodAttention, window=7, rel_pos_bias=False),
        "neighborhood 7x7, bias": partial(NeighborhoodAttention, window=7),
        "bi-level, 4 of 49 regions": partial(BiLevelRoutingAttention, regions=7, topk=4),
        "varied window 7x7": partial(VariedWindowAttention, window=7),
    }
    return found | {f"linear {kind}": partial(LinearAttention2d, kind=kind) for kind in KINDS}


def run(
    sides: Iterable[int] = SIDES,
    names: Iterable[str] | None = None,
    *,
    rounds: int = 5,
    tell: Callable[[str], None] = lambda text: None,
    step: Callable[[], None] = lambda: None,
) -> Iterator[list[Row]]:
    """Check and time layers on square maps of 64 channels, forward; yields the rows of one size at a time. Maps smaller
    than 56 x 56 come in batches of about as many tokens.

    A layer that has a plain form beside its kernel (`fused_attn=False`: the formulation of its paper, which copies
    keys and values) gets a second row, "published". Status "ok", "wrong" (no time is taken) or "too large". Speed-ups
    over "dense" are medians of the ratios within the rounds; `peak_mb` (MiB) is memory beyond input and output.

    Args:
        sides: tokens per side of the maps.
        names: of `layers()`; all if None. "dense" always runs.
        rounds: how often everything is measured.
        tell: is called with what is going on.
        step: is called after every check and round.
    """
    known = layers()
    chosen = ["dense", *(name for name in names or known if name != "dense")]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"unknown layer {unknown[0]!r}; allowed: {', '.join(known)}")
    with torch.no_grad():
        for side in sides:
            yield _run_one(side, {name: known[name] for name in chosen}, rounds, tell, step)


def _run_one(side, makers, rounds, tell, step) -> list[Row]:
    rows, calls = [], {}
    batch = -(-LEAST // side**2)
    x = torch.randn(batch, side, side, DIM, generator=torch.Generator().manual_seed(0))
    about = {key: value for key, value in machine("cpu").items() if key in COLUMNS}
    for name, make in makers.items():
        tell(f"{name} on {side} x {side}: checking")
        for form, layer in _forms(make).items():
            row = dict.fromkeys(COLUMNS, "") | about | {"layer": name, "form": form, "side": side}
            row |= {"batch": batch, "tokens": side**2}
            rows.append(row)
            error, allowed = _error(make, form)
            row |= {"error": f"{error:.1e}", "status": "ok", "rounds": rounds}
            if not error <= allowed:
                row |= {"status": "wrong", "note": f"error {error:.1e}, allowed {allowed:.1e}"}
            elif form == "published" and _copied(layer, side) > MOST_BYTES:
                row |= {"status": "too large", "note": f"copies {_copied(layer, side) / 2**30:.0f} GiB"}
            else:
                calls[name, form] = partial(layer, x)
                calls[name, form]()
                row["peak_mb"] = round((peak_bytes(calls[name, form], "cpu") or math.nan) / 2**20, 1)
        step()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    tell(f"{side} x {side}: {rounds} rounds")
    for one in interleave(calls, "cpu", rounds):
        for key, (wall, _) in one.items():
            times[key].append(wall)
        step()
    for row in rows:
        if own := times.get((row["layer"], row["form"])):
            middle, low, high = spread([1e3 * t for t in own])
            row |= {"ms": f"{middle:.4g}", "ms_min": f"{low:.4g}", "ms_max": f"{high:.4g}"}
            middle, low, high = spread([d / t for d, t in zip(times["dense", ""], own, strict=True)])
            row |= {"speedup": f"{middle:.3g}", "speedup_min": f"{low:.3g}", "speedup_max": f"{high:.3g}"}
    return rows


def _forms(make: Callable[[int, int], nn.Module]) -> dict[str, nn.Module]:
    """The layer, and where it has one its plain form with the same weights."""
    torch.manual_seed(0)
    layer = make(DIM, HEADS).eval()
    if not hasattr(layer, "fused_attn"):
        return {"": layer}
    torch.manual_seed(0)
    plain = make(DIM, HEADS).eval()
    layer.fused_attn, plain.fused_attn = True, False
    return {"": layer, "published": plain}


def _error(make: Callable[[int, int], nn.Module], form: str) -> tuple[float, float]:
    """How far the layer is from its plain form in float64 on a small odd map, and how far it may be."""
    forms = _forms(make)
    plain = forms.get("published", forms[""])
    x = torch.randn(1, 23, 19, DIM, generator=torch.Generator().manual_seed(1))
    out, eager = forms[form](x), plain(x)
    exact = plain.double()(x.double())
    return float((out - exact).abs().max()), 8 * float((eager - exact).abs().max()) + 1e-6


def _copied(layer: nn.Module, side: int) -> int:
    """Bytes of keys, values and scores that the plain form of a layer holds at once."""
    if hasattr(layer, "topk"):
        keys = layer.topk * side**2 / layer.regions**2
        return int(4 * side**2 * (HEADS * keys * 2 + 2 * layer.topk * DIM))
    return 4 * side**2 * layer.window**2 * (2 * DIM + 2 * HEADS)


def growth(rows: list[Row], smallest: int = 56) -> list[Row]:
    """The powers in `time ~ tokens ** power` and `memory ~ tokens ** power` of each layer, by least squares over the
    maps of at least `smallest` tokens a side; 1 is linear."""
    found = []
    for layer, form in dict.fromkeys((row["layer"], row["form"]) for row in rows):
        own = [r for r in rows if (r["layer"], r["form"]) == (layer, form) and r["status"] == "ok"]
        own = [r for r in own if int(r["side"]) >= smallest]
        if len(own) > 1:
            logs = {key: [math.log(float(r[key])) for r in own] for key in ("tokens", "ms", "peak_mb")}
            slopes = {key: statistics.linear_regression(logs["tokens"], logs[key]).slope for key in ("ms", "peak_mb")}
            found.append({"layer": layer, "form": form, "time": slopes["ms"], "memory": slopes["peak_mb"]})
    return found


def as_text(rows: list[Row]) -> str:
    """The rows of one map as a table for people."""
    first = rows[0]
    size = f"{first['batch']} x {first['side']} x {first['side']} tokens"
    lines = [f"{size}, {DIM} channels, {HEADS} heads, {first['threads']} threads"]
    lines.append(f"  {'layer':<38} {'ms':>8} {'min':>8} {'max':>8}  {'over dense':<22} {'peak MB':>8}")
    for row in rows:
        name = row["layer"] + (", as published" if row["form"] else "")
        if row["status"] != "ok":
            lines.append(f"  {name:<38} {row['status']}: {row['note']}")
            continue
        ratio = f"{row['speedup']}x ({row['speedup_min']} to {row['speedup_max']})"
        lines.append(
            f"  {name:<38} {row['ms']:>8} {row['ms_min']:>8} {row['ms_max']:>8}  {ratio:<22} {row['peak_mb']:>8}"
        )
    return "\n".join(lines)


def growth_text(rows: list[Row]) -> str:
    """`growth` in words; empty without two maps to compare."""
    lines = [
        f"  {g['layer'] + (', as published' if g['form'] else ''):<38} "
        f"time tokens ** {g['time']:.2f}, memory tokens ** {g['memory']:.2f}"
        for g in growth(rows)
    ]
    return "\n".join(["growth from 56 x 56 on (1.00 is linear):", *lines]) if lines else ""


def read_csv(path: str | os.PathLike) -> list[Row]:
    """Rows of a CSV written by the command, all values as text; raises ValueError when it is something else."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this benchmark writes; give another --csv")
        return list(reader)


def bench_table(path: str | os.PathLike = RESULTS) -> str:
    """The table of the README: speed-up over dense per layer and map, the published form beside it."""
    rows = read_csv(path)
    sides = list(dict.fromkeys(row["side"] for row in rows))
    batch = {row["side"]: row["batch"] for row in rows}
    lines = ["| layer | " + " | ".join(f"{batch[s]} of {s}x{s}" for s in sides) + " | memory grows as tokens to the |"]
    lines.append("|---" * (len(sides) + 2) + "|")
    powers = {(g["layer"], g["form"]): f"{g['memory']:.2f}" for g in growth(rows)}
    for layer, form in dict.fromkeys((row["layer"], row["form"]) for row in rows):
        cells = []
        for side in sides:
            row = next(r for r in rows if (r["layer"], r["form"], r["side"]) == (layer, form, side))
            if layer == "dense":
                cells.append(f"{float(row['ms']):.3g} ms")
            else:
                ratio = f"{row['speedup']}x ({row['speedup_min']}-{row['speedup_max']})"
                cells.append(ratio if row["status"] == "ok" else row["status"])
        name = layer + (", as published" if form else "")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {powers.get((layer, form), '-')} |")
    first = rows[0]
    about = f"{first['device_name']}, {first['threads']} threads, torch {first['torch']}, {first['date']}"
    return "\n".join([*lines, "", f"Measured on: {about}, commit {first['commit']}. {DIM} channels, {HEADS} heads."])


def draw(rows: list[Row], path: str | os.PathLike | None = None) -> Figure:
    """Time and peak memory over the number of tokens, one line per layer; both axes are logarithmic."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained", dpi=120)
    names = list(dict.fromkeys(row["layer"] for row in rows))
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "peak_mb"), ("milliseconds", "peak MiB"), strict=True):
        for layer, form in dict.fromkeys((row["layer"], row["form"]) for row in rows):
            own = [r for r in rows if (r["layer"], r["form"]) == (layer, form) and r["status"] == "ok"]
            color = "black" if layer == "dense" else colormaps["tab20"](names.index(layer) % 20)
            style = {"ls": "--", "marker": "x"} if form else {"ls": "-", "marker": "o"}
            text = layer + (", as published" if form else "")
            points = [int(r["tokens"]) for r in own], [float(r[key]) for r in own]
            axes.plot(*points, color=color, label=text, ms=3, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    if path is not None:
        figure.savefig(path)
    return figure
