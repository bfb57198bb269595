"""`vision-attn classify`: pictures as users have them, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image
from test_apps_usage import assert_one_message

from vision_attn.apps.cli import main
from vision_attn.clip import WEIGHTS
from vision_attn.shapes import render, sample_scene
from vision_attn.shapes.stills import LABELS, label_of, sample_still


def picture(shape, color, side=48):
    things = [{"shape": shape, "color": color, "size": "big"}]
    scene = sample_scene(np.random.default_rng(0), things, frames=1, height=side, width=side)
    return Image.fromarray(np.rint(render(scene)[0] * 255).astype(np.uint8))


@pytest.fixture
def images(tmp_path):
    picture("cross", "blue").save(tmp_path / "blue.png")
    picture("triangle", "green", 200).save(tmp_path / "green.jpg", quality=90)
    picture("circle", "white", 96).convert("L").save(tmp_path / "grey.png")
    picture("square", "red", 96).convert("RGBA").save(tmp_path / "alpha.webp")
    return tmp_path


def test_names_what_is_in_every_picture(images, capsys):
    files = {
        "blue.png": "blue cross",
        "green.jpg": "green triangle",
        "grey.png": "white circle",
        "alpha.webp": "red square",
    }
    assert main(["classify", *(str(images / name) for name in files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, label) in zip(lines, files.items(), strict=True):
        assert line.startswith(f"{images / name}  {label} ") and line.count("%") == 3


def test_examples_are_pictures_that_the_models_know(capsys, tmp_path):
    assert main(["classify", "example:1", "example:2", "example:7"]) == 0
    for number, line in zip((1, 2, 7), capsys.readouterr().out.splitlines(), strict=True):
        scene = sample_still(np.random.default_rng((9, number)), height=96, width=96)
        assert line.startswith(f"example:{number}  {LABELS[label_of(scene)]} ")
    assert main(["attention", "example:1", "-o", str(tmp_path / "maps.png")]) == 0
    assert json.loads((tmp_path / "maps.json").read_text())["label"] == "white square"


@pytest.mark.parametrize("model", ["biformer_shapes", "clip_shapes", str(WEIGHTS.parent / "nat_shapes"), str(WEIGHTS)])
def test_any_model_that_ships_by_name_or_folder(model, images, capsys):
    assert main(["classify", str(images / "blue.png"), "--model", model, "--json", "--top", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == model
    (row,) = result["results"]
    best, second = row["labels"]
    assert best["label"].removeprefix("a ") == "blue cross"
    assert 1 >= best["probability"] >= second["probability"] > 0


def test_chooses_among_captions(images, capsys):
    texts = ["a blue circle", "a blue cross", "a red cross"]
    argv = ["classify", str(images / "blue.png"), *(part for text in texts for part in ("--caption", text))]
    assert main([*argv, "--json"]) == 0
    labels = json.loads(capsys.readouterr().out)["results"][0]["labels"]
    assert labels[0]["label"] == "a blue cross" and {entry["label"] for entry in labels} == set(texts)
    assert sum(entry["probability"] for entry in labels) == pytest.approx(1, abs=1e-4)


def test_a_broken_picture_does_not_hide_the_others(images, capsys):
    (images / "broken.png").write_bytes((images / "blue.png").read_bytes()[:60])
    files = [str(images / name) for name in ("broken.png", "blue.png", "none.png")]
    assert main(["classify", *files]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "blue cross" in out
    assert all(part in err for part in ("broken.png is", "none.png: No such file", "2 of 3 images could not be read"))
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv, code, parts",
    [
        ([], 2, ["no image"]),
        (["{blue}", "--top", "0"], 2, ["--top"]),
        (["{blue}", "--caption", "a red circle"], 2, ["two or more texts"]),
        (["{blue}", "--caption", "a", "--caption", " "], 2, ["none of them empty"]),
        (["{blue}", "--caption", "a", "--caption", "b", "--model", "nat_shapes"], 2, ["--caption needs a CLIP model"]),
        (["{blue}", "--device", "tpu"], 2, ["--device: got 'tpu'", "auto, cpu, cuda"]),
        (["{blue}", "--model", "nat_shapez"], 1, ["no model 'nat_shapez'", "nat_"]),
        (["{folder}"], 1, ["is a folder"]),
        (["{folder}/text.png"], 1, ["text.png is not a picture"]),
    ],
)
def test_what_it_refuses(argv, code, parts, images, capsys):
    (images / "text.png").write_text("no picture")
    got = main(["classify", *(entry.format(blue=images / "blue.png", folder=images) for entry in argv)])
    assert_one_message(got, capsys, code, parts)
