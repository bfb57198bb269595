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
from vision_attn.diffusion.loading import LoadedPipeline, ModelInfo, SizeError, inspect_model


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything but the prompts. `settings` holds frames, height, width, steps, guidance, max_sequence_length and
    negative; None is left to the pipeline."""

    info: ModelInfo
    settings: dict[str, Any]
    attachment: Attachment | None
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
    model: str | None,
    attention: str,
    options: dict[str, Any],
    typed: dict[str, Any],
    *,
    dense_steps: int | None,
    dense_layers: int | None,
    with_dense: bool,
    output: Path,
) -> Job:
    """Check sizes, pattern and schedule against the JSON files of the model.

    Args:
        typed: frames, height, width, steps, guidance, negative as typed, None where the model decides.

    Raises:
        LoadError: the model cannot be used.
        click.UsageError: a size the model cannot draw, a pattern that does not fit its grid, no sparse step left.
    """
    info = inspect_model(model)
    defaults = {
        key: info.defaults.get(key) for key in ("frames", "height", "width", "steps", "guidance", "max_sequence_length")
    }
    settings = {**defaults, **{key: value for key, value in typed.items() if value is not None or key not in defaults}}
    try:
        grid = info.grid(settings["frames"], settings["height"], settings["width"])
    except SizeError as error:
        raise click.UsageError(f"--{error}") from error
    suggested = dict((info.defaults.get("attention") or {}).get(attention) or {})
    schedule = {"dense_steps": dense_steps, "dense_layers": dense_layers}
    schedule = {key: suggested.pop(key, 0) if value is None else value for key, value in schedule.items()}
    pattern = build_pattern(attention, options, grid, _cut(suggested, grid))
    if attention == "dense":
        return Job(info, settings, None, with_dense, output)
    if settings["steps"] is not None and schedule["dense_steps"] >= settings["steps"]:
        raise click.UsageError(
            f"--dense-steps {schedule['dense_steps']} of {settings['steps']} steps leaves none for {attention}; "
            "use fewer, or --attention dense"
        )
    return Job(info, settings, Attachment(pattern, **schedule), with_dense, output)


def _cut(suggested: dict[str, Any], grid: tuple[int, ...] | None) -> dict[str, Any]:
    """Suggested windows and tiles, no longer than a smaller grid: nobody typed them, so they cannot be wrong."""
    fits = {k: grid and isinstance(v, list) and len(v) == len(grid) for k, v in suggested.items()}
    return {k: [min(pair) for pair in zip(v, grid, strict=True)] if fits[k] else v for k, v in suggested.items()}


def prepare(job: Job, loaded: LoadedPipeline, prompt: str, bar: str) -> dict[str, Any]:
    """Check what only the loaded model can tell, warm up where times count, and return the arguments of its call."""
    try:
        arguments = call_arguments(loaded.pipe, job.settings)
        if job.attachment:
            from vision_attn import attach

            attach(loaded.pipe, job.attachment.pattern, **job.attachment.schedule).detach()
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
    frames, height, width = made.frames.shape[:3]
    pattern = job.attachment.pattern.to_dict() if job.attachment else {"pattern": "dense"}
    schedule = job.attachment.schedule if job.attachment else {}
    record = {
        "prompt": prompt,
        "seed": seed,
        **job.settings,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": job.info.defaults.get("fps"),
        "model": "built-in shapes-video" if job.info.built_in else job.info.source,
        "pipeline": job.info.pipeline,
        "attention": {**pattern, **schedule},
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    embedded = dict(record)
    record["seconds"] = made.seconds
    record["warmed_up"] = job.compare
    record["report"] = made.report
    if dense:
        record["dense_seconds"] = dense.seconds
        record["comparison"] = {"speedup": dense.seconds / made.seconds, **compare(dense.frames, made.frames)}
    paths = job.files(prompt, seed)
    record["files"] = {key: str(path) for key, path in paths.items()}
    _write(job, paths, made, dense, embedded, pattern["pattern"])
    with atomic(paths["settings"]) as partial:
        partial.write_text(dump(record, indent=2) + "\n", encoding="utf-8")
    return record


def _write(
    job: Job, paths: dict[str, Path], made: Sample, dense: Sample | None, settings: dict[str, Any], attention: str
) -> None:
    rows = {f"{attention}, {made.seconds:.1f} s": made.frames}
    results = [("", made, settings)]
    if dense:
        rows = {f"dense, {dense.seconds:.1f} s": dense.frames, **rows}
        results.append(("dense ", dense, settings | {"attention": {"pattern": "dense"}}))
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
