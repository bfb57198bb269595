"""Rows of results as text, CSV and tables."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from .problems import GROWTH
from .run import COLUMNS, FLEX, Row

RESULTS = Path(__file__).parents[1] / "results"


def as_text(rows: list[Row]) -> str:
    """The rows of one problem as a table for people."""
    first = rows[0]
    baseline = next((row["baseline"] for row in rows if row["baseline"]), "baseline")
    bound = 1 / first["density"] if first["density"] else math.inf
    lines = [f"{first['problem']}: {first['what']}", f"  density {first['density']:.1%}, at most {bound:.3g} times"]
    head = f"  {'peer':<14} {'ms':>9} {'min':>9} {'max':>9} {'CPU ms':>9}  {'over ' + baseline:<24}{'over ' + FLEX:<24}"
    lines.append(head + f"{'peak MB':>8}")
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"  {row['peer']:<14} {row['status']}: {row['note']}")
            continue
        times = " ".join(f"{milliseconds(row[key]):>9}" for key in ("ms", "ms_min", "ms_max", "cpu_ms"))
        ratios = "".join(f"{_ratio(row, key):<24}" for key in ("speedup", "over_flex"))
        lines.append(f"  {row['peer']:<14} {times}  {ratios}{row['peak_mb']!s:>8}  {row['note']}".rstrip())
    return "\n".join(lines)


def milliseconds(value: float | str) -> str:
    """Three digits; "-" when there is no time."""
    return "-" if value == "" else f"{float(value):.3g}" if float(value) < 100 else f"{float(value):.0f}"


def _ratio(row: Row, key: str) -> str:
    low, high = row[key + "_min"], row[key + "_max"]
    return f"{row[key]:.3g}x ({low:.3g} to {high:.3g})" if row[key] != "" else "-"


def growth(rows: list[Row]) -> list[Row]:
    """How the time of every peer grows with the tokens at a fixed window: the power in `time ~ tokens ** power`, by
    least squares over the problems of `GROWTH`."""
    found = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        own = [r for r in rows if r["peer"] == peer and r["problem"] in GROWTH and r["status"] == "ok"]
        points = [(math.log(float(row["tokens"])), math.log(float(row["ms"]))) for row in own]
        if len(points) > 1:
            x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
            power = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
            tokens = [int(row["tokens"]) for row in own]
            found.append({"peer": peer, "power": round(power, 3), "from": min(tokens), "to": max(tokens)})
    return found


def growth_text(rows: list[Row]) -> str:
    """`growth` in words; empty without at least two sizes."""
    lines = [f"  {g['peer']:<14} tokens ** {g['power']:.2f}, {g['from']} to {g['to']} tokens" for g in growth(rows)]
    return "\n".join(["time at a fixed window (1.00 is linear):", *lines]) if lines else ""


def as_csv(rows: list[Row]) -> str:
    """Rows without a header."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV written here, all values as text; raises ValueError when it is something else."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this benchmark writes; give another --csv")
        return list(reader)


def bench_table(folder: Path = RESULTS) -> str:
    """Markdown tables of the measured results in `folder`, the newest run of every problem, one table per machine."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read_csv(path)]
    tables = []
    for device in dict.fromkeys((row["device_name"], row["threads"]) for row in rows):
        newest: dict[str, dict[str, Row]] = {}
        for row in rows:
            if (row["device_name"], row["threads"]) == device:
                own = newest.setdefault(row["problem"], {})
                if own and next(iter(own.values()))["date"] != row["date"]:
                    own.clear()  # a later run of this problem
                own[row["peer"]] = row
        tables.append(_table(newest))
    return "\n\n".join(tables) or "Nothing has been measured yet."


def _table(problems: dict[str, dict[str, Row]]) -> str:
    timed = [row for own in problems.values() for row in own.values() if row["status"] == "ok"]
    peers = list(dict.fromkeys(row["peer"] for row in timed))
    some = max(timed, key=lambda row: row["date"])
    dates = " to ".join(sorted({min(row["date"] for row in timed), some["date"]}))
    versions = ", ".join(f"{name} {some[name]}" for name in ("torch", "triton", "natten") if some[name])
    baseline = next((row["baseline"] for row in timed if row["baseline"]), "")
    lines = [
        f"{some['device_name']}, threads: {some['threads']}; {dates}, {versions}."
        + f" Times faster than {baseline}, median of the rounds, lowest and highest in brackets." * bool(baseline),
        "",
        f"| problem | density | {' | '.join(peers)} |",
        f"| --- | --- | {' | '.join('---' for _ in peers)} |",
    ]
    for name, own in problems.items():
        cells = [_cell(own.get(peer)) for peer in peers]
        density = next(iter(own.values()))["density"]
        lines.append(f"| {name} | {float(density):.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    """How many times faster than the baseline, lowest and highest round in brackets; on a GPU behind the milliseconds,
    which from a processor that others use as well say little."""
    if row is None or row["status"] in ("cannot", "failed"):
        return ""
    if row["status"] == "wrong":
        return "wrong"
    low, high = (f"{float(row[key]):.3g}" for key in ("speedup_min", "speedup_max")) if row["speedup"] else ("", "")
    ratio = f"{float(row['speedup']):.3g}x" + (f" ({low} to {high})" if low != high else "") if row["speedup"] else "-"
    return f"{milliseconds(row['ms'])} ms, {ratio}" if row["device"].startswith("cuda") else ratio
