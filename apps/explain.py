"""`vision-attn explain`: which backends can compute a pattern, and why not the others."""

import json
from typing import Any

import click

from vision_attn.apps.pattern_options import GRID, PatternName, build_pattern, pattern_options


@click.command()
@click.argument("pattern", type=PatternName(), metavar="PATTERN")
@click.option("--grid", type=GRID, required=True, help="Sizes in tokens: L, H,W or T,H,W.")
@click.option("--heads", type=click.IntRange(1), default=1, show_default=True, help="Attention heads.")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True, help="Channels per head.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="May be absent here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@pattern_options
def explain(
    pattern: str,
    grid: tuple[int, ...],
    heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Say which backends can compute a pattern, how sparse it is, and the speed-up to expect.

    PATTERN is dense, neighborhood, window, sliding-tile, halo, circle, radial, length-decay, power-step or streaming.

    \b
    Examples:
      vision-attn explain neighborhood --window 13 --grid 64,64
      vision-attn explain radial --decay 0.2 --grid 21,45,80 --heads 12 --head-dim 128 --dtype bfloat16 --device cuda
    """
    built = build_pattern(pattern, options, grid)
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise click.UsageError(f"--dtype: got {dtype!r}, allowed: float32, bfloat16, float16, float64")
    import torch

    from vision_attn import explain as explain_pattern
    from vision_attn.diffusion.loading import resolve_device

    # A machine can be asked about that is not this one, so only "auto" looks at the devices that are there.
    kind = resolve_device("auto").type if device == "auto" else device
    table = explain_pattern(built, grid, heads=heads, head_dim=head_dim, dtype=getattr(torch, dtype), device=kind)
    click.echo(json.dumps(table.to_dict()) if as_json else str(table))
