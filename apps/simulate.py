"""`vision-attn simulate`: bounds, bytes and a predicted time, without running anything."""

import json
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.files import PICTURES, atomic, check_ending, check_new
from vision_attn.apps.option_types import Choice, Whole, offer
from vision_attn.apps.pattern_options import GRID, PatternName, build_pattern, pattern_options
from vision_attn.apps.run_options import json_option, overwrite_option


class Counts(click.ParamType):
    """Whole numbers in a range, separated by commas."""

    name = "N,N,..."

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and self.least <= int(part) <= self.most for part in parts):
            self.fail(f"got {value!r}; give whole numbers from {self.least} to {self.most}, such as 2,8.", param, ctx)
        return tuple(int(part) for part in parts)


DTYPES = ("bfloat16", "float16", "float32")


@click.command()
@click.option("--grid", type=GRID, help="Sizes in tokens: L, H,W or T,H,W.")
@click.option("--pattern", type=PatternName(), default="neighborhood", show_default=True, help="Who sees whom.")
@click.option("--heads", type=Whole(1), default=1, show_default=True, help="Attention heads, times the batch.")
@click.option("--head-dim", type=Whole(1), default=128, show_default=True, help="Channels per head.")
@click.option("--dtype", type=Choice(DTYPES), help="Of the inputs; the first of the profile unless given.")
@click.option(
    "--device",
    default="h100",
    show_default=True,
    shell_complete=offer("h100", "here", file=True),
    help="Whose time to predict: h100, here (this machine, once measured) or a profile, FILE.json.",
)
@click.option(
    "--ranks", type=Counts(2, 1024), help="Also the bytes that moving keys over so many ranks takes, such as 2,8,1024."
)
@click.option("--measure", "measured", is_flag=True, help="First measure this machine and keep its profile.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A picture of the bounds: .png, .svg or .pdf.")
@overwrite_option
@json_option
@pattern_options
def simulate(
    grid: tuple[int, ...] | None,
    pattern: str,
    heads: int,
    head_dim: int,
    dtype: str | None,
    device: str,
    ranks: tuple[int, ...] | None,
    measured: bool,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Say what a pattern costs on a kernel with tiles, and predict its time on a device, without running it.

    The bound of a tile pair is the speed-up over dense attention when all tiles that hold a visible pair are computed.
    Predicted times come from the rates of a device profile; nothing is timed unless --measure is given, which takes
    some seconds and writes the profile `here` (or FILE.json of --device).

    \b
    Examples:
      vision-attn simulate --grid 30,48,80 --window 18,24,24 --stride 1 --heads 24
      vision-attn simulate --pattern radial --decay 0.2 --grid 18,48,80 --heads 24
      vision-attn simulate --grid 21,45,80 --window 9,15,24 --heads 40 --ranks 2,8,40,1024
      vision-attn simulate --measure --device here --grid 64,64 --window 13 --heads 4 --head-dim 64
    """
    if grid is None and not measured:
        raise click.UsageError(
            "nothing to do: give --grid, for example --grid 30,48,80 --window 18,24,24, or --measure"
        )
    built = None if grid is None else build_pattern(pattern, options, grid)
    if output is not None:
        if grid is None:
            raise click.UsageError("-o draws the bounds of a grid; give --grid")
        check_ending(output, *PICTURES)
        check_new([output], overwrite)
    if measured:
        device = _measure(device, overwrite)
    if built is None:
        click.echo(json.dumps({"profile": device}) if as_json else f"profile {device}")
        return
    import torch

    from vision_attn.kernels.rates import load_profile
    from vision_attn.kernels.simulate import simulate as simulate_pattern

    try:
        dtype = dtype or next(iter(load_profile(device).flops_per_s))
    except ValueError as error:
        raise click.UsageError(f"--device: {error}") from error
    answer = simulate_pattern(built, grid, heads=heads, head_dim=head_dim, dtype=getattr(torch, dtype), device=device)
    if output is not None:
        from vision_attn.kernels.bench.pictures import draw_bounds

        with atomic(output) as partial:
            draw_bounds(answer, partial)
    plain, lines = answer.to_dict(), [str(answer)]
    if ranks:
        over, text = _over_ranks(built, grid, ranks, heads=heads, head_dim=head_dim, dtype=answer.dtype)
        plain["over_ranks"] = over
        lines += ["", text]
    if output is not None:
        plain["picture"] = str(output)
        lines.append(str(output))
    click.echo(json.dumps(plain) if as_json else "\n".join(lines))


def _over_ranks(pattern: Any, grid: tuple[int, ...], ranks: tuple[int, ...], **options: Any) -> tuple[dict, str]:
    """Bytes moved per number of ranks, as plain values and as text."""
    import dataclasses

    from vision_attn.kernels.traffic import as_text, stops_paying, volumes

    try:
        found, stop = volumes(pattern, grid, ranks, **options), stops_paying(pattern, grid, **options)
    except ValueError as error:
        raise click.UsageError(f"--ranks: {error}") from error
    rows = [dataclasses.asdict(v) | {"least": v.least} for v in found]
    return {"rows": rows, "ulysses_moves_less_from": stop}, as_text(found, stop)


def _measure(device: str, overwrite: bool) -> str:
    """Measure this machine and write its profile; returns the name to load it by."""
    import dataclasses

    import torch

    from vision_attn.kernels.bench.measure import measure
    from vision_attn.kernels.rates import HERE, here

    if device.endswith(".json"):
        path = Path(device)
        check_new([path], overwrite)
    else:  # `here` is a measurement that a new one replaces
        path, device = here(), HERE
    click.echo("measuring this machine; some seconds", err=True)
    profile = measure("cuda" if torch.cuda.is_available() else "cpu")
    with atomic(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(profile), indent=2) + "\n")
    return device
