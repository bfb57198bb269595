"""Rows of timings: how they are made from measurements, fitted, printed, and kept as CSV."""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections.abc import Iterable
from typing import Any

from vision_attn.diffusion.families import Grid
from vision_attn.kernels.bench.timing import machine, spread
from vision_attn.kernels.patterns import Neighborhood, Pattern

COLUMNS = (
    "date", "part", "size", "grid", "tokens", "what", "pattern", "density", "steps", "clips", "ms", "ms_min", "ms_max",
    "speedup", "speedup_min", "speedup_max", "agreement", "count_error", "peak_mb", "threads", "device_name", "torch",
    "commit", "note",
)  # fmt: skip
Row = dict[str, Any]


def cut(pattern: Pattern, grid: Grid) -> Pattern:
    """A neighborhood no longer than the grid; other patterns as they are."""
    if isinstance(pattern, Neighborhood):
        return Neighborhood(window=tuple(map(min, pattern.window, grid)))
    return pattern


def timed(
    part: str, size: str, grid: Grid, what: str, pattern: Pattern | None, times: list[float], base: list[float],
    device: str = "cpu",
) -> Row:  # fmt: skip
    """A row: seconds of some calls, and the ratios to those of the baseline, which took turns with them."""
    row = dict.fromkeys(COLUMNS, "") | {k: v for k, v in machine(device).items() if k in COLUMNS}
    row |= {"part": part, "size": size, "grid": size_text(grid), "tokens": math.prod(grid), "what": what}
    if pattern is not None:
        pattern = cut(pattern, grid)
        row |= {"pattern": str(pattern), "density": round(pattern.density(grid), 4) if times else ""}
    if times:
        row["note"] = "CPU time" if device == "cpu" and row["threads"] == 1 else ""
        for name, values, digits in (
            ("ms", [1e3 * t for t in times], 4),
            ("speedup", [b / t for b, t in zip(base, times, strict=True)], 3),
        ):
            for key, value in zip((name, f"{name}_min", f"{name}_max"), spread(values), strict=True):
                row[key] = float(f"{value:.{digits}g}")
    return row


def fits(rows: Iterable[Row]) -> list[Row]:
    """How attention grows with length on frames of one size: the power in `time ~ tokens ** power` by least squares,
    and the same for the pairs of tokens that a pattern keeps, for `n log2(n)`, and for `n log2(frames)`, the form that
    the paper of radial attention proves. Over few frames the last grows faster than `n log2(n)`, and radial with it."""
    found = []
    own = [row for row in rows if row["part"] == "attention" and row["ms"] != ""]
    grids = {row["grid"]: tuple(map(int, row["grid"].split("x"))) for row in own}
    for frame in dict.fromkeys(grid[1:] for grid in grids.values()):
        for way in dict.fromkeys(row["what"] for row in own):
            rows_of = [row for row in own if row["what"] == way and grids[row["grid"]][1:] == frame]
            if len(rows_of) < 2:
                continue
            tokens = [float(row["tokens"]) for row in rows_of]
            frames = [grids[row["grid"]][0] for row in rows_of]
            curves = {
                "power": [float(row["ms"]) for row in rows_of],
                "n_log_n": [n * math.log2(n) for n in tokens],
                "n_log_frames": [n * math.log2(f) for n, f in zip(tokens, frames, strict=True)],
                "pairs": [n * n * float(row["density"] or 1) for n, row in zip(tokens, rows_of, strict=True)],
            }
            x = [math.log(n) for n in tokens]
            slopes = {
                name: round(statistics.linear_regression(x, [math.log(v) for v in values]).slope, 3)
                for name, values in curves.items()
                if min(values) > 0
            }
            about = {"what": way, "frame": f"{frame[0]}x{frame[1]}", "from": int(tokens[0]), "to": int(tokens[-1])}
            found.append(about | slopes)
    return found


def fits_text(rows: Iterable[Row]) -> str:
    """`fits` in words; empty without two lengths to compare."""
    lines = []
    for f in fits(rows):
        if not lines or f["frame"] != lines[-1][0]:
            limit = f"n log n is ** {f['n_log_n']:.2f}"
            if "n_log_frames" in f:
                limit += f", n log(frames) ** {f['n_log_frames']:.2f}"
            lines.append(
                (f["frame"], f"attention from {f['from']} to {f['to']} tokens, frames of {f['frame']}; {limit}")
            )
        lines.append((f["frame"], f"  {f['what']:<18} time ~ tokens ** {f['power']:.2f}, pairs ** {f['pairs']:.2f}"))
    return "\n".join(text for _, text in lines)


def as_text(rows: list[Row]) -> str:
    """The rows of one comparison as a table for people."""
    first = rows[0]
    where = " ".join(filter(None, (first["part"], str(first["size"]))))
    drawn = f", {first['clips']} clips of {first['steps']} steps" if first["clips"] != "" else ""
    lines = [f"{where}: {first['grid']} = {first['tokens']} tokens{drawn}, {first['threads']} threads"]
    lines.append(f"  {'':<26} {'density':>8} {'ms':>9} {'faster by':<24} {'agreement':>9} {'peak MB':>8}")
    for row in rows:
        density = "" if row["density"] == "" else f"{float(row['density']):.1%}"
        if row["ms"] == "":
            lines.append(f"  {row['what']:<26} {density:>8} {row['note']}")
            continue
        ratio = f"{row['speedup']}x ({row['speedup_min']} to {row['speedup_max']})"
        cells = (
            f"{row['what']:<26} {density:>8} {row['ms']:>9} {ratio:<24} {row['agreement']!s:>9} {row['peak_mb']!s:>8}"
        )
        lines.append(f"  {cells}".rstrip())
    return "\n".join(lines)


def as_csv(rows: list[Row]) -> str:
    """Rows without a header."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_csv(path: str | os.PathLike) -> list[Row]:
    """Rows of a CSV written by the command, all values as text; raises ValueError when it is something else."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this benchmark writes; give another --csv")
        return list(reader)


def size_text(grid: Grid) -> str:
    return "x".join(map(str, grid))
