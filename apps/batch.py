"""`vision-attn batch`: many pictures, videos and answers from a file of rows.

`python -m vision_attn.apps.batch` is the same, for torchrun.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.option_types import FILES, Choice, Whole, example_number
from vision_attn.apps.run_options import checked_device, run_options

TASKS = ("generate", "upscale", "caption", "ask")
SEEDS = 2**32 - 1


@click.command()
@click.argument("jobs", metavar="JOBS", shell_complete=FILES)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("--task", type=Choice(TASKS), default="generate", show_default=True, help="Of rows without one.")
@click.option("--set", "settings", multiple=True, metavar="COLUMN=VALUE", help="For rows that leave the column out.")
@click.option(
    "--model",
    metavar="PATH_OR_HUB_ID",
    shell_complete=FILES,
    help="For rows without one; the built-in model unless given.",
)
@click.option("--seed", type=Whole(0, SEEDS), default=0, show_default=True, help="Of row 1; the next rows count up.")
@click.option("--format", "form", type=Choice(("jsonl", "csv", "text")), help="Of JOBS, if its name has another.")
@click.option(
    "--batch-size",
    type=Whole(1),
    default=1,
    show_default=True,
    help="Rows in one call of a model; halved where memory runs out. With 1, results are the same bit for bit.",
)
@click.option("--shard", metavar="I/N", help="Only rows I, I+N, ... counted from 0. Read from torchrun's variables.")
@click.option(
    "--engine", type=Choice(("local", "ray")), default="local", show_default=True, help="ray: on all its GPUs."
)
@click.option(
    "--address", metavar="HOST:PORT", help="Of a running Ray cluster, or auto; Ray is started here unless given."
)
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@click.option("--overwrite", is_flag=True, help="Replace results of other settings; without it they are an error.")
@click.option("--dry-run", is_flag=True, help="Check every row and say what there is to do.")
@run_options
@click.pass_context
def batch(
    ctx: click.Context,
    jobs: str,
    output: Path,
    task: str,
    settings: tuple[str, ...],
    model: str | None,
    seed: int,
    form: str | None,
    batch_size: int,
    shard: str | None,
    engine: str,
    address: str | None,
    retry_failed: bool,
    overwrite: bool,
    dry_run: bool,
    device: str,
    dtype: str,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Make every row of JOBS: a .jsonl or .csv file with columns named after the options of `generate`, `upscale`,
    `caption` or `ask`, a .txt file with one prompt (or picture) per line, or - for stdin.

    Columns of every task: task, id (the name of the files). Row n has --seed + n - 1 unless it says its seed. Pictures
    and videos are looked for beside JOBS. Every row is checked before the first is made. The same command goes on where
    it stopped: rows whose files are there are skipped. Rows that fail are in failures.jsonl, a job file as well.

    \b
    Examples:
      vision-attn batch prompts.txt -o out/
      vision-attn batch jobs.csv -o out/ --set attention=radial --set steps=8 --dry-run
      vision-attn batch pictures.txt -o out/ --task caption
      vision-attn batch jobs.jsonl -o out/ --shard 0/2
      torchrun --nproc-per-node 8 -m vision_attn.apps.batch jobs.jsonl -o out/
      vision-attn batch jobs.jsonl -o out/ --engine ray --address auto
    """
    from vision_attn.apps.batching import items, manifest, rows, runner, tasks

    part, device = shard_of(shard, device)
    if address is not None and engine != "ray":
        raise click.UsageError("--address is that of a Ray cluster; add --engine ray.")
    if engine == "ray" and ":" in device:
        raise click.UsageError(f"--device {device}: Ray gives every process a GPU of its own; use auto, cuda or cpu.")
    checked_device(device, dtype)
    given = _given(settings, model)
    read = rows.read(jobs, form, tasks.TASKS[task].needed[0])
    retry_failed = retry_failed or any("error" in row.values for row in read)  # failures.jsonl, given again
    planned = items.plan(read, jobs, task=task, given=given, seed=seed, dtype=dtype)
    if dry_run:
        found = runner.survey(planned, output, part, retry_failed, overwrite)
        _tell_plan(found, output, as_json)
        return
    with manifest.alone(output, part):
        found = runner.survey(planned, output, part, retry_failed, overwrite)
        if found.blocked:
            more = f" and {len(found.blocked) - 1} more" if len(found.blocked) > 1 else ""
            raise click.UsageError(
                f"{found.blocked[0]}{more} already there, made with other settings; add --overwrite, or choose "
                "another -o."
            )
        place = runner.Place(output, device, dtype, batch_size)
        counts = _run(found, place, part, _command(ctx), progress, _events(engine, address, part))
    counts["output"] = str(output)
    failures = output / manifest.file_names(part)["failures"]
    if as_json:
        from vision_attn.apps.job import dump

        click.echo(dump(counts))
    else:
        click.echo(
            f"{counts['done']} made, {counts['skipped']} were there, {counts['failed']} failed, in "
            f"{counts['seconds']:.1f} s: {output}"
        )
    if counts["failed"]:
        raise click.ClickException(
            f"{counts['failed']} of {counts['items']} rows failed; see {failures}. To try again, add --retry-failed."
        )


def shard_of(shard: str | None, device: str) -> tuple[tuple[int, int], str]:
    """Which rows are ours, (i, n), and the device: from `--shard`, else from the variables that torchrun and accelerate
    set, which also say which GPU is ours."""
    if shard is not None:
        left, slash, right = shard.partition("/")
        if not (slash and left.isdecimal() and right.isdecimal() and int(left) < int(right)):
            raise click.UsageError(f"--shard: got {shard!r}; two shards are 0/2 and 1/2.")
        return (int(left), int(right)), device
    world, rank, local = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if not world and not rank:
        return (0, 1), device
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
        raise click.UsageError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment name no shard; unset them, or give --shard 0/1."
        )
    if device in ("auto", "cuda") and local.isdecimal():
        import torch

        count = torch.cuda.device_count()
        device = f"cuda:{int(local) % count}" if count else device
    return (int(rank), int(world)), device


def _given(settings: tuple[str, ...], model: str | None) -> dict[str, Any]:
    from vision_attn.apps.batching.rows import convert, known_column
    from vision_attn.apps.batching.tasks import TASKS as kinds

    columns = {name: kind for each in kinds.values() for name, kind in each.columns.items()}
    files = {name for each in kinds.values() for name in each.files}
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not value.strip():
            raise click.UsageError(f"--set {setting!r}: write COLUMN=VALUE, such as steps=8.")
        unknown = known_column(name, columns)
        if unknown:
            raise click.UsageError(f"--set {name}: {unknown}")
        try:
            given[name] = convert(columns[name], value, name)
        except ValueError as error:
            raise click.UsageError(f"--set {name}: {error}") from error
        if name in files and not (name == "image" and example_number(given[name]) is not None):
            given[name] = str(Path(given[name]).expanduser().absolute())
    return given if model is None else {**given, "model": model}


def _tell_plan(found: Any, output: Path, as_json: bool) -> None:
    if as_json:
        from vision_attn.apps.job import dump

        todo = [{"row": item.row, "id": item.name, "task": item.task, **item.settings} for item in found.todo]
        blocked = [str(path) for path in found.blocked]
        click.echo(dump({"todo": todo, "done": len(found.done), "failed": found.failed, "in_the_way": blocked}))
        return
    for item in found.todo:
        click.echo(f"row {item.row}: {item.task} {output / item.name}{item.endings[-1]}")
    for path in found.blocked:
        click.echo(f"in the way, made with other settings: {path}")
    click.echo(
        f"{len(found.todo)} to make, {len(found.done)} there, {len(found.failed)} failed before, "
        f"{len(found.blocked)} need --overwrite. Nothing was made."
    )


def _events(engine: str, address: str | None, part: tuple[int, int]) -> Any:
    if engine == "local":
        return None
    from vision_attn.apps.batching import ray_engine
    from vision_attn.apps.batching.manifest import file_names

    return ray_engine.engine(address, file_names(part)["manifest"])


def _run(
    found: Any, place: Any, part: tuple[int, int], command: str, progress: bool | None, events: Any
) -> dict[str, Any]:
    """`runner.run` with a progress bar, and with what to type next when it is stopped."""
    from tqdm import tqdm

    from vision_attn.apps.batching import runner
    from vision_attn.apps.batching.manifest import OutputError
    from vision_attn.apps.generate import _loading_bars

    shown = sys.stderr.isatty() if progress is None else progress
    _loading_bars(shown)
    here = len(found.done)
    with _sigterm_as_ctrl_c(), tqdm(total=here + len(found.todo), initial=here, unit="row", disable=not shown) as bar:

        def each(event: dict[str, Any]) -> None:
            nonlocal here
            here += event["event"] == "done"
            where = f"row {event['row']} ({event['id']})"
            if "error" in event:
                bar.write(f"{where} failed: {event['error']}", file=sys.stderr)
            if "warning" in event:
                bar.write(f"Warning: {where}: {event['warning']}", file=sys.stderr)
            bar.update()

        try:
            return runner.run(found, place, part, events, each)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(here, found, command)) from None
        except OutputError as error:
            raise click.ClickException(
                f"{place.output} cannot be written: {error.strerror}. {_stopped(here, found, command)}"
            ) from error


@contextlib.contextmanager
def _sigterm_as_ctrl_c():
    """What schedulers send before they kill."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(here: int, found: Any, command: str) -> str:
    return f"{here} of {len(found.items)} rows are done, and nothing is half-written. Go on with:\n  {command}"


def _command(ctx: click.Context) -> str:
    """The command line that was typed."""
    words: list[str] = []
    for param in ctx.command.params:
        if ctx.get_parameter_source(param.name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[param.name]
        flag = max(param.opts, key=len)
        if isinstance(param, click.Argument):
            words.append(str(value))
        elif param.is_flag:
            words.append(flag if value else max(param.secondary_opts, key=len))
        else:
            words += [word for each in (value if param.multiple else [value]) for word in (flag, str(each))]
    return shlex.join(["vision-attn", "batch", *words])


if __name__ == "__main__":
    from vision_attn.apps.cli import main

    sys.exit(main(["batch", *sys.argv[1:]]))
