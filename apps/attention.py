"""`vision-attn attention`: where a vision model looks, drawn over a picture, with the numbers beside it."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import click

from vision_attn.apps.files import atomic, check_ending, check_new, could_hold, read_still
from vision_attn.apps.option_types import PICTURES, Choice, Whole
from vision_attn.apps.pattern_options import PatternName, build_pattern, check_options, pattern_options
from vision_attn.apps.run_options import checked_device, device_option, json_option, overwrite_option, progress_option

KINDS = ("normgrad", "normgrad-scaling", "normgrad-positive", "normgrad-bias", "gradcam")
METHODS = ("attention", "rollout", *KINDS)
NUMBERS = ("entropy", "bound", "share", "effective_keys", "distance", "off_grid", "sink", "sink_key")


class Chosen(click.ParamType):
    """`all`, `mean` where that is allowed, or numbers separated by commas, from 0 or from the end."""

    def __init__(self, *words: str) -> None:
        self.words, self.name = words, "|".join((*words, "n,n"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words:
            return value
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is neither {' nor '.join(self.words)} nor numbers such as 0,3,-1.", param, ctx)


class Query(click.ParamType):
    """`auto`, `mean`, `class`, or a place: down,across from 0 to 1."""

    name = "auto|mean|class|y,x"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("auto", "mean", "class") or isinstance(value, tuple):
            return value
        try:
            y, x = (float(part) for part in value.split(","))
        except ValueError:
            y = x = -1.0
        if not (0 <= y <= 1 and 0 <= x <= 1):
            self.fail(
                f"{value!r} is neither mean nor class nor a place such as 0.5,0.3 (down,across, 0 to 1).", param, ctx
            )
        return y, x


@click.command()
@click.argument("image", metavar="IMAGE", shell_complete=PICTURES)
@click.option("--model", default="nat_shapes", show_default=True, metavar="NAME_OR_FOLDER", help="A timm model.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The picture, .png.")
@click.option("--layers", type=Chosen("all"), default="all", show_default=True, help="Attention layers, from 0.")
@click.option("--heads", type=Chosen("mean", "all"), default="mean", show_default=True, help="A panel for each head.")
@click.option("--query", type=Query(), default="auto", show_default=True, help="Who looks: a place is y,x from 0 to 1.")
@click.option("--method", type=Choice(METHODS), default="attention", show_default=True, help="What is drawn.")
@click.option("--target", type=Whole(0), help="Class that normgrad and gradcam explain; else the model's own.")
@click.option("--importance", is_flag=True, help="Also what each head is worth: one more run of the model per head.")
@click.option("--untrained", is_flag=True, help="Random weights: no download.")
@click.option("--attention", type=PatternName(), help="Attach a pattern first; its options follow.")
@device_option
@progress_option
@overwrite_option
@json_option
@pattern_options
def attention(
    image: str,
    model: str,
    output: Path,
    layers: str | list[int],
    heads: str | list[int],
    query: Any,
    method: str,
    target: int | None,
    importance: bool,
    untrained: bool,
    attention: str | None,
    device: str,
    progress: bool | None,
    overwrite: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Draw where MODEL looks in IMAGE: one panel per layer, or per head; the numbers go into .json and .csv beside it.

    IMAGE is a file, or example:0, example:1, ... for pictures that the built-in models know.
    Each panel goes from its least (blue) to its greatest weight (red). The query is the class token where there is one,
    else the mean of all queries. rollout follows attention through all layers; normgrad and gradcam show what the
    chosen class depends on.

    \b
    Examples:
      vision-attn attention example:1 -o maps.png
      vision-attn attention photo.jpg --model vit_small_patch16_224 -o maps.png --layers -1 --heads all
      vision-attn attention photo.jpg --model vit_small_patch16_224 -o maps.png --query 0.5,0.3
      vision-attn attention photo.jpg --model vit_small_patch16_224 -o rollout.png --method rollout
      vision-attn attention photo.jpg --model deit_tiny_patch16_224 -o near.png --attention neighborhood --window 7
    """
    check_ending(output, ".png")
    if method != "attention" and (heads != "mean" or importance):
        raise click.UsageError(f"--heads and --importance belong to --method attention, not to {method}.")
    if method in KINDS and (query != "auto" or layers != "all"):
        raise click.UsageError(f"--query and --layers have no meaning for {method}.")
    if target is not None and method not in KINDS:
        raise click.UsageError("--target belongs to --method normgrad and gradcam.")
    check_options(attention or "dense", options)
    pattern = build_pattern(attention, options) if attention else None
    numbers = output.with_suffix(".json"), output.with_suffix(".csv")
    check_new([output, *numbers], overwrite)
    picture = read_still(image, largest=2048)
    place = checked_device(device)
    could_hold(output.parent)
    from vision_attn.apps.looking import load, look

    shown = sys.stderr.isatty() if progress is None else progress
    asked = {"method": method, "query": query, "layers": layers, "heads": heads, "target": target}
    result, drawn = look(picture, load(model, place, untrained), model, asked, pattern, untrained, importance, shown)
    result = {"image": image, "model": model, "untrained": untrained, **result}
    _write(output, drawn, result, *numbers)
    if as_json:
        click.echo(json.dumps({**result, "files": [str(output), *map(str, numbers)]}))
    else:
        click.echo("\n".join([*_table(result), f"{output}, {numbers[0].name}, {numbers[1].name}"]))


def _write(output: Path, drawn: Any, result: dict[str, Any], numbers: Path, table: Path) -> None:
    import cv2

    with atomic(numbers) as partial:
        partial.write_text(json.dumps(result) + "\n")
    with atomic(table) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        extra = ["importance"] if any("importance" in layer for layer in result["layers"]) else []
        writer.writerow(["layer", "name", "head", "visible", *NUMBERS, *extra])
        for layer in result["layers"]:
            for head in range(len(layer["entropy"])):
                values = ["" if layer[name] is None else layer[name][head] for name in (*NUMBERS, *extra)]
                writer.writerow([layer["layer"], layer["name"], head, layer["visible"], *values])
    with atomic(output) as partial:
        partial.write_bytes(cv2.imencode(".png", drawn[..., ::-1])[1].tobytes())


def _table(result: dict[str, Any]) -> list[str]:
    """One line per layer, averaged over heads."""
    lines = []
    if result["label"]:
        lines.append(f"{result['label']} {result['probability']:.1%}" + (", random weights" * result["untrained"]))
    if result["layers"]:
        lines.append(f"{'layer':<32} heads  entropy  of largest  distance  off grid")
    for layer in result["layers"]:
        mean = {n: sum(layer[n]) / len(layer[n]) if layer[n] else float("nan") for n in NUMBERS}
        far = f"{mean['distance']:8.2f}" if layer["distance"] else "       -"
        lines.append(
            f"{layer['layer']:>3} {layer['name']:<28} {len(layer['entropy']):>5}  {mean['entropy']:>7.2f}  "
            f"{mean['share']:>10.0%}  {far}  {mean['off_grid']:>8.0%}"
        )
    worth = [
        (value, f"{layer['name']} head {head}")
        for layer in result["layers"]
        for head, value in enumerate(layer.get("importance", ()))
    ]
    if worth:
        best = ", ".join(f"{name} {value:+.2%}" for value, name in sorted(worth, reverse=True)[:3])
        lines.append(f"without it the probability of the class falls most: {best}")
    return lines
