"""`vision-attn calibrate`: the cheapest patterns that keep what a pipeline looks at."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.files import PICTURES, atomic, check_ending, check_new, writable_folder
from vision_attn.apps.option_types import Real, Whole
from vision_attn.apps.run_options import checked_device, overwrite_option, pipeline_option, prompts_option, run_options


@click.command()
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@prompts_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The preset, a .json file.")
@click.option("--picture", type=click.Path(path_type=Path), help="How attention falls off: .png, .svg or .pdf.")
@overwrite_option
@pipeline_option
@click.option("--recall", type=float, default=0.95, show_default=True, help="Share of the mass every head must keep.")
@click.option("--rows", type=Whole(1), default=64, show_default=True, help="Queries sampled per call.")
@click.option("--per-layer", is_flag=True, help="One pattern for all heads of a layer.")
@click.option("--frames", type=int, help="Frames of a video.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--steps", type=Whole(1, 1000), help="Denoising steps.")
@click.option("--guidance", type=Real(0), help="Strength of the prompt.")
@click.option("--seed", type=Whole(0, 2**32 - 1), default=0, show_default=True, help="Of noise and rows.")
@run_options
def calibrate(
    prompts: tuple[str, ...],
    prompts_file: str | None,
    output: Path,
    picture: Path | None,
    overwrite: bool,
    model: str | None,
    recall: float,
    rows: int,
    per_layer: bool,
    seed: int,
    device: str,
    dtype: str,
    progress: bool | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Draw PROMPTs with dense attention, watch some rows of it, and write a preset of patterns per layer and head.

    Every head keeps at least --recall of its attention mass with the fewest query-key pairs; a head that no pattern
    suits stays dense. Calibrate at the size you will draw: windows are in tokens of its grid.

    \b
    Examples:
      vision-attn calibrate "a red circle moves right" "a blue square moves up" -o preset.json --picture decay.png
      vision-attn calibrate --prompts prompts.txt -o preset.json --recall 0.9 --per-layer --steps 8
    """
    from vision_attn.apps.generate import _loading_bars, read_prompts

    texts = read_prompts(prompts, prompts_file)
    if not 0 < recall <= 1:
        raise click.UsageError(f"--recall: got {recall}; give a share above 0 and at most 1, such as 0.95.")
    check_ending(output, ".json")
    if picture is not None:
        check_ending(picture, *PICTURES, option="--picture")
    files = [path for path in (output, picture) if path is not None]
    check_new(files, overwrite)
    from vision_attn.apps import job as jobs
    from vision_attn.apps.sampling import call_arguments
    from vision_attn.diffusion.calibration import calibrate as measure
    from vision_attn.diffusion.loading import load

    job = jobs.plan(
        model, "dense", {}, typed, dense_steps=None, dense_layers=None, with_dense=False, output=output.parent
    )
    checked_device(device, dtype)
    for path in files:
        writable_folder(path.parent)
    shown = sys.stderr.isatty() if progress is None else progress
    _loading_bars(shown)
    loaded = load(model, device=device, dtype=None if dtype == "auto" else dtype)
    loaded.pipe.set_progress_bar_config(disable=not shown, desc="calibrate")
    try:
        arguments = call_arguments(loaded.pipe, job.settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found = measure(loaded.pipe, texts, recall, rows=rows, per_head=not per_layer, seed=seed, **arguments)
    found.preset.save(output)
    if picture is not None:
        with atomic(picture) as partial:
            found.draw(partial)
    paths = [str(path) for path in files]
    click.echo(json.dumps(found.to_dict() | {"files": paths}) if as_json else "\n".join([str(found), *paths]))
