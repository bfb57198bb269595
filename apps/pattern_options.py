"""The options of patterns on the command line, shared by every command that takes a pattern."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from vision_attn.apps.option_types import nearest, offer

if TYPE_CHECKING:
    from vision_attn.kernels.patterns import Pattern

# Pattern -> its options: the fields of its dataclass, spelled out here so that --help need not import torch.
# BlockList is computed from data and PerHead holds other patterns: they have no place on a command line.
PATTERNS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "neighborhood": ("window", "stride", "dilation", "causal"),
    "window": ("size", "shift"),
    "sliding-tile": ("tile", "window"),
    "halo": ("block", "halo"),
    "circle": ("radius", "pooled"),
    "radial": ("decay", "block", "sink", "rule", "thin"),
    "length-decay": ("train_frames", "alpha", "beta", "period", "gamma", "first_frame", "center_keys", "shape"),
    "power-step": ("block", "window", "sink", "causal"),
    "streaming": ("window", "sink"),
}
EXAMPLES = {
    "neighborhood": "--window 5,9,9",
    "window": "--size 8,8",
    "sliding-tile": "--tile 3,8,8 --window 3,3,3",
    "halo": "--block 8 --halo 3",
    "circle": "--radius 8",
    "length-decay": "--train-frames 21",
    "power-step": "--block 64 --window 128",
    "streaming": "--window 256",
}


class PatternName(click.ParamType):
    name = "attention"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return offer(*PATTERNS)(ctx, param, incomplete)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in PATTERNS:
            allowed = ", ".join(PATTERNS)
            self.fail(f"unknown attention {value!r}{nearest(value, PATTERNS)} Allowed: {allowed}.", param, ctx)
        return value


class PerAxis(click.ParamType):
    """One value for every axis of the grid, or one per axis separated by commas."""

    name = "n[,n,n]"

    def __init__(self, what: str, read: Callable[[str], Any], always_tuple: bool = False):
        self.what, self.read, self.always_tuple = what, read, always_tuple

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            entries = tuple(self.read(entry.strip()) for entry in value.split(","))
        except (KeyError, ValueError):
            self.fail(f"got {value!r}; give {self.what}, separated by commas", param, ctx)
        return entries if self.always_tuple or len(entries) > 1 else entries[0]


INTS = PerAxis("one whole number, or one per axis", int)
BOOLS = PerAxis("true or false, once or one per axis", {"true": True, "false": False}.__getitem__)
NUMBERS = PerAxis("one number, or two", float)
GRID = PerAxis("one to three sizes in tokens, such as 21,45,80 for (frames, height, width)", int, always_tuple=True)


class Sink(click.ParamType):
    """Nothing behind the option means yes; a number means so many tokens."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | int:
        if value == "yes":
            return True
        try:
            return int(value)
        except ValueError:
            self.fail(f"got {value!r}; give a number of tokens, or nothing for radial", param, ctx)


_OPTIONS = [
    click.option("--window", type=INTS, help="neighborhood: keys per axis; sliding-tile: tiles per axis; power-step, "
                 "streaming: tokens."),
    click.option("--stride", type=INTS, help="neighborhood: queries per axis that share one window."),
    click.option("--dilation", type=INTS, help="neighborhood: step between the keys of a window."),
    click.option("--causal", type=BOOLS, help="neighborhood: look back only, for example true,false,false; "
                 "power-step: true or false."),
    click.option("--size", type=INTS, help="window: tokens per window and axis."),
    click.option("--shift", type=INTS, help="window: where the first cut lies."),
    click.option("--tile", type=INTS, help="sliding-tile: tokens per tile and axis."),
    click.option("--block", type=INTS, help="halo: tokens per block and axis; power-step: tokens; radial: narrowest "
                 "half width in tokens, and the block of --rule block."),
    click.option("--halo", type=INTS, help="halo: tokens around a block, per axis."),
    click.option("--radius", type=int, help="circle: tokens."),
    click.option("--pooled", type=int, help="circle: also show everyone the means over cells of this side."),
    click.option("--decay", type=float, help="radial: width of the diagonals; less is sparser."),
    click.option("--sink", type=Sink(), is_flag=False, flag_value="yes", help="radial (without a number): every token "
                 "sees the first frame; power-step, streaming: first tokens that every token sees."),
    click.option("--no-sink", is_flag=True, help="radial: it does not."),
    click.option("--rule", shell_complete=offer("token", "block"), help="radial: token (exact) or block (as "
                 "published)."),
    click.option("--thin", type=int, help="radial: far frames are skipped below this width; 0 keeps all."),
    click.option("--train-frames", type=int, help="length-decay, --times: latent frames the model was trained on."),
    click.option("--alpha", type=NUMBERS, help="length-decay: multiplier of distant scores; near,far with --shape."),
    click.option("--beta", type=float, help="length-decay: multiplier where the model repeats itself."),
    click.option("--period", type=float, help="length-decay: latent frames after which it repeats itself."),
    click.option("--gamma", type=float, help="length-decay: latent frames around a repetition."),
    click.option("--first-frame/--no-first-frame", default=None, help="length-decay: the first frame sees the trained "
                 "length only."),
    click.option("--center-keys/--no-center-keys", default=None, help="length-decay: subtract the mean key first."),
    click.option("--shape", shell_complete=offer("constant", "linear", "parabolic"), help="length-decay: constant, "
                 "linear or parabolic."),
]  # fmt: skip
NAMES = tuple(dict.fromkeys(name for own in PATTERNS.values() for name in own))


def pattern_options(command: Callable) -> Callable:
    """Give a click command the options of every pattern; it receives those that were typed as `options`."""

    @functools.wraps(command)
    def packed(*args: Any, **kwargs: Any) -> Any:
        typed = {name: kwargs.pop(name) for name in NAMES}
        if kwargs.pop("no_sink"):
            if typed["sink"] is not None:
                raise click.UsageError("--sink and --no-sink exclude each other.")
            typed["sink"] = False
        return command(*args, options={key: value for key, value in typed.items() if value is not None}, **kwargs)

    for option in reversed(_OPTIONS):
        packed = option(packed)
    return packed


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options that belong to another pattern."""
    for option in options:
        if option not in PATTERNS[name]:
            *most, last = (home for home, own in PATTERNS.items() if option in own)
            homes = f"{', '.join(most)} and {last}" if most else last
            own = ", ".join(map(_flag, PATTERNS[name])) or "no options"
            raise click.UsageError(f"{_flag(option)} belongs to {homes}, not to {name}, which takes {own}.")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def build_pattern(
    name: str, options: dict[str, Any], grid: tuple[int, ...] | None = None, suggested: dict[str, Any] | None = None
) -> "Pattern":
    """The pattern that was asked for.

    Args:
        name: a key of `PATTERNS`.
        options: what was typed.
        grid: check that the pattern fits this grid.
        suggested: options of this pattern that suit the model, used where nothing was typed.

    Raises:
        click.UsageError: options of another pattern, missing or wrong ones, or a pattern that does not fit the grid.
    """
    import dataclasses

    from vision_attn.kernels import patterns

    check_options(name, options)
    cls = patterns.PATTERNS[name]
    chosen = {**(suggested or {}), **options}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in chosen:
            raise click.UsageError(f"{name} needs {_flag(field.name)}, for example {EXAMPLES[name]}.")
    try:
        pattern = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()})
        if grid is not None:
            pattern.check(grid)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    return pattern
