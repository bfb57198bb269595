"""`vision-attn bench diffusion`: pipelines with patterns and methods attached, next to the untouched model."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.files import add_rows, check_table
from vision_attn.apps.option_types import Whole, nearest
from vision_attn.apps.run_options import (
    bench_device_option,
    checked_device,
    json_option,
    progress_option,
    threads_option,
)

PARTS = ("clips", "growth", "overhead", "freeswim", "wan")


@click.command()
@click.option("--parts", help=f"Some of {', '.join(PARTS)}; on a CPU all but wan if absent, on a GPU wan.")
@click.option("--sizes", help="clips: names separated by commas, 1x to 8x-long and 4x-long-4x-large; all if absent.")
@click.option("--steps", type=Whole(1), default=20, show_default=True, help="Of clips and freeswim.")
@click.option("--clips", "count", type=Whole(1), default=1, show_default=True, help="Prompts, each in turn.")
@click.option("--rounds", type=Whole(1), default=5, show_default=True, help="Of the parts that draw no clips.")
@threads_option
@bench_device_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Add the rows to this file, part by part.")
@json_option
@progress_option
def diffusion(
    parts: str | None,
    sizes: str | None,
    steps: int,
    count: int,
    rounds: int,
    threads: int | None,
    device: str,
    csv_path: Path | None,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Time pipelines with patterns attached: whole clips of the built-in model up to 4 times the length and size, with
    the judge's agreement; attention alone over 1 to 8 times the length, with a fit; what attaching a full window costs;
    FreeSwim with and without its cache; and on a GPU one call of a transformer as large as Wan2.1 1.3B.

    All ways of a comparison take turns. With --threads 1 times are CPU time. On two cores one clip of 4x-long-4x-large
    takes minutes.

    \b
    Examples:
      vision-attn bench diffusion --parts growth,overhead --threads 2
      vision-attn bench diffusion --parts clips --sizes 4x-long-4x-large --steps 4 --csv diffusion.csv
      vision-attn bench diffusion --device cuda --csv h100.csv
    """
    import torch

    from vision_attn.diffusion import bench, timings

    device = checked_device(device).type
    usual = ("wan",) if device == "cuda" else PARTS[:-1]
    chosen = _names("--parts", parts, PARTS) or usual
    clip_sizes = _names("--sizes", sizes, tuple(bench.CLIPS)) or tuple(bench.CLIPS)
    if device == "cpu" and "wan" in chosen:
        raise click.UsageError("--parts: wan takes hours on a CPU; run it where there is a CUDA GPU.")
    if device == "cuda" and chosen != ("wan",):
        raise click.UsageError("--parts: on a GPU only wan is timed; use --device cpu for the others.")
    if csv_path is not None:
        check_table(csv_path, timings.read_csv)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    shown = sys.stderr.isatty() if progress is None else progress

    def tell(text: str) -> None:
        if shown:
            click.echo(text, err=True)

    rows: list[dict[str, Any]] = []
    try:
        for part in measured(chosen, clip_sizes, steps, count, rounds, tell):
            rows += part
            if csv_path is not None:
                add_rows(csv_path, ",".join(timings.COLUMNS), timings.as_csv(part))
            if not as_json:
                click.echo(timings.as_text(part) + "\n")
    except KeyboardInterrupt as stop:
        kept = f", kept in {csv_path}" if csv_path is not None and rows else ""
        raise KeyboardInterrupt(f"{len(rows)} rows were measured{kept}.") from stop
    if as_json:
        click.echo(json.dumps({"rows": rows, "fits": timings.fits(rows)}))
    else:
        for text in (timings.fits_text(rows), str(csv_path or "")):
            if text:
                click.echo(text)


def measured(parts, sizes, steps, count, rounds, tell) -> Iterator[list[dict[str, Any]]]:
    """The comparisons of the parts, one after the other."""
    from vision_attn.diffusion import bench
    from vision_attn.diffusion.loading import load

    pipe = None
    if {"clips", "overhead", "freeswim"} & set(parts):
        pipe = load(device="cpu").pipe
        pipe.set_progress_bar_config(disable=True)
    if "growth" in parts:
        yield from bench.growth(rounds=rounds, tell=tell)
    if "overhead" in parts:
        yield from bench.overhead(pipe.transformer, rounds=rounds, tell=tell)
    if "clips" in parts:
        yield from bench.clips(pipe, sizes, steps, count, tell)
    if "freeswim" in parts:
        yield from bench.freeswim(pipe, steps=steps, count=count, tell=tell)
    if "wan" in parts:
        yield from bench.wan(rounds=rounds, tell=tell)


def _names(option: str, text: str | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in allowed:
            raise click.UsageError(f"{option}: unknown {name!r}{nearest(name, allowed)} Allowed: {', '.join(allowed)}.")
    return names
