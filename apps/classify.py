"""`vision-attn classify`: what is in pictures, or which caption fits them."""

import json
from pathlib import Path

import click

from vision_attn.apps.option_types import PICTURES, Whole, offer
from vision_attn.apps.run_options import checked_device, device_option, json_option

CLIP = "clip_shapes"


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE...", shell_complete=PICTURES)
@click.option(
    "--model",
    metavar="NAME_OR_FOLDER",
    shell_complete=offer("nat_shapes", "biformer_shapes", CLIP, file=True),
    help="nat_shapes (the default), biformer_shapes, clip_shapes, a folder of timm or open_clip, or any name of timm.",
)
@click.option("--caption", "captions", multiple=True, metavar="TEXT", help="Choose among these; give at least two.")
@click.option("--top", type=Whole(1), default=3, show_default=True, help="How many labels to show.")
@device_option
@json_option
def classify(
    images: tuple[str, ...], model: str | None, captions: tuple[str, ...], top: int, device: str, as_json: bool
) -> None:
    """Name the largest thing in each IMAGE, or with --caption the text that fits it best.

    The models that ship know the shapes world: circle, square, triangle, cross in red, green, blue, yellow, white.
    IMAGE is a file, or example:0, example:1, ... for a picture of that world.

    \b
    Examples:
      vision-attn classify example:0 example:1
      vision-attn classify *.png --model biformer_shapes --json
      vision-attn classify scene.png --caption "a red circle and a blue cross" --caption "two dogs"
      vision-attn classify photo.jpg --model resnet50.a1_in1k
    """
    if not images:
        raise click.UsageError("no image; give at least one file, or example:0.")
    if len(captions) == 1 or "" in (text.strip() for text in captions):
        raise click.UsageError("--caption: give two or more texts to choose from, none of them empty.")
    name = model or (CLIP if captions else "nat_shapes")
    clip = name == CLIP or (Path(name).expanduser() / "open_clip_config.json").exists()
    if captions and not clip:
        raise click.UsageError(f"--caption needs a CLIP model, and {name} is none; leave --model out, or give {CLIP}.")

    from vision_attn.apps.files import read_still

    place = checked_device(device)
    pictures, failed = {}, []
    for path in images:
        try:
            pictures[path] = read_still(path, largest=1024)
        except (ValueError, OSError) as error:
            failed.append(f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error))
    if pictures:
        guesses = _guess(list(pictures.values()), name, clip, captions, top, place)
        if as_json:
            results = [
                {"image": path, "labels": [guess._asdict() for guess in found]}
                for path, found in zip(pictures, guesses, strict=True)
            ]
            click.echo(json.dumps({"model": name, "results": results}))
        else:
            for path, found in zip(pictures, guesses, strict=True):
                click.echo(f"{path}  " + ", ".join(f"{label} {share:.1%}" for label, share in found))
    if failed:
        more = f"\n{len(failed)} of {len(images)} images could not be read" if len(images) > 1 else ""
        raise ValueError("\n".join(failed) + more)


def _guess(pictures: list, name: str, clip: bool, captions: tuple[str, ...], top: int, place) -> list:
    from vision_attn import classify as names

    if clip:
        from vision_attn.clip import WEIGHTS, load_clip
        from vision_attn.shapes.stills import LABELS

        loaded = load_clip(WEIGHTS if name == CLIP else Path(name).expanduser(), device=str(place))
        return names.choose_caption(pictures, captions or [f"a {label}" for label in LABELS], loaded, top)
    return names.classify(pictures, names.load_classifier(name, place), top)
