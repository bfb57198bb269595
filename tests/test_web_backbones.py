"""The tab Backbones without a browser: what is shown of a picture, and what is refused."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("gradio")
timm = pytest.importorskip("timm")
import click  # noqa: E402
import gradio as gr  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402
from vision_attn.analysis import profile, record, saliency  # noqa: E402
from vision_attn.apps.overlay import overlay  # noqa: E402
from vision_attn.apps.web import backbones, studying  # noqa: E402
from vision_attn.apps.web.page import Settings  # noqa: E402
from vision_attn.apps.web.pattern_box import read_options  # noqa: E402
from vision_attn.images import model_input, read_image  # noqa: E402

BLUE = str(backbones.EXAMPLES / "blue-square.png")
PLAIN = dict(
    image=BLUE, model="nat_shapes", weights="trained", attention="dense", options="", method="attention", query="auto",
    layers="all", heads="mean", top=3,
)  # fmt: skip
VIT = PLAIN | dict(model="test_vit", weights="random")  # timm's own: 10 x 10 tokens, 6 layers of 2 heads
NAMES = ("before", "after", "seen", "sheet", "titles", "pair", "entropy", "table", "words")


@functools.cache
def _shown(values):
    shown = dict(zip(NAMES, backbones.answer(Settings(device="cpu"), **dict(values)), strict=True))
    return shown | {name: labels(shown[name]) for name in ("before", "after")}


def labels(widget):
    """Label -> probability, or None where it cannot be seen."""
    return {each["label"]: each["confidence"] for each in widget.value["confidences"]} if widget.visible else None


def ask(values, **other):
    return _shown(tuple({**values, **other}.items()))


def test_what_is_shown_of_a_picture():
    shown = ask(PLAIN)
    model = studying.load_model("nat_shapes", False, "cpu")
    x, seen = model_input(read_image(BLUE), model)
    with torch.no_grad(), record(model) as recording:
        probabilities = model(x)[0].softmax(0)
    assert next(iter(shown["before"])) == "blue square" and len(shown["before"]) == 3
    assert shown["before"]["blue square"] == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert shown["after"] is None
    assert shown["seen"].shape == (384, 384, 3) and (shown["seen"][::8, ::8] == seen).all()
    before, after = shown["pair"]
    drawn = recording.layers[-1].map("mean")[0].mean(0).numpy()
    assert (before == shown["seen"]).all() and (after == overlay(before, np.round(drawn.astype(float), 8))).all()
    assert shown["sheet"].std() > 20
    rows = [(f"{layer.layer} {layer.name}", head) for layer in recording.layers for head in range(layer.heads)]
    assert [tuple(row[:2]) for row in shown["table"]] == rows
    assert shown["table"][5][2] == pytest.approx(float(profile(recording.layers[2]).entropy[1]), abs=1e-3)
    assert shown["entropy"].ndim == 3 and shown["entropy"].std() > 20
    assert "Choose a pattern" in shown["words"]


def test_dense_next_to_a_pattern():
    shown = ask(VIT, attention="neighborhood", options="--window 3", query="0.5,0.5")
    model = studying.load_model("test_vit", True, "cpu")
    x, seen = model_input(read_image(BLUE), model)
    maps = []
    for pattern in (None, Neighborhood(window=3)):
        with torch.no_grad(), record(model) as recording:
            if pattern is None:
                expected = model(x)
            else:
                with attach(model, pattern):
                    sparse = model(x)
        maps.append(recording.layers[-1].map((5, 5))[0].mean(0).numpy())
    assert np.count_nonzero(maps[1]) == 9 and np.count_nonzero(maps[0]) == 100
    for picture, values in zip(shown["pair"], maps, strict=True):
        assert (picture == overlay(studying.enlarged(seen), np.round(values.astype(float), 8), (0.5, 0.5))).all()
    assert shown["titles"] == "**dense** (left) and **neighborhood** (right)"
    tops = [out[0].softmax(0).max().item() for out in (expected, sparse)]
    assert [max(shown["before"].values()), max(shown["after"].values())] == pytest.approx(tops, abs=1e-5)
    assert tops[0] != pytest.approx(tops[1], abs=1e-7)
    assert "**6 layers changed**" in shown["words"] and "9.0% of the query-key pairs" in shown["words"]
    assert "Random weights" in shown["words"] and len(shown["table"]) == 12
    again = ask(VIT)  # the model is kept: nothing may be left in it
    assert again["before"] == shown["before"] and "changed" not in again["words"]


def test_the_trained_vit_is_the_tower_of_the_language_model_and_takes_patterns():
    pytest.importorskip("transformers")
    from vision_attn.mllm.loading import load

    tower, model = load("shapes-llava").model.model.vision_tower, studying.load_model("llava_shapes", False, "cpu")
    x, seen = model_input(read_image(BLUE), model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), tower(x).pooler_output, rtol=0, atol=1e-5)
    assert seen.shape == (32, 32, 3)
    shown = ask(PLAIN, model="llava_shapes", attention="neighborhood", options="--window 3", query="0.5,0.5")
    assert shown["before"] is None and shown["after"] is None and len(shown["table"]) == 12
    assert "**3 layers changed**" in shown["words"] and "Random" not in shown["words"]
    assert (shown["pair"][0] != shown["pair"][1]).any()


@pytest.mark.parametrize("name", ["nat_shapes", "biformer_shapes", "resnet18"])
def test_what_takes_no_pattern_says_so_before_it_runs(name):
    assert backbones._note(name, "circle").startswith(f"No pattern goes into {name}") and not backbones._note(
        name, "dense"
    )


def test_what_takes_patterns_is_not_warned_of():
    for name in ("llava_shapes", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "no such model"):
        assert backbones._note(name, "circle") == ""


def test_saliency_of_any_model():
    shown = ask(PLAIN, method="gradcam", top=1)
    model = studying.load_model("nat_shapes", False, "cpu")
    x, seen = model_input(read_image(BLUE), model)
    values = np.round(saliency(model, x, "gradcam")[0].numpy().astype(float), 8)
    assert (shown["pair"][1] == overlay(studying.enlarged(seen), values)).all()
    assert shown["table"] == ask(PLAIN)["table"] and len(shown["before"]) == 1
    convolutions = ask(PLAIN, model="test_resnet", weights="random", method="normgrad")
    assert convolutions["table"] == [] and convolutions["entropy"] is None
    assert "No numbers per head" in convolutions["words"]


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(image=None), "no picture"),
        (dict(image=__file__), "test_web_backbones.py is not a picture"),
        (dict(model=""), "no model ''"),
        (dict(model="nat_shape"), "did you mean nat_shapes?"),
        (dict(model="/etc"), "no model '/etc'"),
        (dict(model="local-dir:/etc"), "no model 'local-dir:/etc'"),
        (dict(model="hf-hub:some/thing"), "no model 'hf-hub:"),
        (dict(model="vit_gigantic_patch14_224"), "1844 million parameters; this page takes up to 400"),
        (dict(model="nat_mini"), "Choose random weights"),
        (dict(attention="circle", options="--radius 2"), "choose dense"),
        (dict(attention="circle", options="--windw 2"), "circle takes --radius, --pooled"),
        (dict(attention="circle", options="-- radius"), "circle takes"),
        (dict(attention="circle", options="--radius " + "1" * 300), "allowed: 200"),
        (dict(attention="circle", options=""), "needs --radius"),
        (dict(options="--window 3"), "not to dense"),
        (dict(attention="round"), "no pattern 'round'"),
        (dict(query="2,3"), "'2,3' is neither"),
        (dict(query="class"), "no class token"),
        (dict(layers="many"), "'many' is neither"),
        (dict(layers="17"), "no layer 17"),
        (dict(heads="9"), "has no head 9"),
        (dict(method="rollout"), "rollout needs the same tokens in every layer"),
        (dict(model="test_resnet", weights="random"), "draw gradcam or normgrad"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(values, said):
    with pytest.raises((ValueError, click.UsageError)) as caught:
        ask(PLAIN, **values)
    text = caught.value.message if isinstance(caught.value, click.UsageError) else str(caught.value)
    assert said in text and len(text.splitlines()) <= 3


def test_a_folder_only_from_the_command_line(tmp_path):
    folder = str(backbones.EXAMPLES.parents[2] / "vision_attn" / "weights" / "nat_shapes")
    with pytest.raises(ValueError, match="no model"):
        ask(PLAIN, model=folder)
    own = Settings(models={"backbones": folder}, device="cpu")
    assert labels(backbones.answer(own, **PLAIN | {"model": folder})[0]) == ask(PLAIN)["before"]


def test_a_click_is_a_place():
    seen = np.zeros((100, 200, 3), np.uint8)
    assert backbones._clicked(seen, SimpleNamespace(index=(50, 75))) == "0.750,0.250"
    assert backbones._clicked(seen, SimpleNamespace(index=(200, 100))) == "1.000,1.000"


def test_options_are_those_of_the_command_line():
    assert read_options("sliding-tile", "--tile 2,3 --window 3") == {"tile": (2, 3), "window": 3}
    assert read_options("radial", "--no-sink --decay 0.5") == {"sink": False, "decay": 0.5}
    assert read_options("dense", None) == {}


def test_patterns_and_examples_of_the_tab_fit():
    from vision_attn.apps.pattern_options import build_pattern

    for name, text in backbones.PATTERNS.items():
        build_pattern(name, read_options(name, text), grid=(14, 14))
    with gr.Blocks() as page:
        backbones.build(Settings())
    event = next(fn for fn in page.fns.values() if fn.api_name == "backbones")
    assert event.concurrency_id == "heavy" and event.concurrency_limit == 1
    public = [fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"]
    assert public == ["backbones"]
