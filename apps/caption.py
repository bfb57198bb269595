"""`vision-attn caption`: a description of a picture by a vision-language model with methods attached."""

from __future__ import annotations

from typing import Any

import click

from vision_attn.apps.ask import answer_options
from vision_attn.apps.option_types import PICTURES


@click.command()
@click.argument("image", metavar="IMAGE", shell_complete=PICTURES)
@click.option("--prompt", default="describe the image", show_default=True, help="What the model is asked.")
@answer_options
def caption(image: str, prompt: str, **asked: Any) -> None:
    """Describe IMAGE, a file, or example:0, example:1, ... for pictures that the built-in model knows.

    --prune and --method attach methods, together where both are given; --list names them. -o draws which visual tokens
    stayed (bright), or where nothing is dropped, what the end of the prompt looks at.

    \b
    Examples:
      vision-attn caption example:3
      vision-attn caption example:3 --prune fastv --keep 0.2 --compare -o kept.png
      vision-attn caption photo.jpg --model llava-hf/llava-1.5-7b-hf --method vcd --tokens 128
    """
    if not prompt.strip():
        raise click.UsageError("--prompt: it is empty.")
    from vision_attn.apps.answering import answer

    answer(image, prompt, asked)
