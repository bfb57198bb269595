"""`vision-attn simulate`: bounds, bytes and a predicted time, without running anything."""

import json
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.files import atomic, check_new
from vision_attn.apps.pattern_options import GRID, PatternName, build_pattern, pattern_options

DTYPES = ("bfloat16", "float16", "float32")


@click.command()
@click.option("--grid", type=GRID, help="Sizes in tokens: L, H,W or T,H,W.")
@click.option("--pattern", type=PatternName(), default="neighborhood", show_default=True, help="Who sees whom.")
@click.option("--heads", type=click.IntRange(1), default=1, show_default=True, help="Attention heads, times the batch.")
@click.option("--head-dim", type=click.IntRange(1), default=128, show_default=True, help="Channels per head.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the inputs; the first of the profile unless given.")
@click.option(
    "--device",
    default="h100",
    show_default=True,
    help="Whose time to predict: h100, here (this machine, once measured) or a profile, FILE.json.",
)
@click.option("--measure", "measured", is_flag=True, help="First measure this machine and keep its profile.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A picture of the bounds: .png, .svg or .pdf.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@pattern_options
def simulate(
    grid: tuple[int, ...] | None,
    pattern: str,
    heads: int,
    head_dim: int,
    dtype: str | None,
    device: str,
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
        if output.suffix not in (".png", ".svg", ".pdf"):
            raise click.UsageError(f"-o: got {output.name!r}; the name must end in .png, .svg or .pdf.")
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
    picture = {"picture": str(output)} if output else {}
    click.echo(json.dumps(answer.to_dict() | picture) if as_json else "\n".join([str(answer), *picture.values()]))


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
