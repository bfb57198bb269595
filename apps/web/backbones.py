"""The tab *Backbones*: where a vision model looks in a picture, as it is and with a pattern attached."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from vision_attn.apps.attention import KINDS, METHODS, Chosen, Query
from vision_attn.apps.pattern_options import build_pattern
from vision_attn.apps.web.page import HEAVY, Settings, kind, picture_input, read_picture
from vision_attn.apps.web.pattern_box import pattern_box, read_options
from vision_attn.apps.web.shapes_vit import NAME as VIT
from vision_attn.apps.web.studying import (
    BUILT_IN,
    NUMBERS,
    check_name,
    entropy_picture,
    load_model,
    refused,
    study,
    table,
)

EXAMPLES = Path(__file__).parent / "examples"
TRAINED, RANDOM = "trained", "random"
# Suggestions; any name of timm can be typed.
MODELS = (
    *BUILT_IN,
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "nat_mini",
    "dinat_mini",
    "biformer_tiny",
    "ravlt_tiny",
    "swin_tiny_vsa",
    "illama_tiny",
    "resnet18",
)
PATTERNS = {
    "dense": "", "neighborhood": "--window 5", "window": "--size 7", "halo": "--block 7 --halo 1",
    "circle": "--radius 3", "sliding-tile": "--tile 2 --window 3", "streaming": "--window 32 --sink 1",
    "power-step": "--block 14 --window 28",
}  # fmt: skip
HELP = f"""A picture goes through a vision model, and the maps show where it looks, from blue (least) to red (most).
`{"`, `".join(BUILT_IN)}` are trained, ship with the package and know coloured shapes. Any other name of timm works too,
trained (a download) or with random weights. With a pattern, a ViT or Swin is run twice, dense and sparse; `{VIT}`, the
image tower of the model of *Ask*, is a ViT, but has no labels."""


def answer(
    settings: Settings,
    image: str | None,
    model: str,
    weights: str,
    attention: str,
    options: str,
    method: str,
    query: str,
    layers: str,
    heads: str,
    top: float,
) -> tuple[Any, ...]:
    """What the button shows, from the values of the widgets.

    Raises:
        ValueError, click.UsageError: something that cannot be done; nothing has run by then, but for the model itself.
    """
    from vision_attn import attach

    place = Query().convert((query or "auto").strip(), None, None)
    asked = {"method": method, "query": place, "target": None}
    asked["layers"] = Chosen("all").convert((layers or "all").strip(), None, None)
    asked["heads"] = Chosen("mean", "all").convert((heads or "mean").strip(), None, None)
    if method != "attention":
        asked["heads"] = "mean"
    chosen = read_options(attention, options)
    pattern = None if attention == "dense" else build_pattern(attention, chosen)
    picture = read_picture(image)
    own = settings.models.get("backbones")
    name = check_name(model, own)
    random = weights == RANDOM
    loaded = load_model(name, random, settings.device)
    try:
        if pattern is not None:
            with attach(loaded, pattern):
                pass
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}\nPatterns go into ViTs and Swins; with {name}, choose dense.") from error
    try:
        found = study(picture, loaded, name if name != own else Path(name).name, asked, pattern, random, int(top))
    except ValueError as error:
        hint = "" if method in KINDS else "\nFor any model: draw gradcam or normgrad."
        raise ValueError(f"{error}{hint}") from error
    before, after = found["labels"]
    words = found["report"] or "The model as it is. Choose a pattern to compare it with."
    if random:
        words += "\n\nRandom weights: how it computes is real, what it says is not."
    titles = ("dense", attention) if pattern is not None else ("what the model sees", method)
    return (
        gr.Label(before, visible=before is not None),
        gr.Label(after, visible=after is not None),
        found["seen"],
        found["sheet"],
        f"**{titles[0]}** (left) and **{titles[1]}** (right)",
        found["pair"],
        entropy_picture(found["layers"]),
        table(found["layers"]),
        words,
    )


_PLAIN = {"format": "png", "interactive": False, "show_label": False, "buttons": ["download", "fullscreen"]}


def build(settings: Settings) -> None:
    """The widgets of the tab, inside an open Blocks."""
    own = settings.models.get("backbones")
    names = list(dict.fromkeys([*([own] if own else []), *MODELS]))
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = picture_input(height=280)
            model = gr.Dropdown(
                names, value=names[0], allow_custom_value=True, label="Model", info="or type any name of timm"
            )
            weights = gr.Radio(
                [TRAINED, RANDOM], value=TRAINED, label="Weights", info="trained: downloaded, if not built in"
            )
            attention, options = pattern_box(PATTERNS)
            note = gr.Markdown()
            method = gr.Dropdown(list(METHODS), value="attention", label="What is drawn")
            query = gr.Dropdown(
                ["auto", "mean", "class", "0.5,0.5"], value="auto", allow_custom_value=True, label="Who looks",
                info="auto: the class token, else the mean; a place is down,across from 0 to 1, or click at the right",
            )  # fmt: skip
            with gr.Row():
                layers = gr.Dropdown(
                    ["all", "0", "-1"], value="all", allow_custom_value=True, label="Layers", min_width=120
                )
                heads = gr.Dropdown(
                    ["mean", "all", "0"], value="mean", allow_custom_value=True, label="Heads", min_width=120
                )
            top = gr.Slider(1, 10, 3, step=1, label="Labels")
            go = gr.Button("Look", variant="primary")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                before = gr.Label(label="It says", num_top_classes=10, min_width=140)
                after = gr.Label(label="With the pattern", num_top_classes=10, visible=False, min_width=140)
            words = gr.Markdown()
            with gr.Row():
                with gr.Column(min_width=240):
                    gr.Markdown("**What it sees**: click to look from there")
                    seen = gr.Image(label="What the model sees", **_PLAIN)
                with gr.Column(min_width=240):
                    compared = gr.Markdown("**Before and after**")
                    slider = gr.ImageSlider(label="Before and after", slider_position=50, max_height=None, **_PLAIN)
            gr.Markdown("**Maps**")
            sheet = gr.Image(label="Maps", **_PLAIN)
            with gr.Accordion("Per head", open=True):
                entropies = gr.Image(label="Entropy per head", **_PLAIN)
                numbers = gr.Dataframe(
                    headers=["layer", "head", *NUMBERS.values()], interactive=False, max_height=300, label="Numbers"
                )
    inputs = [image, model, weights, attention, options, method, query, layers, heads, top]
    outputs = [before, after, seen, sheet, compared, slider, entropies, numbers, words]
    gr.on([model.change, attention.change], _note, [model, attention], note, api_visibility="private",
          show_progress="hidden")  # fmt: skip
    look = kind(functools.partial(answer, settings))
    go.click(look, inputs, outputs, api_name="backbones", show_progress_on=[words, sheet], **HEAVY)
    seen.select(_clicked, seen, query, api_visibility="private", queue=False, show_progress="hidden").then(
        look, inputs, outputs, api_visibility="private", show_progress_on=[words, sheet], **HEAVY
    )
    pictures = [str(EXAMPLES / f"{name}.png") for name in ("blue-square", "yellow-cross", "red-circle")]
    gr.Examples(
        [
            [pictures[0], VIT, TRAINED, "neighborhood", "--window 3", "attention", "0.5,0.5", "all", "mean", 3],
            [pictures[2], VIT, TRAINED, "circle", "--radius 2", "rollout", "auto", "all", "mean", 3],
            [pictures[0], "nat_shapes", TRAINED, "dense", "", "attention", "auto", "all", "mean", 3],
            [pictures[1], "nat_shapes", TRAINED, "dense", "", "attention", "0.5,0.5", "2,3", "all", 5],
            [pictures[2], "biformer_shapes", TRAINED, "dense", "", "gradcam", "auto", "all", "mean", 5],
            [pictures[1], "vit_tiny_patch16_224", RANDOM, "window", "--size 7", "attention", "0.3,0.6", "0,5,-1",
             "mean", 3],
        ],
        inputs,
        label="Examples",
        example_labels=[
            "a trained ViT, dense against windows of 3", "a trained ViT with discs, rollout",
            "blue square: every layer of nat_shapes", "yellow cross: every head of two layers", "red circle: Grad-CAM",
            "a larger ViT, random, with windows of 7",
        ],
        cache_examples=False,
    )  # fmt: skip


def _note(model: str, attention: str) -> str:
    """What will be refused, said before the button is pressed."""
    import timm

    known = attention != "dense" and (model in BUILT_IN or timm.is_model(str(model)))
    return refused(model) if known else ""


def _clicked(seen: np.ndarray | None, event: gr.SelectData) -> str:
    """The place of a click on the picture, as text for `Query`."""
    across, down = event.index
    height, width = seen.shape[:2]
    return f"{min(down / height, 1):.3f},{min(across / width, 1):.3f}"
