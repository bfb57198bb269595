"""Widgets for a pattern and its options, the same words as on the command line."""

import shlex
from typing import Any

import click
import gradio as gr

from vision_attn.apps.pattern_options import PATTERNS, check_options, pattern_options

LONGEST = 200  # characters of options


@click.command("options", add_help_option=False)
@pattern_options
def _options(options: dict[str, Any]) -> dict[str, Any]:
    return options


def read_options(name: str, text: str | None) -> dict[str, Any]:
    """Options of the pattern `name` from text such as `--window 5 --stride 2`.

    Raises:
        click.UsageError: what is no option, or one of another pattern.

    >>> read_options("neighborhood", "--window 5,5 --dilation 2")
    {'window': (5, 5), 'dilation': 2}
    """
    text = text or ""
    if name not in PATTERNS:
        raise click.UsageError(f"There is no pattern {name!r}.\nPatterns: {', '.join(PATTERNS)}.")
    own = ", ".join(f"--{each.replace('_', '-')}" for each in PATTERNS[name]) or "no options"
    hint = f"{name} takes {own}.\nWrite them as in --window 5 --stride 2."
    if len(text) > LONGEST:
        raise click.UsageError(f"The options are {len(text)} characters long; allowed: {LONGEST}.\n{hint}")
    try:
        options = _options.main(shlex.split(text), standalone_mode=False)
    except (click.ClickException, ValueError) as error:
        said = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise click.UsageError(f"Options of the pattern: {said}\n{hint}") from error
    check_options(name, options)
    return options


def pattern_box(suggested: dict[str, str], value: str = "dense") -> tuple[gr.Dropdown, gr.Textbox]:
    """A list of patterns, and a line of options that changes with it.

    Args:
        suggested: pattern -> options to start from; these are the patterns that can be chosen.
        value: the one that is chosen at first.
    """
    name = gr.Dropdown(list(suggested), value=value, label="Attention", info="dense: everyone sees everyone")
    options = gr.Textbox(suggested[value], label="Its options", max_lines=1, max_length=LONGEST, info=_takes(value))
    quiet = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    name.input(suggested.get, name, options, **quiet)
    name.change(lambda chosen: gr.Textbox(info=_takes(chosen)), name, options, **quiet)  # also by an example
    return name, options


def _takes(name: str) -> str:
    own = " ".join(f"--{each.replace('_', '-')}" for each in PATTERNS[name])
    return f"{name} takes {own}" if own else f"{name} takes no options"
