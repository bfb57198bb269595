"""`vision-attn ask`: a question about a picture, to a vision-language model with methods attached."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.option_types import PICTURES, Whole, offer
from vision_attn.apps.run_options import overwrite_option, run_options


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from vision_attn.apps.answering import list_methods

        click.echo("\n".join(list_methods()))
        ctx.exit()


_OPTIONS = (
    click.option("--prune", "prunes", multiple=True, metavar="NAME", help="Drop visual tokens, such as holov, fastv."),
    click.option("--method", "steers", multiple=True, metavar="NAME", help="Steer the answer, such as vhr, vcd."),
    click.option("--keep", metavar="SHARE_OR_COUNT", help="Visual tokens that --prune keeps: 0.2, or 64."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="[NAME.]OPTION=VALUE",
        help="An option of a method, such as fastv.layer=3.",
    ),
    click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="List the methods."),
    click.option("--compare", is_flag=True, help="Also let the untouched model answer."),
    click.option(
        "--model",
        default="shapes-llava",
        show_default=True,
        metavar="NAME",
        shell_complete=offer("shapes-llava", "shapes-llava-long", file=True),
        help="shapes-llava, shapes-llava-long, a folder, or a Hub id.",
    ),
    click.option("--tokens", type=Whole(1), default=64, show_default=True, help="Longest answer."),
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="A picture of what was kept or looked at, .png."
    ),
    overwrite_option,
    run_options,
)


def answer_options(command: Callable) -> Callable:
    """Add the options that `ask` and `caption` share."""
    return reduce(lambda made, option: option(made), reversed(_OPTIONS), command)


@click.command()
@click.argument("image", metavar="IMAGE", shell_complete=PICTURES)
@click.argument("question")
@answer_options
def ask(image: str, question: str, **asked: Any) -> None:
    """Ask a QUESTION about IMAGE, a file, or example:0, example:1, ... for pictures that the built-in model knows.

    --prune and --method attach methods, together where both are given; --list names them. -o draws which visual tokens
    stayed (bright), or where nothing is dropped, what the end of the prompt looks at.

    \b
    Examples:
      vision-attn ask example:3 "is there a red circle in the image?"
      vision-attn ask example:3 "is there a red circle in the image?" --prune fastv --keep 0.2 --compare -o kept.png
      vision-attn ask example:3 "is there a red circle in the image?" --method vcd --set alpha=0.5
      vision-attn ask photo.jpg "How many people are there?" --model llava-hf/llava-1.5-7b-hf --prune holov --keep 128
    """
    if not question.strip():
        raise click.UsageError("the question is empty.")
    from vision_attn.apps.answering import answer

    answer(image, question, asked)
