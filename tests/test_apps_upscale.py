"""`vision-attn upscale`: files, sizes, videos that come in, interruptions."""

import json

import numpy as np
import pytest
import torch

from vision_attn.apps import media
from vision_attn.apps.cli import main
from vision_attn.apps.upscale import read_video
from vision_attn.diffusion import upscale_video
from vision_attn.diffusion.loading import load
from vision_attn.diffusion.tiny import pipeline

DEFAULTS = {
    "height": 16, "width": 16, "frames": 5, "steps": 3, "guidance": 2.0, "fps": 8, "max_sequence_length": 16,
    "attention": {},
}  # fmt: skip
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline().save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS))
    return str(folder)


def upscale(model, out, *argv):
    return main(["upscale", PROMPT, "-o", str(out), "--model", model, "--device", "cpu", "--frames", "1", *argv])


def test_files_and_settings(model, tmp_path, capsys):
    assert upscale(model, tmp_path, "--seed", "3", "--json") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert printed.err == ""
    names = {"video": ".mp4", "small video": ".small.mp4", "sheet": ".sheet.png", "settings": ".json"}
    files = {kind: str(tmp_path / f"a-red-circle-3-times-2{ending}") for kind, ending in names.items()}
    assert record["files"] == files and sorted(map(str, tmp_path.iterdir())) == sorted(files.values())
    assert json.loads((tmp_path / "a-red-circle-3-times-2.json").read_text()) == record
    assert (record["height"], record["width"], record["strength"], record["cache_steps"]) == (32, 32, 0.7, 2)
    assert record["report"]["denoisers"][0]["base"] == [2, 2]

    pipe = load(model, device="cpu").pipe
    made = upscale_video(pipe, PROMPT, 32, 32, frames=1, generator=torch.Generator().manual_seed(3),
                         max_sequence_length=16)  # fmt: skip
    for kind, expected in (("video", made.frames), ("small video", made.base)):
        shown = read_video(tmp_path / files[kind])
        assert shown.shape == expected[0].shape
        assert np.abs(shown / 255 - expected[0]).mean() < 0.1  # H.264 of noise

    assert upscale(model, tmp_path, "--seed", "3") == 1
    assert "already there; add --overwrite" in capsys.readouterr().err
    assert record["report"]["method"]["cache_device"] is None
    assert upscale(model, tmp_path, "--seed", "3", "--cache-device", "tpu") == 2
    assert "--cache-device" in capsys.readouterr().err
    assert upscale(model, tmp_path, "--seed", "4", "--cache-device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"]["method"]["cache_device"] == "cpu"
    assert upscale(model, tmp_path, "--seed", "3", "--overwrite", "--cache-steps", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a red circle (seed 3, 1 frames, 16 x 16 -> 32 x 32)" and "freeswim, local copy" in lines[5]


def test_a_video_that_comes_in(model, tmp_path, capsys):
    frames = np.zeros((5, 16, 32, 3), np.uint8)
    frames[:, 4:12, 8:24] = 255
    clip = tmp_path / "clip.mp4"
    media.write_video(clip, frames, 8, {"prompt": PROMPT, "height": 16, "width": 32})
    assert np.abs(read_video(clip).astype(int) - frames).mean() < 4  # written enlarged, read as it was
    options = ["--video", str(clip), "--frames", "5", "--height", "32", "--width", "48", "--steps", "2", "--json"]
    assert upscale(model, tmp_path / "out", *options) == 0
    record = json.loads(capsys.readouterr().out)
    sizes = [record[key] for key in ("frames", "height", "width", "small_height", "small_width")]
    assert sizes == [5, 32, 48, 16, 32] and record["video"] == str(clip)


def test_videos_of_other_programs_are_taken_as_they_are(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), np.uint8)
    for settings in ({"prompt": ""}, {"prompt": "", "height": 5, "width": 7}, {"prompt": "", "height": 0, "width": 0}):
        media.write_video(tmp_path / "clip.mp4", frames.repeat(4, 1).repeat(4, 2), 8, settings)
        assert read_video(tmp_path / "clip.mp4").shape == (2, 128, 192, 3)


def test_an_interruption_leaves_only_the_checkpoint(model, tmp_path, capsys, monkeypatch):
    out, state = tmp_path / "out", tmp_path / "state"
    transformer = type(pipeline().transformer)
    forward, calls = transformer.forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:  # six calls draw the small video
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformer, "forward", interrupted)
    assert upscale(model, out, "--checkpoint", str(state)) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert list(out.iterdir()) == [] and sorted(p.name for p in state.iterdir()) == [
        "base.safetensors", "step.safetensors",
    ]  # fmt: skip
    calls[:] = [1] * 8
    assert upscale(model, out, "--checkpoint", str(state), "--json") == 0
    assert len(calls) == 12 and not state.exists()  # two steps, two calls each
    resumed = json.loads(capsys.readouterr().out)["files"]["video"]
    again = tmp_path / "again"
    assert upscale(model, again) == 0
    np.testing.assert_array_equal(read_video(resumed), read_video(next(again.glob("*2.mp4"))))


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--height", "32"], 2, "--height and --width go together"),
        (["--height", "32", "--width", "32", "--times", "2"], 2, "give one of them"),
        (["--height", "40", "--width", "32"], 2, "needs a multiple of 16 pixels"),
        (["--frames", "4"], 2, "needs 4n+1"),
        (["--strength", "0"], 2, "0"),
        (["--dtype", "int8"], 2, "--dtype: got 'int8'"),
        (["--strength", "0.1"], 1, "less than one step"),
        (["--video", "README.md"], 2, "no video can be read"),
    ],
    ids=str,
)
def test_what_cannot_be_done(model, tmp_path, capsys, options, code, words):
    assert upscale(model, tmp_path / "out", *options) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_models_that_cannot_be_used(tmp_path, capsys):
    folder = tmp_path / "flux"
    folder.mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    assert upscale(str(folder), tmp_path / "out") in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert main(["upscale", " ", "-o", str(tmp_path)]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
