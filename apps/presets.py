"""`vision-attn presets`: published attention settings, and what they become at another size."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vision_attn.apps.files import atomic, check_new
from vision_attn.apps.option_types import Whole
from vision_attn.apps.pattern_options import GRID
from vision_attn.apps.run_options import json_option, overwrite_option

if TYPE_CHECKING:
    from vision_attn.diffusion import Preset


@click.command()
@click.argument("name", required=False)
@click.option("--grid", type=GRID, help="The nearest setting for this many tokens: T,H,W, or H,W for images.")
@click.option("--steps", type=Whole(1), help="Carry the dense steps over to this many denoising steps.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the preset as JSON, to edit and to attach."
)
@overwrite_option
@json_option
def presets(
    name: str | None,
    grid: tuple[int, ...] | None,
    steps: int | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """List the published attention settings of pretrained models, or show one, fitted to a size.

    \b
    Examples:
      vision-attn presets
      vision-attn presets radial/wan2.1-14b
      vision-attn presets gna/hunyuanvideo --grid 21,45,80 --steps 30 -o hunyuan-81.json
    """
    from vision_attn.diffusion import published

    if name is None:
        if grid or steps or output:
            raise click.UsageError("--grid, --steps and -o go with the name of a preset.")
        rows = [_row(each, published.preset(each)) for each in published.presets()]
        click.echo(json.dumps(rows) if as_json else "\n\n".join(map(_text, rows)))
        return
    chosen = published.preset(name)
    fitted: Preset = chosen
    if grid or steps:
        fitted = published.fit_preset(chosen, grid or chosen.grid, steps=steps)
    if output is not None:
        check_new([output], overwrite)
        with atomic(output) as partial:
            fitted.save(partial)
    row = _row(name, fitted) | {"grid": list(grid or chosen.grid), "steps": steps or chosen.steps}
    row["density"] = round(fitted.pattern.density(tuple(row["grid"])), 4)
    if output is not None:
        row["file"] = str(output)
    click.echo(json.dumps(row) if as_json else _text(row))


def _row(name: str, preset: "Preset") -> dict[str, Any]:
    row = {"name": name, **{key: value for key, value in preset.to_dict().items() if key != "method"}}
    if hasattr(preset, "grid"):
        row |= {"grid": list(preset.grid), "steps": preset.steps}
    return row


def _text(row: dict[str, Any]) -> str:
    def call(values: dict[str, Any]) -> str:
        return ", ".join(f"{key}={value}" for key, value in values.items())

    pattern = dict(row["pattern"])
    lines = [row["name"], f"  {row['model']}: {pattern.pop('pattern')}({call(pattern)})"]
    size = f"for {'x'.join(map(str, row['grid']))} tokens" + (f", {row['steps']} steps" if row["steps"] else "")
    if "density" in row:
        size += f": {row['density']:.1%} of the query-key pairs"
    lines.append("; ".join(filter(None, (call(row["options"]), size))))
    lines[-1] = "  " + lines[-1]
    lines.append(f"  {row['note']}")
    if "file" in row:
        lines.append(f"  written to {row['file']}")
    return "\n".join(lines)
