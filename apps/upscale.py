"""`vision-attn upscale`: videos larger than a model was trained on."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.option_types import FILES, Real, Whole
from vision_attn.apps.run_options import checked_device, overwrite_option, run_options

SEEDS = 2**32 - 1


@click.command()
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@overwrite_option
@click.option("--video", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Enlarge this one.")
@click.option("--times", type=Whole(1), help="Size as a multiple of the small video's; 2 unless given.")
@click.option("--height", type=Whole(1), help="Pixels; goes with --width instead of --times.")
@click.option("--width", type=Whole(1), help="Pixels.")
@click.option(
    "--strength",
    type=Real(0, 1, min_open=True),
    default=0.7,
    show_default=True,
    help="Share of the steps that run again at the new size; less keeps to the small video.",
)
@click.option(
    "--cache-steps",
    type=Whole(0),
    default=2,
    show_default=True,
    help="Every how many steps the global copy is computed; 0: in every call, about twice as slow.",
)
@click.option(
    "--cache-device",
    metavar="DEVICE",
    help="Where what the global copy got from the text waits for the steps between; cpu spares a GPU's memory.",
)
@click.option(
    "--model", metavar="PATH_OR_HUB_ID", shell_complete=FILES, help="A Wan pipeline; the built-in model unless given."
)
@click.option("--frames", type=Whole(1), help="Frames of the small video, 4n+1 for most models.")
@click.option("--steps", type=Whole(1, 1000), help="Denoising steps of the whole schedule.")
@click.option("--guidance", type=Real(0), help="Strength of the prompt.")
@click.option("--shift", type=Real(0, min_open=True), help="Flow shift at the new size.")
@click.option("--negative", metavar="TEXT", help="What to keep out.")
@click.option("--seed", type=Whole(0, SEEDS), default=0, show_default=True, help="Of all noise.")
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to go on from when the same command is given again after an interruption; removed at the end.",
)
@run_options
def upscale(
    prompt: str,
    output: Path,
    overwrite: bool,
    video: Path | None,
    times: int | None,
    height: int | None,
    width: int | None,
    cache_steps: int,
    cache_device: str | None,
    model: str | None,
    device: str,
    dtype: str,
    progress: bool | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Draw PROMPT at the size the model was trained on, then larger with FreeSwim; or enlarge a --video.

    Writes the large and the small video as mp4, a contact sheet, and a JSON file with every setting.

    \b
    Examples:
      vision-attn upscale "a red circle moves right" -o out/ --times 2
      vision-attn upscale "a red circle moves right" -o out/ --height 96 --width 144 --strength 0.5
      vision-attn upscale "a cat on a skateboard" -o out/ --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
          --height 1088 --width 1920 --device cuda --checkpoint out/state
    """
    if not prompt.strip():
        raise click.UsageError("the prompt is empty; describe what to draw.")
    if (height is None) != (width is None):
        raise click.UsageError("--height and --width go together; or use --times.")
    if height is not None and times is not None:
        raise click.UsageError("--times and --height with --width both say the size; give one of them.")

    from vision_attn.apps.files import check_new, slug, writable_folder
    from vision_attn.apps.generate import _loading_bars, _warn_of_words, need
    from vision_attn.diffusion.loading import SizeError, inspect_model, load, resolve_device

    info = inspect_model(model)
    if info.family.name != "Wan":
        raise click.UsageError(f"--model: upscale runs Wan pipelines, and {info.source} is {info.family.name}.")
    number = None if dtype == "auto" else dtype
    try:
        info.grid(typed["frames"], height, width)
    except SizeError as error:
        raise click.UsageError(f"--{error}") from error
    checked_device(device, dtype)
    try:
        cache_device = cache_device and str(resolve_device(cache_device))
    except ValueError as error:
        raise click.UsageError(f"--cache-device: {error}") from error
    need("av", "PIL")
    clip = None if video is None else read_video(video)
    writable_folder(output)
    size = f"{height}x{width}" if height else f"times-{times or 2}"
    name = f"{slug(prompt)}-{typed['seed']}-{size}"
    endings = {"video": ".mp4", "small video": ".small.mp4", "sheet": ".sheet.png", "settings": ".json"}
    paths = {kind: output / f"{name}{ending}" for kind, ending in endings.items()}
    check_new(paths.values(), overwrite)

    shown = sys.stderr.isatty() if progress is None else progress
    _loading_bars(shown)
    loaded = load(model, device=device, dtype=number)
    if info.built_in:
        _warn_of_words(loaded, [prompt, typed["negative"] or ""])
    settings = {
        "prompt": prompt, "video": video and str(video), "cache_steps": cache_steps or None,
        "cache_device": cache_device, **typed,
        "checkpoint": None if typed["checkpoint"] is None else str(typed["checkpoint"]),
    }  # fmt: skip
    record = draw(loaded, clip, height, width, times or 2, settings, paths, shown)
    if not as_json:
        click.echo(describe(record))
        return
    from vision_attn.apps.job import dump

    click.echo(dump(record))


def draw(
    loaded: Any,
    clip: Any | None,
    height: int | None,
    width: int | None,
    times: int,
    settings: dict[str, Any],
    paths: dict[str, Path],
    shown: bool,
) -> dict[str, Any]:
    """Make the video, write its files, and return the record that the JSON file holds."""
    from vision_attn.apps import media
    from vision_attn.apps.files import atomic
    from vision_attn.apps.job import dump

    start = time.perf_counter()
    record, large, small, report = enlarge(loaded, clip, height, width, times, settings, shown)
    seconds = time.perf_counter() - start
    write_videos(paths["video"], paths["small video"], large, small, record)
    rows = {
        f"small, {small.shape[1]} x {small.shape[2]}": small,
        f"upscaled, {record['height']} x {record['width']}": large,
    }
    media.write_sheet(paths["sheet"], rows, f"{settings['prompt']} (seed {settings['seed']})")
    record |= {"seconds": seconds, "report": report}
    record["files"] = {kind: str(path) for kind, path in paths.items()}
    with atomic(paths["settings"]) as partial:
        partial.write_text(dump(record, indent=2) + "\n", encoding="utf-8")
    return record


def write_videos(path: Path, small_path: Path, large: Any, small: Any, record: dict[str, Any]) -> None:
    """Both videos with the settings in them."""
    from vision_attn.apps import media

    media.write_video(small_path, small, record["fps"], record | {"height": small.shape[1], "width": small.shape[2]})
    media.write_video(path, large, record["fps"], record)


def enlarge(
    loaded: Any,
    clip: Any | None,
    height: int | None,
    width: int | None,
    times: int,
    settings: dict[str, Any],
    shown: bool,
) -> tuple[dict[str, Any], Any, Any, dict[str, Any]]:
    """Settings that travel inside the files, frames of the large and of the small video, and the report."""
    import torch

    from vision_attn.apps.job import versions
    from vision_attn.diffusion import FreeSwim, upscale_video
    from vision_attn.diffusion.native import native

    info, pipe = loaded.info, loaded.pipe
    if height is None:
        known = native(pipe.transformer)
        small = clip.shape[1:3] if clip is not None else known and (known.height, known.width)
        if not small:
            raise click.UsageError("the size this model was trained on is not known; give --height and --width.")
        height, width = (side * times for side in small)
    call = {key: info.defaults[key] for key in ("max_sequence_length",) if key in info.defaults}
    made = upscale_video(
        pipe,
        settings["prompt"] if clip is None else clip,
        height,
        width,
        prompt=None if clip is None else settings["prompt"],
        negative_prompt=settings["negative"],
        generator=torch.Generator("cpu").manual_seed(settings["seed"]),
        progress=shown,
        method=FreeSwim(cache_steps=settings["cache_steps"], cache_device=settings.get("cache_device")),
        **{name: settings[name] for name in (
            "strength", "frames", "steps", "guidance", "shift", "checkpoint"
        )},
        **call,
    )  # fmt: skip
    large, small = ((frames[0] * 255).round().astype("uint8") for frames in (made.frames, made.base))
    record = {
        **settings, "frames": len(large), "height": height, "width": width,
        "small_height": small.shape[1], "small_width": small.shape[2], "fps": info.defaults["fps"],
        "model": "built-in shapes-video" if info.built_in else info.source, "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."), "versions": versions(),
    }  # fmt: skip
    return record, large, small, made.report.to_dict()


def describe(record: dict[str, Any]) -> str:
    """The lines printed for the result."""
    sizes = f"{record['small_height']} x {record['small_width']} -> {record['height']} x {record['width']}"
    lines = [f"{record['prompt']} (seed {record['seed']}, {record['frames']} frames, {sizes})"]
    lines += [f"  {kind:<13} {path}" for kind, path in record["files"].items()]
    one = record["report"]["denoisers"][0]
    lines.append(f"  {'attention':<13} freeswim, local copy {one['density']:.1%} of the query-key pairs")
    lines.append(f"  {'seconds':<13} {record['seconds']:.2f}")
    return "\n".join(lines)


def first_frame(path: Path) -> Any:
    """The first frame, uint8 `[height, width, 3]`; raises ValueError when no video can be read from the file."""
    import av

    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError, ValueError, OSError, StopIteration) as error:
        raise ValueError(f"{path}: no video can be read from it ({error})") from error


def read_video(path: Path) -> Any:
    """Frames uint8 `[frames, height, width, 3]`; enlarged pixels of `write_video` become single pixels again.

    Raises:
        click.UsageError: no video can be read from the file.
    """
    import json

    import av
    import numpy as np

    try:
        with av.open(str(path)) as container:
            comment = container.metadata.get("comment", "")
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.FFmpegError, IndexError, ValueError, OSError) as error:
        raise click.UsageError(f"--video {path}: no video can be read from it ({error}).") from error
    try:
        said = json.loads(comment)
        factor = frames.shape[1] // int(said["height"])
        ours = factor > 1 and frames.shape[1:3] == (factor * said["height"], factor * said["width"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        ours = False
    middle = factor // 2 if ours else 0
    return frames[:, middle::factor, middle::factor] if ours else frames
