"""What `vision-attn generate` is asked to do, checked before the model is loaded, and doing it for one prompt."""

import dataclasses
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from vision_attn.apps import media
from vision_attn.apps.files import atomic, slug
from vision_attn.apps.pattern_options import build_pattern
from vision_attn.apps.sampling import Attachment, Sample, call_arguments, compare, sample, warm_up
from vision_attn.diffusion.lengths import check_positions
from vision_attn.diffusion.loading import LoadedPipeline, ModelInfo, SizeError, inspect_model


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything but the prompts. `settings` holds frames, height, width, steps, guidance, max_sequence_length and
    negative; None is left to the pipeline. `described` is what records say of the attachment, `name` what results call
    it."""

    info: ModelInfo
    settings: dict[str, Any]
    attachment: Attachment | None
    described: dict[str, Any]
    name: str
    compare: bool
    output: Path

    def files(self, prompt: str, seed: int) -> dict[str, Path]:
        """Where the results of a prompt go: video or picture, that of the dense run, contact sheet and settings."""
        ending = ".png" if self.settings["frames"] == 1 or not self.info.video else ".mp4"
        name = f"{slug(prompt)}-{seed}"
        kind = "picture" if ending == ".png" else "video"
        paths = {kind: name + ending, "sheet": name + ".sheet.png", "settings": name + ".json"}
        if self.compare:
            paths[f"dense {kind}"] = f"{name}.dense{ending}"
        return {key: self.output / path for key, path in paths.items()}


def plan(
    model: str | ModelInfo | None,
    attention: str,
    typed_options: dict[str, Any],
    typed: dict[str, Any],
    *,
    dense_steps: int | None,
    dense_layers: int | None,
    with_dense: bool,
    output: Path,
    preset: str | None = None,
    times: float | None = None,
    extend: str = "none",
    train_frames: int | None = None,
) -> Job:
    """Check sizes, pattern and schedule against the JSON files of the model.

    Args:
        model: a folder or Hub id, None for the built-in model, or what `inspect_model` said of it.
        typed: frames, height, width, steps, guidance, negative as typed, None where the model decides.
        preset: name or file, in place of `attention`.
        times: length over the trained one, in place of frames.
        extend: how a longer video is drawn, a name that `extend_video` takes.
        train_frames: latent frames of the trained length, where it is not the model's own number of frames.

    Raises:
        LoadError: the model cannot be used.
        click.UsageError: a size the model cannot draw, a pattern that does not fit its grid, no sparse step left.
    """
    info = model if isinstance(model, ModelInfo) else inspect_model(model)
    defaults = {
        key: info.defaults.get(key) for key in ("frames", "height", "width", "steps", "guidance", "max_sequence_length")
    }
    settings = {**defaults, **{key: value for key, value in typed.items() if value is not None or key not in defaults}}
    extension, described = None, {}
    if times is not None:
        settings["frames"], extension = _longer(info, times, extend, train_frames)
        chosen = extension.to_dict() if extension else {}
        described["extend"] = {"name": extend, **chosen, "times": times}
        described["extend"].pop("method", None)
    try:
        grid = info.grid(settings["frames"], settings["height"], settings["width"])
    except SizeError as error:
        raise click.UsageError(f"--{error}") from error
    schedule = {"dense_steps": dense_steps, "dense_layers": dense_layers}
    if preset is not None:
        part, options = _preset(preset, grid, settings["steps"], schedule), {}
        described["attention"] = {"pattern": "preset", "preset": preset, **part.options, "settings": part.to_dict()}
    else:
        suggested = dict((info.defaults.get("attention") or {}).get(attention) or {})
        options = {key: suggested.pop(key, 0) if value is None else value for key, value in schedule.items()}
        part = build_pattern(attention, typed_options, grid, _cut(suggested, grid))
        described["attention"] = part.to_dict()
        if attention == "dense":
            part, options = None, {}
        described["attention"].update(options)
    dense, name = described["attention"].get("dense_steps", 0), preset or attention
    if settings["steps"] is not None and dense >= settings["steps"]:
        raise click.UsageError(
            f"--dense-steps {dense} of {settings['steps']} steps leaves none for {name}; use fewer, or --attention "
            "dense"
        )
    names = [*([name] if part else []), *([extend] if extension else [])]
    attachment = Attachment(part, options, extension) if names else None
    return Job(info, settings, attachment, described, " + ".join(names) or "dense", with_dense, output)


def _longer(info: ModelInfo, times: float, extend: str, train_frames: int | None) -> tuple[int, Any | None]:
    """Frames of a video so many times as long as the model's own, and the method for it, if any."""
    from vision_attn.diffusion.extend import extension
    from vision_attn.diffusion.lengths import frames_of, tokens_of

    if not info.video:
        raise click.UsageError(f"--times: {info.family.name} draws single images; leave it out.")
    frames = info.defaults.get("frames")
    if train_frames is None and frames is None:
        raise click.UsageError("--times: the model does not say how long its videos are; add --train-frames.")
    trained = tokens_of(info.token, frames) if train_frames is None else train_frames
    try:
        parts = extension(extend, times, trained)
    except ValueError as error:
        raise click.UsageError(f"--times {times:g}: {error}") from error
    return frames_of(info.token, round(trained * times)), parts[0] if parts else None


def _preset(name: str, grid: tuple[int, ...] | None, steps: int | None, schedule: dict[str, int | None]) -> Any:
    """A preset from a file, or a published one fitted to the grid and the number of steps."""
    from vision_attn.diffusion import Preset
    from vision_attn.diffusion.published import fit_preset, preset

    try:
        if name.endswith(".json") or Path(name).is_file():
            found = Preset.load(name)
        else:
            published = preset(name)
            found = fit_preset(published, grid or published.grid, steps=steps if published.steps else None)
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"--preset: {error}") from error
    typed = {key: value for key, value in schedule.items() if value is not None}
    return dataclasses.replace(found, options={**found.options, **typed})


def _cut(suggested: dict[str, Any], grid: tuple[int, ...] | None) -> dict[str, Any]:
    """Suggested windows and tiles, no longer than a smaller grid: nobody typed them, so they cannot be wrong."""
    fits = {k: grid and isinstance(v, list) and len(v) == len(grid) for k, v in suggested.items()}
    return {k: [min(pair) for pair in zip(v, grid, strict=True)] if fits[k] else v for k, v in suggested.items()}


def prepare(job: Job, loaded: LoadedPipeline, prompt: str, bar: str) -> dict[str, Any]:
    """Check what only the loaded model can tell, warm up where times count, and return the arguments of its call."""
    try:
        arguments = call_arguments(loaded.pipe, job.settings)
        grid = job.info.grid(*(job.settings[name] for name in ("frames", "height", "width")))
        if job.info.video and grid:
            check_positions(loaded.pipe.transformer, grid[0])
        if job.attachment:
            with job.attachment.attached(loaded.pipe):
                pass
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if job.compare:
        warm_up(loaded, prompt, arguments, [job.attachment, None], bar)
    return arguments


def run(
    job: Job, loaded: LoadedPipeline, arguments: dict[str, Any], prompt: str, seed: int, bar: str
) -> dict[str, Any]:
    """Draw a prompt, write its files, and return the record that the JSON file holds."""
    made = sample(loaded, prompt, seed, arguments, job.attachment, bar)
    dense = sample(loaded, prompt, seed, arguments, None, bar and f"{bar}, dense") if job.compare else None
    embedded = describe(job, loaded, made, prompt, seed)
    record = dict(embedded)
    record["seconds"] = made.seconds
    record["warmed_up"] = job.compare
    record["report"] = made.reports.get("attention")
    if "extension" in made.reports:
        record["extend_report"] = made.reports["extension"]
    if dense:
        record["dense_seconds"] = dense.seconds
        record["comparison"] = {"speedup": dense.seconds / made.seconds, **compare(dense.frames, made.frames)}
    paths = job.files(prompt, seed)
    record["files"] = {key: str(path) for key, path in paths.items()}
    _write(job, paths, made, dense, embedded)
    with atomic(paths["settings"]) as partial:
        partial.write_text(dump(record, indent=2) + "\n", encoding="utf-8")
    return record


def describe(job: Job, loaded: LoadedPipeline, made: Sample, prompt: str, seed: int) -> dict[str, Any]:
    """What decides a picture: the settings that travel inside its file."""
    frames, height, width = made.frames.shape[:3]
    return {
        "prompt": prompt,
        "seed": seed,
        **job.settings,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": job.info.defaults.get("fps"),
        "model": "built-in shapes-video" if job.info.built_in else job.info.source,
        "pipeline": job.info.pipeline,
        "name": job.name,
        **job.described,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _write(job: Job, paths: dict[str, Path], made: Sample, dense: Sample | None, settings: dict[str, Any]) -> None:
    rows = {f"{job.name}, {made.seconds:.1f} s": made.frames}
    results = [("", made, settings)]
    if dense:
        rows = {f"dense, {dense.seconds:.1f} s": dense.frames, **rows}
        plain = {key: value for key, value in settings.items() if key != "extend"}
        results.append(("dense ", dense, plain | {"attention": {"pattern": "dense"}}))
    for prefix, result, embedded in results:
        if f"{prefix}picture" in paths:
            media.write_picture(paths[f"{prefix}picture"], result.frames[0], embedded)
        else:
            media.write_video(paths[f"{prefix}video"], result.frames, job.info.defaults["fps"], embedded)
    media.write_sheet(paths["sheet"], rows, f"{settings['prompt']} (seed {settings['seed']})")


def unknown_words(loaded: LoadedPipeline, text: str) -> list[str]:
    """Words of a prompt that the tokenizer of the built-in model maps to its unknown token."""
    tokenizer = loaded.pipe.tokenizer
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [word for word in dict.fromkeys(words) if tokenizer.convert_tokens_to_ids(word) == tokenizer.unk_token_id]


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in ("vision-attn", "torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def dump(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinity become null."""
    import json

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(entry) for key, entry in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(entry) for entry in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent, ensure_ascii=False)
