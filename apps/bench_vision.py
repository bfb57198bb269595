"""`vision-attn bench vision`: the attention layers next to timm's."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import click

from vision_attn.apps.files import PICTURES, add_rows, atomic, check_ending, check_new, check_table, writable_folder
from vision_attn.apps.option_types import Whole, nearest
from vision_attn.apps.run_options import json_option, overwrite_option, progress_option, threads_option
from vision_attn.apps.simulate import Counts


@click.command()
@click.option(
    "--sides",
    "sizes",
    type=Counts(2, 4096),
    default="14,56,112,224",
    show_default=True,
    help="Tokens per side of the maps.",
)
@click.option("--layers", "layer_names", help="Names separated by semicolons; all layers if absent.")
@click.option("--rounds", type=Whole(1), default=5, show_default=True, help="Measurements of every layer.")
@threads_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Add the rows to this file, map by map.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A picture: .png, .svg or .pdf.")
@overwrite_option
@json_option
@progress_option
def vision(
    sizes: tuple[int, ...],
    layer_names: str | None,
    rounds: int,
    threads: int | None,
    csv_path: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Time the attention layers on maps of growing size, next to timm's dense attention.

    Layers that have a kernel are also timed in the form of their papers, which copies keys and values. Every layer is
    compared with float64 first, and a wrong one gets no time (exit code 1). All take turns in every round.

    \b
    Examples:
      vision-attn bench vision --sides 14,56 --threads 2
      vision-attn bench vision --layers "neighborhood 7x7;linear mala" --csv vision.csv -o vision.png
    """
    if output is not None:
        check_ending(output, *PICTURES)
        check_new([output], overwrite)
    import torch
    from tqdm import tqdm

    from vision_attn import bench

    known = bench.layers()
    names = [name.strip() for name in layer_names.split(";")] if layer_names else list(known)
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(
            f"--layers: unknown {unknown[0]!r}{nearest(unknown[0], known)} Allowed: {'; '.join(known)}."
        )
    if csv_path is not None:
        check_table(csv_path, bench.read_csv)
    if output is not None:
        writable_folder(output.parent)
    torch.set_num_threads(threads or os.cpu_count() or 1)

    rows: list[dict] = []
    shown = sys.stderr.isatty() if progress is None else progress
    total = len(sizes) * (len({*names, "dense"}) + rounds)
    with tqdm(total=total, disable=not shown, unit="step", leave=False) as bar:
        steps = {"tell": bar.set_postfix_str, "step": lambda: bar.update(1)}
        try:
            for part in bench.run(sizes, names, rounds=rounds, **steps):
                rows += part
                if csv_path is not None:
                    text = io.StringIO()
                    csv.DictWriter(text, bench.COLUMNS, lineterminator="\n").writerows(part)
                    add_rows(csv_path, ",".join(bench.COLUMNS), text.getvalue())
                if not as_json:
                    with bar.external_write_mode(file=sys.stdout):
                        click.echo(bench.as_text(part) + "\n")
        except KeyboardInterrupt as stop:
            done = len({row["side"] for row in rows})
            where = f" and kept in {csv_path}" if csv_path is not None and done else ""
            raise KeyboardInterrupt(f"{done} of {len(sizes)} maps were measured{where}.") from stop
    if output is not None:
        with atomic(output) as partial:
            bench.draw(rows, partial)
    if as_json:
        picture = str(output) if output else None
        click.echo(json.dumps({"rows": rows, "growth": bench.growth(rows), "picture": picture}))
    else:
        for text in (bench.growth_text(rows), str(csv_path or ""), str(output or "")):
            if text:
                click.echo(text)
    wrong = [f"{row['layer']} on {row['side']}" for row in rows if row["status"] == "wrong"]
    if wrong:
        click.echo(f"Error: wrong results, not timed: {', '.join(wrong)}", err=True)
        raise click.exceptions.Exit(1)
