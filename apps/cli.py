"""The `vision-attn` command: the list of commands, and what every one of them does about errors.

Exit codes: 0 done, 1 failed, 2 the command line must be changed, 130 interrupted.
Results go to stdout, everything else to stderr.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click
from click.shell_completion import CompletionItem, shell_complete

from vision_attn import __version__
from vision_attn.apps.completion import PROGRAM, VARIABLE
from vision_attn.apps.option_types import nearest

# Command -> the module that holds a click command of that name (with _ for -). Read only when it is called.
COMMANDS = {
    "generate": "Draw videos or images from prompts with a diffusers pipeline.",
    "upscale": "Draw videos larger than a model was trained on, or enlarge one.",
    "calibrate": "Find the cheapest patterns that keep what a pipeline looks at, as a preset.",
    "consistent": "Draw several pictures with the same subjects in them.",
    "protect": "Change pictures a little so that a diffusion model edits them badly.",
    "explain": "Say which backends can compute a pattern, how sparse it is, and the speed-up to expect.",
    "simulate": "Bounds by tile pair, bytes moved and a predicted time of a pattern on a device.",
    "bench": "Time attention against its peers, each checked first.",
    "show": "Draw a picture of a pattern: who a query sees.",
    "classify": "Say what is in pictures, with a timm classifier or CLIP.",
    "attention": "Draw where a vision model looks in a picture, with the numbers.",
    "ask": "Ask a vision-language model about a picture, with methods that prune or steer it.",
    "caption": "Describe a picture with a vision-language model, with methods that prune or steer it.",
    "batch": "Make every row of a file: pictures, videos, larger videos, descriptions, answers.",
    "app": "Open the web page: patterns, backbones, pictures and videos, questions, results.",
    "presets": "List published attention settings, or fit one to a size.",
    "doctor": "Report versions, devices and backends.",
    "completion": "Print what makes bash, zsh or fish complete commands and options.",
}
_DEBUG = "vision_attn.debug"
START = """Spatial attention for vision, diffusion and vision-language models. Six things to try, without a download:

  vision-attn generate "a red circle moves right" --attention radial -o out/   a video by sparse attention
  vision-attn attention example:1 -o maps.png                                  where a vision model looks
  vision-attn ask example:3 "is there a red circle in the image?"              a vision-language model
  vision-attn explain neighborhood --window 7 --grid 64,64                     what computes a pattern here
  vision-attn batch JOBS.jsonl -o out/                                         many prompts, resumed when cut off
  vision-attn app --open                                                       all of it in the browser

All commands: vision-attn --help. Is something missing? vision-attn doctor."""


class Commands(click.Group):
    """Commands by name, imported on use, so that `--help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(import_module(f"vision_attn.apps.{name}"), name)
        for each in (command, *getattr(command, "commands", {}).values()):
            if not any(param.name == "debug" for param in each.params):
                each.params.append(_debug_option())
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            allowed = ", ".join(COMMANDS)
            raise click.UsageError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)} Allowed: {allowed}.", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names without importing the commands."""
        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[_DEBUG] = True

    text = "Show the traceback of an error."
    return click.Option(["--debug"], is_flag=True, expose_value=False, callback=remember, help=text)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="vision-attn")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Spatial attention for vision, diffusion and vision-language models: methods that run on any machine.

    \b
    Examples:
      vision-attn generate "a red circle moves right" -o out/
      vision-attn show radial --decay 0.2 --grid 21,45,80 -o radial.png
      vision-attn COMMAND --help
    """
    if ctx.invoked_subcommand is None:
        click.echo(START)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors become one message on stderr."""
    if asked := os.environ.get(VARIABLE):  # by a shell that completes
        return shell_complete(cli, {}, PROGRAM, VARIABLE, asked)
    meta: dict[str, object] = {}
    try:
        with cli.make_context("vision-attn", list(sys.argv[1:] if argv is None else argv)) as ctx:
            meta = ctx.meta
            cli.invoke(ctx)
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        if meta.get(_DEBUG):
            traceback.print_exc()
        click.echo(
            _usage(error) if isinstance(error, click.UsageError) else f"Error: {error.format_message()}", err=True
        )
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo(f"Interrupted. {str(stop) or 'Nothing was left half-written.'}", err=True)
        return 130
    except Exception as error:
        if meta.get(_DEBUG):
            traceback.print_exc()
        click.echo(f"Error: {_message(error)}", err=True)
        return 1


def _usage(error: click.UsageError) -> str:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message()
    command = error.ctx.command_path if error.ctx else "vision-attn"
    text = error.format_message()
    if isinstance(error, click.MissingParameter):
        example = re.search(r"^ *(vision-attn .*[^\\])$", (error.ctx and error.ctx.command.help) or "", re.M)
        text += f"\nFor example: {example[1]}" if example else ""
    elif isinstance(error, click.BadParameter) and error.param is not None:
        option = isinstance(error.param, click.Option)
        text = f"{max(error.param.opts, key=len) if option else error.param.make_metavar(error.ctx)}: {error.message}"
    return f"Error: {text}\nSee: {command} --help"


def _message(error: Exception) -> str:
    text = str(error).strip()
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory. Ask for a smaller --height, --width or --frames, or --dtype bfloat16."
    if "allocate memory" in text or isinstance(error, MemoryError):
        return "out of memory. Ask for something smaller: fewer tokens, frames or pixels, or a smaller batch."
    if isinstance(error, ModuleNotFoundError) and error.name and text.startswith("No module named"):
        package = error.name.partition(".")[0]
        return f"{package} is not installed; run: pip install 'vision-attn[apps]'. vision-attn doctor says what is."
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
        return f"{error.strerror}: {error.filename}{_neighbor(Path(error.filename))} Give a file that is there."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'} (--debug shows where)"


def _neighbor(path: Path) -> str:
    """The most similar name in the same folder, as the end of a sentence."""
    try:
        return nearest(path.name, os.listdir(path.parent))
    except OSError:
        return f": there is no folder {path.parent}."


if __name__ == "__main__":
    sys.exit(main())
