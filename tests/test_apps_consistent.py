"""`vision-attn consistent` and `vision-attn protect`: files that are written, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from test_apps_usage import assert_one_message

pytest.importorskip("diffusers")

from vision_attn.apps.cli import main  # noqa: E402

PROMPTS = ["a red circle and a blue square", "a red circle and a white cross"]
DRAW = ["consistent", *PROMPTS, "--subject", "red circle", "--subject", "blue square=a big blue square"]
SMALL = ["--frames", "1", "--steps", "2"]


def test_pictures_references_sheet_and_settings(tmp_path, capsys):
    argv = [*DRAW, "-o", str(tmp_path), *SMALL, "--seed", "3"]
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    names = ["reference-red-circle-3", "reference-blue-square-4", "a-red-circle-and-a-blue-square-5"]
    names += ["a-red-circle-and-a-white-cross-6"]
    assert [entry["file"] for entry in record["pictures"]] == [str(tmp_path / f"{name}.png") for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{name}.png" for name in names] + [names[2] + ".sheet.png", names[2] + ".consistent.json"]
    )
    assert json.loads((tmp_path / f"{names[2]}.consistent.json").read_text()) == record
    assert record["report"]["calls"]["transformer"]["cross"] > 0
    picture = Image.open(tmp_path / f"{names[3]}.png")
    embedded = json.loads(picture.text["vision-attn"])
    assert picture.size == (48, 48) and embedded["prompt"] == PROMPTS[1] and embedded["seed"] == 6
    assert_one_message(main(argv), capsys, 1, ["already there", "--overwrite"])
    assert main([*argv, "--overwrite"]) == 0
    assert names[3] in capsys.readouterr().out


def test_videos(tmp_path, capsys):
    argv = ["consistent", PROMPTS[0], "--subject", "red circle", "-o", str(tmp_path), "--frames", "5", "--steps", "1"]
    assert main(argv) == 0
    assert sum(path.suffix == ".mp4" for path in tmp_path.iterdir()) == 2


@pytest.mark.parametrize(
    "argv, code, parts",
    [
        (DRAW[:3], 2, ["--subject"]),
        ([*DRAW, "--subject", "red circle"], 2, ["'red circle' is given twice"]),
        ([*DRAW, "--subject", "white cross="], 2, ["words=prompt of the reference"]),
        ([*DRAW, "--no-isolation", "--no-reposition", "--cross", "0"], 2, ["leave nothing to do"]),
        ([*DRAW, "--cross", "2"], 2, ["--cross"]),
        ([*DRAW, "--height", "50"], 2, ["--height", "multiple of 16"]),
        ([*DRAW, "--device", "tpu"], 2, ["--device"]),
        ([*DRAW, *SMALL, "--subject", "green cross"], 1, ["no prompt contains the words 'green cross'"]),
        (["protect", "{picture}", "--eps", "0"], 2, ["--eps"]),
        (["protect", "{picture}", "{picture}"], 2, ["same name"]),
        (["protect", "nowhere.png"], 1, ["nowhere.png"]),
        (["protect", "{odd}"], 1, ["50 x 47 pixels", "multiples of 8", "48 x 40"]),
    ],
)
def test_what_is_refused(argv, code, parts, tmp_path, capsys):
    out = tmp_path / "out"
    for name, size in (("picture", (48, 48)), ("odd", (47, 50))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        argv = [part.replace("{" + name + "}", str(tmp_path / f"{name}.png")) for part in argv]
    assert_one_message(main([*argv, "-o", str(out)]), capsys, code, parts)
    assert not out.exists() or not list(out.iterdir())


def test_protected_pictures(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    argv = ["protect", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--iterations", "3", "--eps", "5"]
    assert main(argv) == 0
    assert "at most 5" in capsys.readouterr().out
    found = np.asarray(Image.open(tmp_path / "out" / "a.protected.png"))
    assert found.shape == pixels.shape and np.abs(found.astype(int) - pixels).max() == 5
    assert_one_message(main(argv), capsys, 1, ["already there", "--overwrite"])
    assert main([*argv, "--overwrite", "--away", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["largest"] == 5 and not np.array_equal(np.asarray(Image.open(result["file"])), found)
