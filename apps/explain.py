"""`vision-attn explain`: which backends can compute a pattern, and why not the others."""

import json
from typing import Any

import click

from vision_attn.apps.option_types import Choice, Whole
from vision_attn.apps.pattern_options import GRID, PatternName, build_pattern, pattern_options
from vision_attn.apps.run_options import json_option


@click.command()
@click.argument("pattern", type=PatternName(), metavar="PATTERN")
@click.option("--grid", type=GRID, required=True, help="Sizes in tokens: L, H,W or T,H,W.")
@click.option("--heads", type=Whole(1), default=1, show_default=True, help="Attention heads.")
@click.option("--head-dim", type=Whole(1), default=64, show_default=True, help="Channels per head.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@click.option(
    "--device",
    type=Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="May be absent here.",
)
@click.option("--advise", is_flag=True, help="neighborhood: also the nearest window and stride that need no masks.")
@json_option
@pattern_options
def explain(
    pattern: str,
    grid: tuple[int, ...],
    heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    advise: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Say which backends can compute a pattern, how sparse it is, and the speed-up to expect.

    PATTERN is dense, neighborhood, window, sliding-tile, halo, circle, radial, length-decay, power-step or streaming.

    \b
    Examples:
      vision-attn explain neighborhood --window 13 --grid 64,64
      vision-attn explain radial --decay 0.2 --grid 21,45,80 --heads 12 --head-dim 128 --dtype bfloat16 --device cuda
      vision-attn explain neighborhood --window 18,24,24 --grid 30,48,80 --dtype bfloat16 --device cuda --advise
    """
    if advise and (pattern != "neighborhood" or options.keys() - {"window"}):
        raise click.UsageError("--advise looks for a stride: give it neighborhood with --window only.")
    built = build_pattern(pattern, options, grid)
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise click.UsageError(f"--dtype: got {dtype!r}, allowed: float32, bfloat16, float16, float64")
    import torch

    from vision_attn import explain as explain_pattern
    from vision_attn.devices import resolve_device

    # A machine can be asked about that is not this one, so only "auto" looks at the devices that are there.
    kind = resolve_device("auto").type if device == "auto" else device
    call = dict(heads=heads, head_dim=head_dim, dtype=getattr(torch, dtype))
    answers = {"": explain_pattern(built, grid, **call, device=kind)}
    if advise:
        from vision_attn.kernels.advice import advise as advise_window

        profile = "h100" if kind == "cuda" else "here"  # for predicted times
        answers["advice"] = advise_window(grid, built.window, **call, device=profile)
    if as_json:
        table = answers.pop("").to_dict()
        click.echo(json.dumps(table | {name: answer.to_dict() for name, answer in answers.items()}))
    else:
        click.echo("\n\n".join(map(str, answers.values())))
