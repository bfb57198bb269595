"""`vision-attn show`: a picture of a pattern."""

import json
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.files import PICTURES, atomic, check_ending, check_new
from vision_attn.apps.pattern_options import GRID, PatternName, build_pattern, pattern_options
from vision_attn.apps.run_options import json_option, overwrite_option


@click.command()
@click.argument("pattern", type=PatternName(), metavar="PATTERN")
@click.option("--grid", type=GRID, required=True, help="Sizes in tokens: L, H,W or T,H,W.")
@click.option("--query", type=GRID, help="Coordinates of the query; the middle unless given.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The picture: .png, .svg or .pdf.")
@overwrite_option
@json_option
@pattern_options
def show(
    pattern: str,
    grid: tuple[int, ...],
    query: tuple[int, ...] | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Draw what one query sees, how many keys each query sees, and the mask of a small grid.

    PATTERN is dense, neighborhood, window, sliding-tile, halo, circle, radial, length-decay, power-step or streaming.

    \b
    Examples:
      vision-attn show neighborhood --window 7 --grid 16,16 --query 3,5 -o neighborhood.png
      vision-attn show radial --decay 0.2 --grid 21,45,80 -o radial.png
    """
    check_ending(output, *PICTURES)
    built = build_pattern(pattern, options, grid)
    if query is not None and (len(query) != len(grid) or not all(0 <= q < n for q, n in zip(query, grid, strict=True))):
        raise click.UsageError(f"--query {query} is not on the grid {grid}; count from 0, one number per axis.")
    check_new([output], overwrite)
    from vision_attn.kernels.draw import draw

    with atomic(output) as partial:
        draw(built, grid, query, partial)
    result = {"pattern": built.to_dict(), "grid": list(grid), "density": built.density(grid), "picture": str(output)}
    click.echo(json.dumps(result) if as_json else f"{built}\ndensity {result['density']:.1%} on grid {grid}\n{output}")
