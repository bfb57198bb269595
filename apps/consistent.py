"""`vision-attn consistent`: several pictures with the same subjects."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.option_types import Real, Whole
from vision_attn.apps.run_options import checked_device, overwrite_option, pipeline_option, run_options

SEEDS = 2**32 - 1


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    required=True,
    metavar="WORDS[=PROMPT]",
    help="Words that stand in the prompts, and what to draw as the reference of them; the words unless given.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@overwrite_option
@pipeline_option
@click.option("--isolation/--no-isolation", default=True, show_default=True, help="Keep subjects apart.")
@click.option("--reposition/--no-reposition", default=True, show_default=True, help="Show subjects their reference.")
@click.option(
    "--cross",
    type=Real(0, 1),
    default=0.9,
    show_default=True,
    help="Share of the reference's prompt inside a subject.",
)
@click.option(
    "--threshold",
    type=Real(0, 1, min_open=True, max_open=True),
    help="Where attention to its words counts as a subject, 0 to 1; found for each picture unless given.",
)
@click.option("--frames", type=int, help="Frames of a video, 4n+1 for most models; 1 draws an image.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--steps", type=Whole(1, 1000), help="Denoising steps.")
@click.option("--guidance", type=Real(0), help="Strength of the prompt.")
@click.option("--negative", metavar="TEXT", help="What to keep out.")
@click.option("--seed", type=Whole(0, SEEDS), default=0, show_default=True, help="The next pictures count up.")
@run_options
def consistent(
    prompts: tuple[str, ...],
    subjects: tuple[str, ...],
    output: Path,
    overwrite: bool,
    model: str | None,
    isolation: bool,
    reposition: bool,
    cross: float,
    threshold: float | None,
    seed: int,
    device: str,
    dtype: str,
    progress: bool | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Draw PROMPTs with the same subjects in them: one file each, one per reference, and a sheet to compare.

    The model draws twice: first to find the subjects by attention to their words, then with their references in view.

    \b
    Examples:
      vision-attn consistent "a red circle and a blue square" "a red circle and a white cross" \\
          --subject "red circle" --subject "blue square=a big blue square" -o out/ --frames 1
      vision-attn consistent "a red fox in snow" "a red fox on a beach" --subject "red fox" -o out/ \\
          --model stabilityai/stable-diffusion-xl-base-1.0 --device cuda
    """
    if any(not text.strip() for text in prompts):
        raise click.UsageError("a prompt is empty; describe what to draw.")
    if seed + len(subjects) + len(prompts) - 1 > SEEDS:
        raise click.UsageError(
            f"--seed: {seed} and {len(subjects) + len(prompts)} pictures count past {SEEDS}, the largest seed."
        )
    named = {}
    for text in subjects:
        words, _, prompt = text.partition("=")
        if not words.strip() or ("=" in text and not prompt.strip()):
            raise click.UsageError(f"--subject {text!r}: give words of the prompts, or words=prompt of the reference.")
        if words.strip() in named:
            raise click.UsageError(f"--subject {words.strip()!r} is given twice.")
        named[words.strip()] = prompt.strip() or words.strip()
    if not (isolation or reposition or cross):
        raise click.UsageError("--no-isolation, --no-reposition and --cross 0 leave nothing to do.")

    from vision_attn.apps.files import check_new, slug, writable_folder
    from vision_attn.apps.generate import _loading_bars, _warn_of_words, need
    from vision_attn.apps.sampling import call_arguments
    from vision_attn.diffusion.loading import SizeError, inspect_model, load

    info = inspect_model(model)
    defaults = ("frames", "height", "width", "steps", "guidance", "max_sequence_length")
    settings = {key: info.defaults.get(key) for key in defaults}
    settings |= {key: value for key, value in typed.items() if value is not None or key not in settings}
    number = None if dtype == "auto" else dtype
    try:
        info.grid(*(settings[name] for name in ("frames", "height", "width")))
    except SizeError as error:
        raise click.UsageError(f"--{error}") from error
    checked_device(device, dtype)
    still = settings["frames"] == 1 or not info.video
    need("PIL", *([] if still else ["av"]))
    names = [f"reference-{slug(words)}-{seed + i}" for i, words in enumerate(named)]
    names += [f"{slug(text)}-{seed + len(named) + i}" for i, text in enumerate(prompts)]
    paths = [output / (name + (".png" if still else ".mp4")) for name in names]
    extra = {kind: output / f"{names[len(named)]}{end}" for kind, end in SHEETS.items()}
    writable_folder(output)
    check_new([*paths, *extra.values()], overwrite)

    shown = sys.stderr.isatty() if progress is None else progress
    _loading_bars(shown)
    loaded = load(model, device=device, dtype=number)
    loaded.pipe.set_progress_bar_config(disable=not shown)
    if info.built_in:
        _warn_of_words(loaded, [*named.values(), *prompts, typed["negative"] or ""])
    try:
        arguments = call_arguments(loaded.pipe, settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    options = {"isolation": isolation, "reposition": reposition, "cross": cross, "threshold": threshold, "seed": seed}
    record = draw(loaded, named, list(prompts), settings, arguments, options, paths, extra)
    if as_json:
        from vision_attn.apps.job import dump

        click.echo(dump(record))
    else:
        for entry in record["pictures"]:
            click.echo(f"{entry['prompt']} (seed {entry['seed']})\n  {entry['kind']:<13} {entry['file']}")
        click.echo(f"  {'sheet':<13} {extra['sheet']}\n  {'seconds':<13} {record['seconds']:.2f}, both times")


SHEETS = {"sheet": ".sheet.png", "settings": ".consistent.json"}


def draw(
    loaded: Any,
    subjects: dict[str, str],
    prompts: list[str],
    settings: dict[str, Any],
    arguments: dict[str, Any],
    options: dict[str, Any],
    paths: list[Path],
    extra: dict[str, Path],
) -> dict[str, Any]:
    """Make the pictures, write their files, and return the record that the JSON file holds."""
    import numpy as np

    from vision_attn.apps import media
    from vision_attn.apps.files import atomic
    from vision_attn.apps.job import dump, versions
    from vision_attn.diffusion import consistent_images

    start = time.perf_counter()
    made = consistent_images(loaded.pipe, subjects, prompts, **options, **arguments)
    seconds = time.perf_counter() - start
    pixels = np.concatenate([made.first, made.references, made.images])
    if not np.isfinite(pixels).all():
        raise RuntimeError(f"the model produced NaN in {loaded.dtype}; use --dtype float32 or bfloat16")
    pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    first, final = np.split(pixels if pixels.ndim == 5 else pixels[:, None], 2)
    height, width = final.shape[2:4]
    record = {
        **settings, **options, "height": height, "width": width, "subjects": subjects,
        "model": "built-in shapes-video" if loaded.info.built_in else loaded.info.source,
        "attention": {"pattern": "ir-diffusion", **made.method.to_dict()}, "report": made.report.to_dict(),
        "device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch."), "versions": versions(),
        "seconds": seconds, "pictures": [],
    }  # fmt: skip
    rows = {}
    for i, (prompt, frames, path) in enumerate(zip([*subjects.values(), *prompts], final, paths, strict=True)):
        kind = "reference" if i < len(subjects) else "picture"
        entry = {"prompt": prompt, "seed": options["seed"] + i, "kind": kind, "file": str(path)}
        embedded = {**{key: value for key, value in record.items() if key != "pictures"}, **entry}
        if path.suffix == ".png":
            media.write_picture(path, frames[0], embedded)
        else:
            media.write_video(path, frames, loaded.info.defaults["fps"], embedded)
        record["pictures"].append(entry)
        if kind == "picture":
            rows[f"alone: {prompt} (seed {entry['seed']})"] = first[i]
        rows[f"{'reference' if kind == 'reference' else 'consistent'}: {prompt} (seed {entry['seed']})"] = frames
    media.write_sheet(extra["sheet"], rows, ", ".join(subjects))
    with atomic(extra["settings"]) as partial:
        partial.write_text(dump(record, indent=2) + "\n", encoding="utf-8")
    return record
