"""The `vision-attn` command: the list of commands, and what every one of them does about errors.

Exit codes: 0 done, 1 failed, 2 the command line must be changed, 130 interrupted.
Results go to stdout, everything else to stderr.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from vision_attn import __version__
from vision_attn.apps.pattern_options import nearest

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
    "presets": "List published attention settings, or fit one to a size.",
    "doctor": "Report versions, devices and backends.",
}
_DEBUG = "vision_attn.debug"


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
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="vision-attn")
def cli() -> None:
    """Spatial attention for vision, diffusion and vision-language models: methods that run on any machine.

    \b
    Examples:
      vision-attn generate "a red circle moves right" -o out/
      vision-attn show radial --decay 0.2 --grid 21,45,80 -o radial.png
      vision-attn COMMAND --help
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors become one message on stderr."""
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
    return f"Error: {error.format_message()}\nSee: {command} --help"


def _message(error: Exception) -> str:
    text = str(error).strip()
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory. Ask for a smaller --height, --width or --frames, or --dtype bfloat16."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
