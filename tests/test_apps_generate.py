"""The main job: files, settings, comparison, several prompts, failures half-way."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from vision_attn.apps import files, job, media, sampling
from vision_attn.apps.cli import main
from vision_attn.diffusion.loading import load
from vision_attn.diffusion.tiny import pipeline, tokenizer

DEFAULTS = {
    "height": 48,
    "width": 48,
    "frames": 5,
    "steps": 2,
    "guidance": 2.0,
    "max_sequence_length": 16,
    "fps": 8,
    "attention": {"radial": {"decay": 0.5, "block": 4, "thin": 8}, "neighborhood": {"window": [5, 3, 3]}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline().save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS))
    return str(folder)


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    """A PixArt pipeline of random weights: another family, drawing images."""
    from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = tokenizer()
    text = T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=8,
        sample_size=16,
        patch_size=2,
        caption_channels=8,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    folder = tmp_path_factory.mktemp("image") / "pixart"
    PixArtAlphaPipeline(
        tokenizer=words, text_encoder=T5EncoderModel(text), vae=vae, transformer=denoiser, scheduler=DDIMScheduler()
    ).save_pretrained(folder)
    return str(folder)


def generate(model, out, *argv):
    return main(["generate", "-o", str(out), "--model", model, "--device", "cpu", *argv])


def read_video(path):
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), dict(container.metadata), container.streams.video[0]


def test_a_video_with_everything_beside_it(model, tmp_path, capsys):
    assert generate(model, tmp_path, "A red circle, moving right!", "--seed", "3") == 0
    out, err = capsys.readouterr()
    names = [f"a-red-circle-moving-right-3{ending}" for ending in (".json", ".mp4", ".sheet.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(str(tmp_path / name) in out for name in names)
    assert "it/s" not in err  # no bars where nobody watches

    record = json.loads((tmp_path / names[0]).read_text())
    wanted = {"prompt": "A red circle, moving right!", "seed": 3, "steps": 2, "guidance": 2.0, "fps": 8, "frames": 5}
    assert wanted.items() <= record.items()
    assert (record["height"], record["width"], record["device"], record["dtype"]) == (48, 48, "cpu", "float32")
    assert record["attention"] == {"pattern": "dense"} and record["report"] is None and record["model"] == model
    assert set(record["versions"]) == {"python", "vision-attn", "torch", "diffusers", "transformers"}
    assert record["seconds"] > 0

    frames, metadata, stream = read_video(tmp_path / names[1])
    assert frames.shape == (5, 192, 192, 3)  # 48 pixels are enlarged four times
    assert stream.average_rate == 8 and stream.codec_context.name in ("h264", "libx264")
    embedded = json.loads(metadata["comment"])
    assert embedded.items() <= record.items() and embedded["seed"] == 3


def test_the_video_holds_the_frames_of_the_pipeline(model, tmp_path):
    assert generate(model, tmp_path, "a red circle") == 0
    frames, _, _ = read_video(tmp_path / "a-red-circle-0.mp4")
    arguments = {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0}
    pipe = load(model, device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(0)
    direct = pipe("a red circle", generator=noise, max_sequence_length=16, output_type="np", **arguments).frames[0]
    shrunk = frames.reshape(5, 48, 4, 48, 4, 3).mean((2, 4))
    assert np.abs(shrunk - direct * 255).mean() < 8  # of 255, what lossy video costs on noise


def test_radial_compared_with_dense(model, tmp_path, capsys):
    assert (
        generate(model, tmp_path, "a red circle", "--attention", "radial", "--decay", "0.2", "--compare", "--json") == 0
    )
    (record,) = json.loads(capsys.readouterr().out)["results"]
    assert record["attention"] == {
        "pattern": "radial", "decay": 0.2, "block": 4, "sink": True, "rule": "token", "thin": 8,
        "dense_steps": 0, "dense_layers": 0,
    }  # fmt: skip
    assert record == json.loads((tmp_path / "a-red-circle-0.json").read_text())
    (denoiser,) = record["report"]["denoisers"]
    assert denoiser["grids"] == [[2, 6, 6]] and denoiser["steps"] == {"sparse": 2, "dense": 0}
    assert record["warmed_up"] and record["seconds"] > 0 and record["dense_seconds"] > 0
    assert record["comparison"]["speedup"] == pytest.approx(record["dense_seconds"] / record["seconds"])
    assert 0 < record["comparison"]["ssim"] <= 1
    assert sorted(record["files"]) == ["dense video", "settings", "sheet", "video"]
    assert all(os.path.exists(path) for path in record["files"].values())
    _, metadata, _ = read_video(record["files"]["dense video"])
    assert json.loads(metadata["comment"])["attention"] == {"pattern": "dense"}


def test_a_sparse_pattern_changes_the_video_and_a_full_one_does_not(model, tmp_path, capsys):
    window = ["--attention", "neighborhood", "--compare", "--window"]
    assert generate(model, tmp_path, "a red circle", *window, "1,3,3") == 0
    out = capsys.readouterr().out
    density = 0.25 * 0.5  # 3 x 3 of 6 x 6 in one of two frames
    assert f"{density:.1%} of the query-key pairs" in out and "speed-up by neighborhood" in out
    assert "neighborhood window=[1, 3, 3] stride=1" in out
    assert "PSNR" in out and "SSIM" in out and "identical" not in out
    sparse = json.loads((tmp_path / "a-red-circle-0.json").read_text())["comparison"]
    assert generate(model, tmp_path, "a red circle", *window, "2,6,6", "--overwrite") == 0
    full = json.loads((tmp_path / "a-red-circle-0.json").read_text())["comparison"]
    assert full["psnr"] is None or full["psnr"] > sparse["psnr"] + 10


def test_dense_steps_and_layers_reach_the_attachment(model, tmp_path, capsys):
    argv = ["--attention", "neighborhood", "--window", "1,3,3", "--dense-steps", "1", "--dense-layers", "2", "--json"]
    assert generate(model, tmp_path, "a red circle", *argv) == 0
    (record,) = json.loads(capsys.readouterr().out)["results"]
    (denoiser,) = record["report"]["denoisers"]
    assert denoiser["steps"] == {"sparse": 1, "dense": 1}
    assert [share == 1 for share in denoiser["layers"]] == [True, True, False, False, False, False]
    assert record["attention"]["dense_steps"] == 1 and record["attention"]["dense_layers"] == 2


def test_more_dense_layers_than_the_model_has(model, tmp_path, capsys):
    argv = ["--attention", "radial", "--dense-layers", "7"]
    assert generate(model, tmp_path, "a red circle", *argv) == 2
    assert "6 layers" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_one_frame_is_a_png_with_its_settings(model, tmp_path):
    from PIL import Image

    # The suggested window of the model is longer than one frame: it is cut, because nobody typed it.
    assert generate(model, tmp_path, "a red circle", "--frames", "1", "--attention", "neighborhood") == 0
    with Image.open(tmp_path / "a-red-circle-0.png") as image:
        assert image.size == (48, 48)
        settings = json.loads(image.text["vision-attn"])
        assert settings["attention"]["window"] == [1, 3, 3] and settings["frames"] == 1
        assert image.text["parameters"].startswith("a red circle\nSteps: 2, CFG scale: 2.0, Seed: 0, Size: 48x48")


def test_an_image_pipeline_of_another_family(image_model, tmp_path, capsys):
    argv = ["--attention", "neighborhood", "--window", "3", "--height", "32", "--width", "48", "--steps", "2", "--json"]
    assert generate(image_model, tmp_path, "a red circle", *argv, "--compare", "--negative", "blue") == 0
    (record,) = json.loads(capsys.readouterr().out)["results"]
    assert record["files"]["picture"].endswith("a-red-circle-0.png") and record["negative"] == "blue"
    assert record["report"]["denoisers"][0]["grids"] == [[8, 12]]
    assert generate(image_model, tmp_path, "a red circle", "--frames", "5") == 2
    assert "--frames: got 5, but PixArt draws single images" in capsys.readouterr().err


def test_prompts_from_a_file_and_stdin_count_seeds_up(model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a blue square\n\n  a café sign \n", encoding="utf-8-sig")
    argv = ["--prompts", str(file), "--frames", "1", "--seed", "10", "--json"]
    assert generate(model, tmp_path, "a red circle", *argv) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["prompt"], r["seed"]) for r in results] == [
        ("a red circle", 10),
        ("a blue square", 11),
        ("a café sign", 12),
    ]
    assert (tmp_path / "a-café-sign-12.png").exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a green triangle\n")))
    assert generate(model, tmp_path, "--prompts", "-", "--frames", "1") == 0
    assert (tmp_path / "a-green-triangle-0.png").exists()


def test_a_seed_is_a_picture(model, tmp_path, capsys):
    loaded = load(model, device="cpu")
    arguments = sampling.call_arguments(
        loaded.pipe, {**{k: DEFAULTS[k] for k in ("height", "width", "steps")}, "frames": 1}
    )
    first, again, other = (sampling.sample(loaded, "a red circle", seed, arguments).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_built_in_model_warns_about_words_it_does_not_know(tmp_path, capsys):
    argv = [
        "generate",
        "a red giraffe",
        "-o",
        str(tmp_path),
        "--frames",
        "1",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert re.search(r"Warning: the built-in model does not know giraffe. It knows: .*circle.*red", err)
    (record,) = json.loads(out)["results"]
    assert record["model"] == "built-in shapes-video" and "/" not in record["model"]
    assert main([*argv[:1], "a red circle", *argv[2:]]) == 0
    assert capsys.readouterr().err == ""
    assert main([*argv[:1], "a red circle " * 9, *argv[2:]]) == 0
    assert "Warning: the built-in model reads 16 tokens, fewer than" in capsys.readouterr().err


def test_a_setting_the_pipeline_has_no_argument_for(model):
    loaded = load(model, device="cpu")
    with pytest.raises(ValueError, match="WanPipeline has no strength"):
        sampling.call_arguments(loaded.pipe, {"strength": 0.5})


def test_numbers_that_are_no_picture_are_an_error(model, tmp_path, capsys, monkeypatch):
    from diffusers import AutoencoderKLWan

    real = AutoencoderKLWan.decode
    monkeypatch.setattr(
        AutoencoderKLWan, "decode", lambda *args, **kw: tuple(part * torch.nan for part in real(*args, **kw))
    )
    assert generate(model, tmp_path, "a red circle", "--frames", "1") == 1
    assert "produced NaN in torch.float32" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 1)])
def test_nothing_half_written_is_left_when_writing_stops(model, tmp_path, capsys, monkeypatch, stop, code):
    import av

    real, calls = av.VideoFrame.from_ndarray, []

    def second_frame(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise stop
        return real(*args, **kwargs)

    class Frames:
        from_ndarray = staticmethod(second_frame)

    monkeypatch.setattr(av, "VideoFrame", Frames)
    assert generate(model, tmp_path, "a red circle") == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert ("0 of 1 prompts are done" if code == 130 else "No space left on device") in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_in_the_middle_of_a_run(model, tmp_path):
    argv = ["a red circle", "--model", model, "-o", str(tmp_path), "--steps", "1000", "--progress", "--device", "cpu"]
    command = [sys.executable, "-m", "vision_attn.apps", "generate", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell in the background ignores it
    )
    try:
        seen, deadline = b"", time.monotonic() + 240
        while b"3/1000" not in seen and time.monotonic() < deadline:
            seen += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, (seen + rest).decode()
    assert rest.decode().splitlines()[-1].startswith("Interrupted. 0 of 1 prompts are done")
    assert out == b"" and b"Traceback" not in seen + rest and list(tmp_path.iterdir()) == []


def test_file_names():
    assert files.slug("../../etc/passwd") == "etc-passwd"
    assert files.slug("***") == "prompt"
    assert files.slug("ein gelber Kreis — schräg") == "ein-gelber-kreis-schräg"
    long = files.slug("word " * 40)
    assert len(long) <= 48 and long.endswith("word")
    assert len(files.slug("x" * 300)) == 48
    assert "\x00" not in files.slug("a\x00b") and "/" not in files.slug("a/b")


def test_sheets_and_videos_of_odd_sizes(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((1, 33, 47, 3), (2, 8, 200, 3), (12, 180, 320, 3)):
        clip = rng.integers(0, 255, shape, dtype=np.uint8)
        media.write_sheet(tmp_path / "s.png", {"dense": clip, "radial": clip}, "a very long prompt " * 40)
        media.write_video(tmp_path / "v.mp4", clip, 7.5, {"prompt": "x"})
        frames, _, _ = read_video(tmp_path / "v.mp4")
        factor = media.enlargement(*shape[1:3])
        assert frames.shape == (shape[0], shape[1] * factor, shape[2] * factor, 3)
    assert media.enlargement(480, 832) == 1 and media.enlargement(48, 48) == 4


def test_psnr_and_ssim():
    clip = np.full((2, 16, 16, 3), 100, np.uint8)
    assert sampling.compare(clip, clip + 1)["psnr"] == pytest.approx(20 * np.log10(255))
    assert sampling.compare(clip, clip) == {"psnr": None, "ssim": 1.0}
    noise = np.random.default_rng(0).integers(0, 255, clip.shape, dtype=np.uint8)
    assert sampling.compare(clip, noise)["ssim"] < 0.2


def test_json_has_no_nan():
    assert json.loads(job.dump({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }
