"""`vision-attn bench`: measured, not predicted."""

import json
import os
import sys
from pathlib import Path

import click

from vision_attn.apps.bench_diffusion import diffusion
from vision_attn.apps.bench_mllm import mllm
from vision_attn.apps.bench_parallel import parallel
from vision_attn.apps.bench_vision import vision
from vision_attn.apps.files import PICTURES, add_rows, atomic, check_ending, check_new, check_table, writable_folder
from vision_attn.apps.option_types import Whole, nearest, offer
from vision_attn.apps.run_options import (
    bench_device_option,
    checked_device,
    json_option,
    overwrite_option,
    progress_option,
    threads_option,
)


@click.group()
def bench() -> None:
    """Time attention on this machine.

    \b
    Examples:
      vision-attn bench kernels
      vision-attn bench vision --sides 14,56
      vision-attn bench diffusion --parts growth
      vision-attn bench mllm --keep 0.5,0.2
      vision-attn bench parallel --ranks 2
      vision-attn bench kernels --help
    """


bench.add_command(vision)
bench.add_command(diffusion)
bench.add_command(mllm)
bench.add_command(parallel)


@bench.command()
@click.option(
    "--problems",
    shell_complete=offer("cpu", "gpu", "tiny"),
    help="Names or sets (cpu, gpu, tiny), separated by commas; the set of the device if absent.",
)
@click.option("--peers", "peer_names", help="Who is timed, separated by commas; all that suit the device if absent.")
@click.option("--without", default="", help="Peers to leave out, separated by commas, such as flex,flex-rows.")
@click.option("--baseline", help="The peer that speed-ups are over: sdpa on a CPU, sdpa-cudnn on a GPU if absent.")
@click.option("--rounds", type=Whole(1), default=7, show_default=True, help="Measurements of every peer.")
@threads_option
@bench_device_option
@click.option(
    "--csv", "csv_path", type=click.Path(path_type=Path), help="Add the rows to this file, problem by problem."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A picture of the speed-ups: .png, .svg or .pdf.")
@overwrite_option
@json_option
@progress_option
def kernels(
    problems: str | None,
    peer_names: str | None,
    without: str,
    baseline: str | None,
    rounds: int,
    threads: int | None,
    device: str,
    csv_path: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Time the backends on named problems, next to dense attention, compiled FlexAttention and natten.

    Every result is compared with float64 first, and a wrong one gets no time (exit code 1). The peers take turns in
    every round; times are medians and include every copy a peer makes. FlexAttention compiles for 10 to 40 seconds per
    problem on a CPU; --without flex,flex-rows saves that.

    \b
    Examples:
      vision-attn bench kernels --problems image-64 --threads 2
      vision-attn bench kernels --without flex,flex-rows --csv cpu.csv -o cpu.png
    """
    if output is not None:
        check_ending(output, *PICTURES)
        check_new([output], overwrite)
    import torch
    from tqdm import tqdm

    from vision_attn.kernels.bench.peers import default_peers
    from vision_attn.kernels.bench.peers import peers as all_peers
    from vision_attn.kernels.bench.problems import pick
    from vision_attn.kernels.bench.report import as_csv, as_text, growth, growth_text, read_csv
    from vision_attn.kernels.bench.run import COLUMNS, run

    device = checked_device(device).type
    try:
        chosen = pick(problems, device)
    except ValueError as error:
        raise click.UsageError(f"--problems: {error}") from error
    known, left_out = all_peers(), _names(without)
    names = _names(peer_names) or default_peers(device)
    baseline = baseline or ("sdpa-cudnn" if device == "cuda" else "sdpa")
    for name in [*names, *left_out, baseline]:
        if name not in known:
            raise click.UsageError(f"unknown peer {name!r}{nearest(name, known)} Allowed: {', '.join(known)}.")
    timed = {name: known[name] for name in names if name not in left_out}
    if not timed:
        raise click.UsageError("--without leaves nobody to time")
    if csv_path is not None:
        check_table(csv_path, read_csv)
    if output is not None:
        writable_folder(output.parent)
    torch.set_num_threads(threads or os.cpu_count() or 1)

    shown = sys.stderr.isatty() if progress is None else progress
    rows, finished = [], 0
    with tqdm(total=len(chosen) * (len(timed) + rounds), disable=not shown, unit="step", leave=False) as bar:

        def tell(text: str, important: bool) -> None:
            if important:
                bar.write(text, file=sys.stderr)
            bar.set_postfix_str(text)

        measured = run(chosen, timed, device, rounds=rounds, baseline=baseline, tell=tell, step=lambda: bar.update(1))
        try:
            for part in measured:
                rows += part
                finished += 1
                if csv_path is not None:
                    add_rows(csv_path, ",".join(COLUMNS), as_csv(part))
                if not as_json:
                    with bar.external_write_mode(file=sys.stdout):
                        click.echo(as_text(part) + "\n")
        except KeyboardInterrupt as stop:
            where = f" and kept in {csv_path}" if csv_path is not None and finished else ""
            raise KeyboardInterrupt(f"{finished} of {len(chosen)} problems were measured{where}.") from stop
    if output is not None:
        from vision_attn.kernels.bench.pictures import draw_results

        with atomic(output) as partial:
            draw_results(rows, partial)
    if as_json:
        click.echo(json.dumps({"rows": rows, "growth": growth(rows), "picture": str(output) if output else None}))
    else:
        for text in (growth_text(rows), str(csv_path or ""), str(output or "")):
            if text:
                click.echo(text)
    wrong = [f"{row['peer']} on {row['problem']}" for row in rows if row["status"] == "wrong"]
    if wrong:
        click.echo(f"Error: wrong results, not timed: {', '.join(wrong)}", err=True)
        raise click.exceptions.Exit(1)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
