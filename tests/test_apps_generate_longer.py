"""`generate` with --times, --extend and --preset."""

import json

import numpy as np
import pytest
from test_apps_generate import generate, model, read_video  # noqa: F401

from vision_attn import Neighborhood, attach
from vision_attn.apps import sampling
from vision_attn.apps.cli import main
from vision_attn.apps.generate import EXTENDERS
from vision_attn.apps.sampling import Attachment
from vision_attn.diffusion import NTK, PI, Preset, UltraViCo, extend
from vision_attn.diffusion.loading import load

CIRCLE = "a red circle"


def records(capsys):
    return json.loads(capsys.readouterr().out)["results"]


def test_names_are_those_of_extend_video():
    assert EXTENDERS == extend.EXTENDERS


def drawn(model, frames, attachment):  # noqa: F811
    loaded = load(model, device="cpu")
    settings = {"height": 48, "width": 48, "frames": frames, "steps": 2, "guidance": 2.0, "max_sequence_length": 16}
    return sampling.sample(loaded, CIRCLE, 0, sampling.call_arguments(loaded.pipe, settings), attachment).frames


def test_four_times_as_long(model, tmp_path, capsys):  # noqa: F811
    assert generate(model, tmp_path, CIRCLE, "--times", "4", "--json") == 0
    (record,) = records(capsys)
    assert (record["frames"], record["name"]) == (29, "ultravico")  # 2 latent frames became 8
    assert record["extend"] == {
        "name": "ultravico", "times": 4.0, "alpha": None, "beta": None, "train_frames": 2, "period": None,
        "gamma": None, "first_frame": None, "center_keys": True,
    }  # fmt: skip
    assert record["attention"] == {"pattern": "dense"} and record["report"] is None
    assert record["extend_report"]["pattern"]["alpha"] == 0.9
    wanted = drawn(model, 29, Attachment(extension=UltraViCo(times=4, train_frames=2)))
    frames, _, _ = read_video(record["files"]["video"])
    assert frames.shape == (29, 192, 192, 3)
    shrunk = frames.reshape(29, 48, 4, 48, 4, 3).mean((2, 4))
    assert np.abs(shrunk - wanted).mean() < 8
    assert not np.array_equal(wanted, drawn(model, 29, None))


def test_a_frequency_edit_beside_a_pattern_compared_with_neither(model, tmp_path, capsys):  # noqa: F811
    argv = ["--times", "2", "--extend", "ntk", "--attention", "neighborhood", "--window", "3,3,3", "--compare"]
    assert generate(model, tmp_path, CIRCLE, *argv) == 0
    out = capsys.readouterr().out
    assert "extend        ntk train_frames=2 times=2.0" in out and "speed-up by neighborhood + ntk" in out
    record = json.loads((tmp_path / "a-red-circle-0.json").read_text())
    assert record["report"]["denoisers"][0]["grids"] == [[4, 6, 6]]
    assert record["extend_report"]["denoisers"][0]["times"] == {"t": 2.0}
    attachment = Attachment(Neighborhood(window=(3, 3, 3)), {}, NTK(train_frames=2))
    assert sampling.compare(drawn(model, 13, None), drawn(model, 13, attachment)) == {
        key: pytest.approx(record["comparison"][key]) for key in ("psnr", "ssim")
    }
    _, metadata, _ = read_video(record["files"]["dense video"])
    assert "extend" not in json.loads(metadata["comment"])


def test_plain_extrapolation_and_another_trained_length(model, tmp_path, capsys):  # noqa: F811
    argv = ["--times", "1.5", "--extend", "none", "--json"]
    assert generate(model, tmp_path / "none", CIRCLE, *argv) == 0
    (record,) = records(capsys)
    assert record["frames"] == 9 and record["extend"] == {"name": "none", "times": 1.5} and record["name"] == "dense"
    argv = ["--times", "2", "--extend", "pi", "--train-frames", "1", "--json"]
    assert generate(model, tmp_path / "pi", CIRCLE, *argv) == 0
    (record,) = records(capsys)
    assert record["frames"] == 5 and record["extend_report"]["denoisers"][0]["changed"] == 4


def test_presets_from_files_and_by_name(model, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "mine.json"
    Preset((Neighborhood(window=(1, 3, 3)),) * 5 + (Neighborhood(window=(2, 5, 5)),), {"dense_layers": 2}).save(file)
    assert generate(model, tmp_path / "a", CIRCLE, "--preset", str(file), "--compare", "--json") == 0
    (record,) = records(capsys)
    assert record["name"] == str(file) and record["attention"]["dense_layers"] == 2
    assert record["attention"]["settings"]["pattern"][5]["window"] == [2, 5, 5]
    (denoiser,) = record["report"]["denoisers"]
    assert [share == 1 for share in denoiser["layers"]] == [True, True, False, False, False, False]
    assert denoiser["layers"][2] < denoiser["layers"][5]

    name = "radial/wan2.1-14b"
    argv = ["--preset", name, "--dense-layers", "3", "--compare", "--json"]
    assert generate(model, tmp_path / "b", CIRCLE, *argv) == 0
    (record,) = records(capsys)
    assert record["attention"]["preset"] == name and record["attention"]["dense_layers"] == 3
    assert record["attention"]["dense_steps"] == 0  # 12 of 50 became 0 of 2
    assert "Fitted to 2x6x6 tokens" in record["attention"]["settings"]["note"]
    assert record["report"]["denoisers"][0]["steps"] == {"sparse": 2, "dense": 0}
    argv = ["--preset", name, "--times", "2", "--extend", "yarn", "--json"]
    assert generate(model, tmp_path / "c", CIRCLE, *argv) == 0
    (record,) = records(capsys)
    assert record["name"] == f"{name} + yarn" and record["report"]["denoisers"][0]["grids"] == [[4, 6, 6]]


def test_warming_up_does_not_stay_dense():
    preset = Attachment(Preset(Neighborhood(window=3), {"dense_steps": 5, "dense_layers": 1}))
    assert preset.from_the_first_step().attention.options == {
        "dense_steps": 0,
        "dense_last_steps": 0,
        "dense_layers": 1,
    }
    pattern = Attachment(Neighborhood(window=3), {"dense_steps": 5, "dense_layers": 1}, PI())
    assert pattern.from_the_first_step() == Attachment(
        Neighborhood(window=3), {"dense_steps": 0, "dense_last_steps": 0, "dense_layers": 1}, PI()
    )
    assert Attachment(extension=PI()).from_the_first_step() == Attachment(extension=PI())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--times", "0.5"], "times must be at least 1"),
        (["--times", "nan"], "times must be at least 1"),
        (["--times", "2", "--frames", "5"], "both say how long the video is"),
        (["--extend", "pi"], "--extend goes with --times"),
        (["--times", "2", "--extend", "riflx"], "--extend: got 'riflx'; did you mean riflex? Allowed: ultravico, "),
        (["--times", "2", "--attention", "radial"], "same attention as radial; add --extend with one of riflex, pi"),
        (["--times", "2", "--preset", "a.json"], "same attention as a.json"),
        (["--times", "900", "--extend", "none"], "has positions for 256 latent frames; got 1800"),
        (["--times", "2", "--extend", "none", "--compare"], "--compare needs a sparse attention"),
        (["--times", "2", "--train-frames", "0"], "train_frames must be at least 1"),
        (["--train-frames", "2"], "--train-frames belongs to length-decay"),
        (["--preset", "radial/wan"], "there is no preset 'radial/wan'; did you mean"),
        (["--preset", "missing.json"], "missing.json cannot be read as a preset"),
        (["--preset", "gna/flux-4k"], "--preset: grid (2, 6, 6) has 3 axes, and the preset is for 2"),
        (["--preset", "radial/hunyuanvideo"], "this preset is for HunyuanVideoTransformer3DModel"),
        (["--preset", "radial/wan2.1-14b", "--attention", "radial"], "--preset brings its own attention"),
        (["--preset", "radial/wan2.1-14b", "--decay", "0.1"], "--decay belongs to radial"),
        (["--preset", "radial/wan2.1-14b", "--dense-steps", "2"], "leaves none for radial/wan2.1-14b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(model, tmp_path, capsys, argv, message):  # noqa: F811
    assert generate(model, tmp_path, CIRCLE, *argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("Error: ") and list(tmp_path.iterdir()) == []


def test_nothing_stays_attached(model):  # noqa: F811
    loaded = load(model, device="cpu")
    with pytest.raises(ValueError, match="already has"), attach(loaded.pipe, PI(train_frames=2)):
        with Attachment(Neighborhood(window=2), {}, NTK()).attached(loaded.pipe):
            pass
    with Attachment(Neighborhood(window=2), {}, NTK()).attached(loaded.pipe):
        pass


def test_help_says_how(capsys):
    assert main(["generate", "--help"]) == 0
    assert "[ultravico|riflex|pi|ntk|yarn|tasr|none]" in capsys.readouterr().out
