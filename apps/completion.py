"""`vision-attn completion`: the lines that make a shell complete commands and options."""

import click
from click.shell_completion import get_completion_class

from vision_attn.apps.option_types import Choice

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "vision-attn", "_VISION_ATTN_COMPLETE"


@click.command()
@click.argument("shell", metavar="SHELL", type=Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the lines that make SHELL complete commands, options and their values.

    \b
    Examples:
      eval "$(vision-attn completion bash)"                                        in ~/.bashrc
      eval "$(vision-attn completion zsh)"                                         in ~/.zshrc
      vision-attn completion fish > ~/.config/fish/completions/vision-attn.fish
    """
    from vision_attn.apps.cli import cli

    made = get_completion_class(shell)(cli, {}, PROGRAM, VARIABLE)
    click.echo(made.source_template % made.source_vars())
