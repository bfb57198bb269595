"""`vision-attn bench parallel`: one attention call shared by processes of this machine."""

import json
from pathlib import Path

import click

from vision_attn.apps.files import atomic, check_new, writable_folder
from vision_attn.apps.option_types import Whole
from vision_attn.apps.run_options import json_option, overwrite_option
from vision_attn.apps.simulate import Counts


@click.command()
@click.option("--ranks", type=Counts(1, 64), default="1,2,4", show_default=True, help="Processes.")
@click.option("--rounds", type=Whole(1), default=7, show_default=True, help="Measurements of every way.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the rows to this new file.")
@overwrite_option
@json_option
def parallel(ranks: tuple[int, ...], rounds: int, csv_path: Path | None, overwrite: bool, as_json: bool) -> None:
    """Count the bytes and time the ways to share one attention call among processes: exchanging only the rows that
    windows reach, gathering all keys, and Ulysses.

    64 x 256 tokens with a window of 13 over two processes, then 64 x 128 tokens for each of --ranks processes (weak
    scaling). CPU, one thread per process; the ways take turns, times are medians of the slowest process. More processes
    than cores share them.

    \b
    Examples:
      vision-attn bench parallel --ranks 2
      vision-attn bench parallel --csv parallel.csv
    """
    if csv_path is not None:
        check_new([csv_path], overwrite, "--csv")
        writable_folder(csv_path.parent, "--csv")
    from vision_attn.kernels.bench import parallel as bench

    rows = [row for problem in bench.problems(ranks) for row in bench.measure(*problem, rounds=rounds)]
    if csv_path is not None:
        with atomic(csv_path) as partial:
            partial.write_text(",".join(bench.COLUMNS) + "\n" + bench.as_csv(rows))
    click.echo(json.dumps({"rows": rows}) if as_json else bench.as_table(rows))
    wrong = [f"{row['way']} on {row['ranks']}" for row in rows if not row["difference"] < 1e-5]
    if wrong:
        raise click.ClickException(f"results differ from those of one process: {', '.join(wrong)}")
