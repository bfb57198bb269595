"""`vision-attn attention`: the picture and the numbers it writes, and what it refuses."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_apps_usage import assert_one_message

timm = pytest.importorskip("timm")
from vision_attn import Neighborhood  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.apps.overlay import LARGEST, overlay, panel_size, ring, sheet  # noqa: E402
from vision_attn.images import model_input, read_image  # noqa: E402

VIT = ["--model", "test_vit", "--untrained"]  # timm's own: 160 pixels, 10 x 10 tokens, 6 layers of 2 heads
NAT = ["--model", "nat_shapes", "--untrained"]  # 48 pixels, maps of 12, 6 and 3, two layers each, windows of 5


@pytest.fixture
def picture(tmp_path):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (50, 70, 3), dtype=np.uint8)).resize((280, 200)).save(
        tmp_path / "in.png"
    )
    return str(tmp_path / "in.png")


def run(argv, capsys, code=0):
    assert main(argv) == code, capsys.readouterr().err
    return capsys.readouterr().out


def test_panels_and_numbers(picture, tmp_path, capsys):
    from vision_attn.analysis import head_importance, profile, record

    out = tmp_path / "maps.png"
    argv = ["attention", picture, *VIT, "-o", str(out), "--importance", "--json"]
    printed = json.loads(run(argv, capsys))
    written = json.loads((tmp_path / "maps.json").read_text())
    assert printed.pop("files") == [str(out), str(tmp_path / "maps.json"), str(tmp_path / "maps.csv")]
    assert printed == written and written["untrained"] is True and written["label"] is None
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    x, _ = model_input(read_image(picture), model)
    with torch.no_grad(), record(model) as recording:
        model(x)
    assert [layer["name"] for layer in written["layers"]] == [each.name for each in recording.layers]
    worth = head_importance(model, x)
    for each, layer, drawn in zip(recording.layers, written["layers"], written["maps"], strict=True):
        assert layer["entropy"] == pytest.approx(profile(each).entropy.tolist())
        assert layer["importance"] == pytest.approx(worth[each.name].tolist(), abs=1e-6)
        np.testing.assert_allclose(drawn["values"], each.map("class")[0].mean(0), atol=1e-6)
    with open(tmp_path / "maps.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and float(rows[3]["distance"]) == pytest.approx(written["layers"][1]["distance"][1])
    sheet_drawn = cv2.imread(str(out))
    assert sheet_drawn.std() > 20 and sheet_drawn.shape[1] == 4 * (224 + 8) + 8  # 7 panels, 4 in a row


@pytest.mark.parametrize("heads, panels", [("mean", 2), ("all", 2 + 8), ("1,-1", 4)])
def test_a_panel_per_layer_or_head(heads, panels, picture, tmp_path, capsys):
    argv = ["attention", picture, *NAT, "-o", str(tmp_path / "x.png"), "--layers", "1,-1", "--heads", heads]
    written = json.loads(run([*argv, "--query", "0.9,0", "--json"], capsys))
    assert [layer["layer"] for layer in written["layers"]] == [1, 5] and len(written["maps"]) == panels
    first = written["maps"][0]
    assert np.shape(first["values"]) == (12, 12) and first["query"] == [10, 0]
    assert np.count_nonzero(first["values"]) == 25  # one window
    if heads == "1,-1":
        assert [each["head"] for each in written["maps"]] == [1, 1, 1, 7]


def test_methods_and_an_attached_pattern(picture, tmp_path, capsys):
    argv = ["attention", picture, *VIT, "-o", str(tmp_path / "x.png"), "--overwrite"]
    for method in ("rollout", "normgrad", "gradcam"):
        assert str(tmp_path / "x.png") in run([*argv, "--method", method], capsys)
        written = json.loads((tmp_path / "x.json").read_text())
        assert [np.shape(each["values"]) for each in written["maps"]] == [(10, 10)]
        assert bool(written["layers"]) == (method == "rollout")
    near = ["--attention", "neighborhood", "--window", "3", "--query", "0.55,0.55", "--layers", "2", "--json"]
    written = json.loads(run([*argv, *near], capsys))
    seen = np.array(written["maps"][0]["values"]) > 0
    np.testing.assert_array_equal(seen.flatten(), Neighborhood(3).mask((10, 10))[55].numpy())
    assert written["pattern"]["pattern"] == "neighborhood" and written["layers"][0]["visible"] == pytest.approx(10)


def test_text_and_progress(picture, tmp_path, capsys):
    argv = ["attention", picture, *VIT, "-o", str(tmp_path / "x.png"), "--progress", "--layers", "0", "--importance"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "falls most: blocks.0.attn head" in out
    assert "blocks.0.attn" in out and "x.png, x.json, x.csv" in out and "layer" in err


USAGE = {
    "output": (["-o", "{out}/x.jpg"], 2, ["'x.jpg'", ".png"]),
    "query": (["--query", "3,4"], 2, ["'3,4'", "0.5,0.3"]),
    "layers": (["--layers", "first"], 2, ["'first'", "all", "0,3,-1"]),
    "no such layer": (["--layers", "6"], 2, ["no layer 6", "there are 6, 0 to 5"]),
    "no such head": (["--heads", "2"], 2, ["no head 2", "it has 2"]),
    "method": (["--method", "cam"], 2, ["'cam'", "gradcam"]),
    "heads of rollout": (["--method", "rollout", "--heads", "all"], 2, ["--heads", "rollout"]),
    "query of gradcam": (["--method", "gradcam", "--query", "mean"], 2, ["--query", "gradcam"]),
    "target": (["--target", "3"], 2, ["--target belongs to"]),
    "class too large": (["--method", "gradcam", "--target", "5000"], 1, ["[5000]", "0 to 999"]),
    "option without pattern": (["--window", "3"], 2, ["--window belongs to neighborhood"]),
    "pattern too large": (["--attention", "window", "--size", "40,40"], 1, ["40"]),
    "model": (["--model", "test_vitt"], 1, ["no model 'test_vitt'", "test_vit"]),
    "no attention": (["--model", "resnet18"], 1, ["ran no softmax attention"]),
    "no class token": (["--model", "nat_shapes", "--query", "class"], 1, ["no class token", "'mean'"]),
    "maps that shrink": (["--model", "nat_shapes", "--method", "rollout"], 1, ["same tokens in every layer"]),
    "device": (["--device", "tpu"], 2, ["--device: got 'tpu'"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_is_refused(case, picture, tmp_path, capsys):
    extra, code, parts = USAGE[case]
    out = tmp_path / "out"
    argv = ["attention", picture, *VIT, "-o", f"{out}/x.png", *[part.format(out=out) for part in extra]]
    assert_one_message(main(argv), capsys, code, parts)
    assert not out.exists()


def test_pictures_that_are_none_and_results_that_are_there(tmp_path, picture, capsys):
    (tmp_path / "text.png").write_text("hello")
    for name, parts in (("text.png", ["is not a picture"]), ("none.png", ["No such file"])):
        argv = ["attention", str(tmp_path / name), *VIT, "-o", str(tmp_path / "x.png")]
        assert_one_message(main(argv), capsys, 1, parts)
    (tmp_path / "x.csv").write_text("precious")
    argv = ["attention", picture, *VIT, "-o", str(tmp_path / "x.png")]
    assert_one_message(main(argv), capsys, 1, ["x.csv already there", "--overwrite"])
    assert (tmp_path / "x.csv").read_text() == "precious" and not (tmp_path / "x.png").exists()


def test_overlay_shows_the_map_and_the_picture():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = 255
    values = np.zeros((2, 3))
    values[0, 0] = 5
    drawn = overlay(picture, values).astype(int)
    assert drawn.shape == picture.shape
    hot, cold = drawn[:20, :20], drawn[20:, :20]
    assert (hot == hot[0, 0]).all() and (cold == cold[0, 0]).all()
    assert hot[0, 0, 0] > hot[0, 0, 2]  # red
    assert (drawn[30, 50] > cold[0, 0] + 50).all()  # the picture shines through
    assert overlay(picture, np.full((2, 3), 7.0)).shape == picture.shape  # a flat map
    marked = ring(picture, (1.0, 0.0))
    assert (marked != picture).any() and (picture[:, 30:] == 255).all()


def test_sheets_stay_small_enough_and_take_any_text():
    height, width = panel_size(300, 200, 600, 24)
    panels = [(["layer ü " + "x" * 80, ""], np.full((height, width, 3), 90, np.uint8))] * 600
    drawn = sheet(panels, 24, ["a title " * 200])
    assert max(drawn.shape) <= LARGEST + 500 and height > width
    assert panel_size(100, 100, 2, 2) == (224, 224)
    one = sheet([(["a"], np.full((8, 8, 3), 90, np.uint8))], 4, ["t"])
    assert (one == 90).all(-1).sum() >= 64
