"""Options of every command that runs a model: where, in which numbers, and what it shows meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import click

_OPTIONS = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16."),
    click.option(
        "--progress/--no-progress", default=None, help="Progress bars on stderr; shown on a terminal unless said."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
)


def run_options(command: Callable) -> Callable:
    """Add `--device`, `--dtype`, `--progress` and `--json` to a command."""
    return reduce(lambda made, option: option(made), reversed(_OPTIONS), command)
