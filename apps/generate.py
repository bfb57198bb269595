"""`vision-attn generate`: videos and images from prompts, with sparse attention."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vision_attn.apps.option_types import FILES, Choice, Whole
from vision_attn.apps.pattern_options import PatternName, check_options, pattern_options
from vision_attn.apps.run_options import checked_device, overwrite_option, pipeline_option, prompts_option, run_options

if TYPE_CHECKING:
    from vision_attn.apps.job import Job
    from vision_attn.diffusion.loading import ModelInfo

SEEDS = 2**32 - 1
# Spelled out so that --help need not import torch; none is the untouched model.
EXTENDERS = ("ultravico", "riflex", "pi", "ntk", "yarn", "tasr", "none")


@click.command()
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@prompts_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@overwrite_option
@pipeline_option
@click.option(
    "--attention",
    type=PatternName(),
    default="dense",
    show_default=True,
    metavar="NAME",
    help="Who sees whom; names above.",
)
@click.option(
    "--preset",
    metavar="NAME_OR_FILE",
    shell_complete=FILES,
    help="Attention by a name of `vision-attn presets`, or from a file.",
)
@click.option(
    "--lora",
    metavar="PATH",
    shell_complete=FILES,
    help="A LoRA of that model: a safetensors file, or a folder with one.",
)
@click.option("--dense-steps", type=Whole(0), help="First steps that stay dense.")
@click.option("--dense-layers", type=Whole(0), help="First layers that stay dense.")
@click.option("--compare", is_flag=True, help="Also draw with dense attention and the same noise, and compare.")
@click.option("--frames", type=int, help="Frames of a video, 4n+1 for most models; 1 draws an image.")
@click.option("--times", type=float, help="Length of the video, in times the length of the model's own.")
@click.option("--extend", type=Choice(EXTENDERS), help="How --times is reached; ultravico unless given.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--steps", type=Whole(1, 1000), help="Denoising steps.")
@click.option("--guidance", type=float, help="Strength of the prompt.")
@click.option("--negative", metavar="TEXT", help="What to keep out.")
@click.option(
    "--seed",
    type=Whole(0, SEEDS),
    default=0,
    show_default=True,
    help="Of the first prompt; the next ones count up.",
)
@run_options
@pattern_options
def generate(
    prompts: tuple[str, ...],
    prompts_file: str | None,
    output: Path,
    overwrite: bool,
    model: str | None,
    attention: str,
    preset: str | None,
    lora: str | None,
    dense_steps: int | None,
    dense_layers: int | None,
    compare: bool,
    times: float | None,
    extend: str | None,
    seed: int,
    device: str,
    dtype: str,
    progress: bool | None,
    as_json: bool,
    options: dict[str, Any],
    **typed: Any,
) -> None:
    """Draw PROMPTs: for each an mp4 (PNG for one frame), a contact sheet, and a JSON file with every setting.

    Sizes, steps and guidance come from the model unless given. --attention is dense, neighborhood, window,
    sliding-tile, halo, circle, radial, length-decay, power-step or streaming; the help of an option starts with the
    names it belongs to.

    \b
    Examples:
      vision-attn generate "a red circle moves right" -o out/
      vision-attn generate "a blue square moves up" -o out/ --attention radial --compare
      vision-attn generate --prompts prompts.txt -o out/ --attention neighborhood --window 3,5,5 --dense-steps 2
      vision-attn generate "a cat on a skateboard" -o out/ --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
          --attention radial --dense-steps 12 --dense-layers 1 --device cuda
      vision-attn generate "a red circle moves right" -o out/ --times 4 --extend riflex --attention radial
      vision-attn generate "a red circle moves right" -o out/ --preset calibrated.json
      vision-attn generate "a red circle moves up" -o out/ --frames 33 --preset runs/long/preset.json --lora runs/long
    """
    texts = read_prompts(prompts, prompts_file)
    if seed + len(texts) - 1 > SEEDS:
        raise click.UsageError(f"--seed {seed} and {len(texts)} prompts count past {SEEDS}, the largest seed.")
    from vision_attn.apps import job as jobs
    from vision_attn.apps.files import check_new, writable_folder
    from vision_attn.diffusion.loading import load

    job = plan(model, attention, preset, options, dense_steps, dense_layers, compare, times, extend, typed, output)
    number = None if dtype == "auto" else dtype
    checked_device(device, dtype)
    need("av", "PIL", *(["skimage"] if compare else []))
    writable_folder(output)
    check_new((path for at, text in enumerate(texts) for path in job.files(text, seed + at).values()), overwrite)

    if lora is not None:
        from vision_attn.diffusion.lora import load_lora, lora_file

        lora_file(lora)  # said before a large model is loaded
    shown = sys.stderr.isatty() if progress is None else progress
    _loading_bars(shown)
    loaded = load(model, device=device, dtype=number)
    if lora is not None:
        load_lora(loaded.pipe, lora)
        job.described["lora"] = lora
    if job.info.built_in:
        _warn_of_words(loaded, [*texts, typed["negative"] or ""])
    records: list[dict[str, Any]] = []
    try:
        arguments = jobs.prepare(job, loaded, texts[0], "warm-up" if shown else "")
        for at, text in enumerate(texts):
            bar = f"{at + 1} of {len(texts)}" if shown else ""
            records.append(jobs.run(job, loaded, arguments, text, seed + at, bar))
            if not as_json:
                click.echo(describe(records[-1]))
    except KeyboardInterrupt:
        done = f"{len(records)} of {len(texts)} prompts are done"
        raise KeyboardInterrupt(f"{done}; nothing was left half-written in {output}.") from None
    if as_json:
        click.echo(jobs.dump({"results": records}))


def plan(
    model: "str | ModelInfo | None",
    attention: str,
    preset: str | None,
    options: dict[str, Any],
    dense_steps: int | None,
    dense_layers: int | None,
    compare: bool,
    times: float | None,
    extend: str | None,
    typed: dict[str, Any],
    output: Path,
) -> "Job":
    """What the options ask for, as a job; raises click.UsageError for those that do not go together, or not with the
    model."""
    guidance = typed["guidance"]
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise click.UsageError(f"--guidance: got {guidance}; give a number of at least 0, usually 1 to 10.")
    options = dict(options)
    train_frames = options.pop("train_frames", None) if times is not None and attention != "length-decay" else None
    check_options(attention, options)
    extend = _extend(times, extend, typed["frames"], preset or ("" if attention == "dense" else attention))
    if preset is not None and (attention != "dense" or options):
        raise click.UsageError("--preset brings its own attention; leave --attention and its options out.")
    if attention == "dense" and preset is None:
        for name, value in (("--dense-steps", dense_steps), ("--dense-layers", dense_layers)):
            if value is not None:
                raise click.UsageError(f"{name} needs a sparse attention; add for example --attention radial.")
        if compare and extend == "none":
            raise click.UsageError("--compare needs a sparse attention; add for example --attention radial.")

    from vision_attn.apps import job as jobs

    return jobs.plan(
        model,
        attention,
        options,
        typed,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        with_dense=compare,
        output=output,
        preset=preset,
        times=times,
        extend=extend,
        train_frames=train_frames,
    )


def _extend(times: float | None, extend: str | None, frames: int | None, attention: str) -> str:
    """How a longer video is drawn; raises click.UsageError for options that do not go together."""
    if times is None:
        if extend is not None:
            raise click.UsageError("--extend goes with --times, for example --times 4.")
        return "none"
    if frames is not None:
        raise click.UsageError("--times and --frames both say how long the video is; give one.")
    extend = extend or "ultravico"
    if extend == "ultravico" and attention:
        others = ", ".join(EXTENDERS[1:-1])
        raise click.UsageError(
            f"--extend ultravico changes the same attention as {attention}; add --extend with one of {others} or none."
        )
    return extend


def need(*modules: str) -> None:
    """Raise ImportError now, rather than after minutes of work, when a package that will be used is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; run: pip install 'vision-attn[apps]'")


def read_prompts(typed: tuple[str, ...], file: str | None) -> list[str]:
    """Prompts of the command line, then those of the file; raises click.UsageError for none and for empty ones."""
    prompts = [text.strip() for text in typed]
    if "" in prompts:
        raise click.UsageError(f"prompt {prompts.index('') + 1} is empty; describe what to draw.")
    if file is not None:
        where = "stdin" if file == "-" else file
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
        except OSError as error:
            raise click.UsageError(
                f"--prompts {where}: {error.strerror}; give a text file with one prompt per line."
            ) from error
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"--prompts {where}: not UTF-8 text (byte {error.start}); save it as UTF-8."
            ) from error
        if not any(lines):
            raise click.UsageError(f"--prompts {where}: empty; give one prompt per line.")
        prompts += [line for line in lines if line]
    if not prompts:
        raise click.UsageError('no prompt; give one in quotes, such as "a red circle moves right", or --prompts FILE.')
    return prompts


def describe(record: dict[str, Any]) -> str:
    """The lines printed for one result."""
    name = record["name"]
    lines = [f"{record['prompt']} (seed {record['seed']}, {record['frames']} x {record['height']} x {record['width']})"]
    lines += [f"  {kind:<13} {path}" for kind, path in record["files"].items()]
    for kind, called in (("attention", "pattern"), ("extend", "name")):
        chosen = {key: value for key, value in record.get(kind, {}).items() if value is not None and key != "settings"}
        if chosen:
            shown = " ".join([chosen.pop(called), *(f"{key}={value}" for key, value in chosen.items())])
            lines.append(f"  {kind:<13} {shown}")
    reports = [record[key] for key in ("report", "extend_report") if record.get(key)]
    kept = [d["kept"] for report in reports for d in report["denoisers"] if d.get("kept") is not None]
    density = f", {max(kept):.1%} of the query-key pairs computed" if kept else ""
    lines.append(f"  {name:<13} {record['seconds']:.2f} s{density}")
    lines += [f"  {'warning':<13} {text}" for report in reports for text in report.get("warnings", ())]
    if "comparison" in record:
        result = record["comparison"]
        lines.append(f"  {'dense':<13} {record['dense_seconds']:.2f} s, speed-up by {name} {result['speedup']:.2f}x")
        psnr = "identical" if result["psnr"] is None else f"PSNR {result['psnr']:.1f} dB"
        lines.append(f"  {'difference':<13} {psnr}, SSIM {result['ssim']:.3f}")
    return "\n".join(lines)


def _warn_of_words(loaded: Any, texts: list[str]) -> None:
    from vision_attn.apps.job import unknown_words

    unknown = list(dict.fromkeys(word for text in texts for word in unknown_words(loaded, text)))
    if unknown:
        vocabulary = loaded.pipe.tokenizer.get_vocab()
        known = ", ".join(sorted(word for word in vocabulary if not word.startswith("<")))
        click.echo(f"Warning: the built-in model does not know {', '.join(unknown)}. It knows: {known}.", err=True)
    limit = loaded.defaults["max_sequence_length"]
    for text in texts:
        if len(loaded.pipe.tokenizer(text).input_ids) > limit:
            click.echo(f"Warning: the built-in model reads {limit} tokens, fewer than there are in {text!r}.", err=True)


def _loading_bars(shown: bool) -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()  # it would be a bar within the bar of diffusers
    if not shown:
        diffusers.utils.logging.disable_progress_bar()
