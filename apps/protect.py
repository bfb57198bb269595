"""`vision-attn protect`: pictures that a latent diffusion model edits badly."""

import json
import sys
from pathlib import Path

import click

from vision_attn.apps.option_types import FILES, Whole
from vision_attn.apps.run_options import checked_device, device_option, json_option, overwrite_option, progress_option


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=FILES)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@overwrite_option
@click.option(
    "--model",
    metavar="PATH_OR_HUB_ID",
    shell_complete=FILES,
    help="The pipeline to protect from; the built-in one unless given.",
)
@click.option("--eps", type=Whole(1, 255), default=16, show_default=True, help="Largest change, of 255.")
@click.option("--step", type=Whole(1, 255), default=2, show_default=True, help="Change per step, of 255.")
@click.option("--iterations", type=Whole(1), default=40, show_default=True, help="Steps.")
@click.option("--away", is_flag=True, help="Push the latents away from the normal distribution, not into a point.")
@device_option
@progress_option
@json_option
def protect(
    images: tuple[str, ...],
    output: Path,
    overwrite: bool,
    model: str | None,
    eps: int,
    step: int,
    iterations: int,
    away: bool,
    device: str,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Change each IMAGE a little, as PNG, so that editing it with --model goes wrong.

    It works against models with the VAE of --model, and others only so far as theirs is alike. Scaling or JPEG undo
    part of it, whoever wants to remove it can, and the change can be seen in even areas. The built-in model shows what
    happens; it protects from nothing else.

    \b
    Examples:
      vision-attn protect photo.png -o out/ --model stable-diffusion-v1-5/stable-diffusion-v1-5
      vision-attn protect scene.png -o out/ --eps 8 --json
    """
    import numpy as np

    from vision_attn.apps.files import atomic, check_new, writable_folder
    from vision_attn.diffusion import protect_image
    from vision_attn.diffusion.loading import load
    from vision_attn.images import read_image

    checked_device(device)
    paths = {name: output / f"{Path(name).stem}.protected.png" for name in images}
    if len(set(paths.values())) < len(images):
        raise click.UsageError("two images have the same name, and would be written to the same file.")
    pictures = {name: read_image(name) for name in images}
    writable_folder(output)
    check_new(paths.values(), overwrite)
    loaded = load(model, device=device, dtype="float32")
    shown = sys.stderr.isatty() if progress is None else progress
    results = []
    for name, picture in pictures.items():
        changed = protect_image(
            loaded.pipe, picture, eps=eps / 255, step=step / 255, iterations=iterations, away=away, progress=shown
        )
        from PIL import Image

        with atomic(paths[name]) as partial:
            Image.fromarray(changed).save(partial, format="PNG")
        change = np.abs(changed.astype(int) - picture)
        result = {"image": name, "file": str(paths[name]), "largest": int(change.max()), "mean": float(change.mean())}
        results.append(result)
        if not as_json:
            click.echo(f"{name}  {paths[name]}  changed by {result['mean']:.1f} of 255, at most {result['largest']}")
    if as_json:
        click.echo(json.dumps({"model": loaded.info.source if model else "built-in shapes-video", "results": results}))
