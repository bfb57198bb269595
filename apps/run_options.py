"""Options that mean the same in every command that has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import click

from vision_attn.apps.option_types import FILES, Choice, Whole, offer

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.", shell_complete=offer(*DEVICES)
)
bench_device_option = click.option(
    "--device", type=Choice(DEVICES), default="auto", show_default=True, help="Where to run."
)
dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help=f"auto, {', '.join(DTYPES)}.",
    shell_complete=offer("auto", *DTYPES),
)
progress_option = click.option(
    "--progress/--no-progress", default=None, help="What is going on, on stderr; shown on a terminal unless said."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace files that are there; without it they are an error."
)
pipeline_option = click.option(
    "--model",
    metavar="PATH_OR_HUB_ID",
    shell_complete=FILES,
    help="A diffusers pipeline; the built-in model unless given.",
)
prompts_option = click.option(
    "--prompts",
    "prompts_file",
    metavar="FILE",
    shell_complete=FILES,
    help="Text file with one prompt per line; - reads stdin.",
)
threads_option = click.option("--threads", type=Whole(1), help="Threads of the CPU; all cores unless given.")


def run_options(command: Callable) -> Callable:
    """Add `--device`, `--dtype`, `--progress` and `--json` to a command."""
    options = (device_option, dtype_option, progress_option, json_option)
    return reduce(lambda made, option: option(made), reversed(options), command)


def checked_device(device: str, dtype: str = "auto") -> torch.device:
    """What was typed as a device; raises click.UsageError for one, or for numbers, that cannot be had here."""
    from vision_attn.devices import resolve_device, resolve_dtype

    try:
        place = resolve_device(device)
        resolve_dtype(None if dtype == "auto" else dtype, place, built_in=False)
    except ValueError as error:
        raise click.UsageError(f"--{error}") from error
    return place
