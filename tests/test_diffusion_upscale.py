"""upscale_video: the steps of the recipe one by one, resuming, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline  # noqa: E402
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Dense, Neighborhood, attach  # noqa: E402
from vision_attn.diffusion import FreeSwim, upscale_video  # noqa: E402
from vision_attn.diffusion.restart import carried, shifted, skip_steps  # noqa: E402
from vision_attn.diffusion.tiny import pipeline  # noqa: E402

WORDS = {"max_sequence_length": 16}
EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
UNIPC = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


@pytest.fixture(scope="module")
def pipe():
    made = pipeline()
    made.vae.config.latents_mean[:] = [0.3] * 16
    made.vae.config.latents_std[:] = [1.7] * 16
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).random((5, 16, 16, 3), dtype=np.float32)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def upscale(pipe, what, height=32, width=32, **options):
    options = {"base_size": (16, 16), "steps": 4, "generator": seeded(), **WORDS, **options}
    return upscale_video(pipe, what, height, width, **options)


# The recipe


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [EULER, UNIPC], ids=["euler", "unipc"])
def test_the_recipe(pipe, clip, scheduler, monkeypatch):
    """Enlarge, encode, normalise, noise, and denoise the last steps with guidance, written out."""
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    found = upscale(pipe, clip, prompt="a red circle", negative_prompt="blue", guidance=4.0, shift=5.0, strength=0.8,
                    method=Neighborhood(window=(2, 3, 3))).frames  # fmt: skip

    rows = torch.from_numpy(clip).permute(0, 3, 1, 2)
    video = F.interpolate(rows, (32, 32), mode="bilinear", align_corners=False).permute(1, 0, 2, 3)[None] * 2 - 1
    mean, std = 0.3, 1.7
    latents = (pipe.vae.encode(video).latent_dist.mean - mean) / std
    mine = shifted(scheduler, 5.0)
    mine.set_timesteps(4)
    sigma = mine.sigmas[1]  # 0.8 of 4 steps: three run
    x = (1 - sigma) * latents + sigma * torch.randn(latents.shape, generator=seeded())
    texts = pipe.encode_prompt("a red circle", "blue", max_sequence_length=16)
    mine.set_begin_index(1)
    if scheduler is UNIPC:  # its order depends on how many steps are left, which begin_index does not change
        mine.set_begin_index(0)
        mine.timesteps, mine.sigmas = mine.timesteps[1:], mine.sigmas[1:]
        times = mine.timesteps
    else:
        times = mine.timesteps[1:]
    with attach(pipe.transformer, Neighborhood(window=(2, 3, 3))):
        for t in times:
            cond, uncond = (pipe.transformer(x, t.expand(1), text).sample for text in texts)
            x = mine.step(uncond + 4.0 * (cond - uncond), t, x).prev_sample
    expected = pipe.vae.decode(x * std + mean).sample
    expected = (expected[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(found[0], expected, atol=2e-5)
    assert pipe.scheduler is scheduler


def test_from_a_prompt(pipe):
    made = upscale(pipe, "a red circle", frames=5)
    assert made.frames.shape == (1, 5, 32, 32, 3) and made.base.shape == (1, 5, 16, 16, 3)
    base = pipe("a red circle", negative_prompt="", height=16, width=16, num_frames=5, num_inference_steps=4,
                generator=seeded(), **WORDS).frames  # fmt: skip
    np.testing.assert_array_equal(made.base, base)
    report = made.report.denoisers[0]
    assert report["calls"] == {"dual": 1, "cached": 1, "local": 2} and report["base"] == [2, 2]  # 0.7 of 4 steps
    assert made.frames.min() >= 0 and made.frames.max() <= 1
    given = upscale(pipe, made.base, prompt="a red circle")
    assert given.report.denoisers[0]["grid"] == [2, 4, 4] and np.array_equal(given.base, made.base)


def test_a_batch_is_its_samples(pipe, clip):
    other = clip[::-1].copy()
    both = upscale(pipe, [clip, other], prompt=["a red circle", "a blue square"], generator=[seeded(), seeded()])
    first = upscale(pipe, clip, prompt="a red circle", generator=[seeded()])
    second = upscale(pipe, other, prompt="a blue square", generator=[seeded()])
    np.testing.assert_allclose(both.frames, np.concatenate([first.frames, second.frames]), atol=1e-4)
    assert not np.allclose(both.frames[0], both.frames[1], atol=1e-3)


def test_forms_of_a_video(pipe, clip):
    from PIL import Image

    eight = (clip * 255).round().astype(np.uint8)
    options = {"prompt": "a red circle", "steps": 2, "method": Dense()}
    expected = upscale(pipe, eight, **options).frames
    for form in (eight[None], [Image.fromarray(frame) for frame in eight], torch.from_numpy(eight), eight / 255.0):
        np.testing.assert_allclose(upscale(pipe, form, **options).frames, expected, atol=1e-5)


def test_sizes_that_are_not_square(pipe, clip):
    made = upscale(pipe, clip[:1], 32, 48, prompt="a red circle", steps=2)
    assert made.frames.shape == (1, 1, 32, 48, 3) and made.report.denoisers[0]["window"] == [1, 3, 3]


def test_tiles(pipe, clip, monkeypatch):
    options = {"prompt": "a red circle", "steps": 2, "frames": 1}
    decoded = []
    whole = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **k: decoded.append(tuple(z.shape[-2:])) or whole(z, **k))
    monkeypatch.setattr(pipe.vae, "tile_sample_min_height", 16)
    monkeypatch.setattr(pipe.vae, "tile_sample_stride_height", 16)
    untiled = upscale(pipe, clip[:1], tiling=False, **options).frames
    assert decoded == [(4, 4)]
    tiled = upscale(pipe, clip[:1], **options).frames
    assert decoded[1:] == [(2, 4)] * 2 and pipe.vae.use_tiling is False
    assert np.abs(tiled - untiled).max() > 1e-3


def test_image_to_video(pipe, clip):
    transformer = pipeline().transformer
    transformer = type(transformer)(**{**transformer.config, "in_channels": 16 + 16 + 4}).eval()
    parts = {**pipe.components, "transformer": transformer, "image_encoder": None, "image_processor": None}
    parts = {name: part for name, part in parts.items() if name != "transformer_2"}
    i2v = WanImageToVideoPipeline(**parts)
    made = upscale(i2v, clip, prompt="a red circle", steps=3)
    assert made.frames.shape == (1, 5, 32, 32, 3)
    assert made.report.denoisers[0]["calls"] == {"dual": 1, "cached": 1, "local": 2}
    other = upscale(i2v, clip, prompt="a red circle", steps=3, image=torch.zeros(1, 3, 32, 32))
    assert not np.allclose(made.frames, other.frames, atol=1e-4)


def test_progress(pipe, clip, capsys):
    seen = []
    upscale(pipe, clip[:1], prompt="a red circle", progress=lambda now, total: seen.append((now, total)))
    assert seen == [(1, 2), (2, 2)] and capsys.readouterr().err == ""
    upscale(pipe, clip[:1], prompt="a red circle", progress=True)
    assert "2/2" in capsys.readouterr().err


# Interruptions


class Stop(Exception):
    pass


@pytest.mark.parametrize("scheduler", [EULER, UNIPC], ids=["euler", "unipc"])
@pytest.mark.parametrize("at, left_over", [(1, 5), (3, 3)])
def test_resuming_gives_the_same_bits(pipe, tmp_path, monkeypatch, scheduler, at, left_over):
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    options = {"strength": 0.63, "steps": 8, "frames": 1}  # 5 steps run
    expected = upscale(pipe, "a red circle", **options).frames
    done = []

    def stop(now, total):
        done.append(now)
        if len(done) == at:
            raise Stop

    folder = tmp_path / "state"
    with pytest.raises(Stop):
        upscale(pipe, "a red circle", checkpoint=folder, progress=stop, **options)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(type(pipe.vae), "encode", None)  # neither drawn nor encoded again
    done.clear()
    resumed = upscale(pipe, "a red circle", checkpoint=folder, progress=lambda now, _: done.append(now), **options)
    np.testing.assert_array_equal(resumed.frames, expected)
    assert len(done) == left_over and not folder.exists()


def test_an_interruption_before_the_first_step(pipe, tmp_path, monkeypatch):
    options = {"steps": 3, "frames": 1}
    expected = upscale(pipe, "a red circle", **options).frames
    encode = type(pipe.vae).encode

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(type(pipe.vae), "encode", stop)
    with pytest.raises(Stop):
        upscale(pipe, "a red circle", checkpoint=tmp_path / "state", **options)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["base.safetensors"]
    monkeypatch.setattr(type(pipe.vae), "encode", encode)
    resumed = upscale(pipe, "a red circle", checkpoint=tmp_path / "state", **options)
    np.testing.assert_array_equal(resumed.frames, expected)


def test_a_checkpoint_of_another_call(pipe, tmp_path):
    def stop(now, total):
        raise Stop

    with pytest.raises(Stop):
        upscale(pipe, "a red circle", checkpoint=tmp_path, progress=stop, frames=1)
    for change in ({"strength": 0.9}, {"generator": None}, {"method": FreeSwim(base=(4, 4))}, {"guidance": 2.5}):
        with pytest.raises(ValueError, match="holds an upscale with other settings"):
            upscale(pipe, "a red circle", checkpoint=tmp_path, frames=1, **change)
    (tmp_path / "step.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read .* remove it to start again"):
        upscale(pipe, "a red circle", checkpoint=tmp_path, frames=1)


@pytest.mark.parametrize("scheduler", [EULER, UNIPC], ids=["euler", "unipc"])
def test_a_schedule_entered_twice(scheduler):
    """Stopping after two of five steps and going on, on a known function."""

    def run(scheduler, x, steps):
        scheduler.set_timesteps(8)
        times = scheduler.timesteps[:steps]
        scheduler.set_begin_index(0)
        for t in times:
            x = scheduler.step(torch.sin(3 * x) + t / 1000, t, x, return_dict=False)[0]
        return x

    start = torch.randn(4, 5, generator=seeded())
    whole = run(skip_steps(scheduler, 3), start, 5)
    first = skip_steps(scheduler, 3)
    middle = run(first, start, 2)
    assert torch.equal(run(skip_steps(scheduler, 3, 2, carried(first)), middle, 3), whole)


# Refusals


@pytest.mark.parametrize(
    "change, words",
    [
        ({"height": 40}, "height must be a multiple of 16 pixels; got 40, nearest: 32 and 48"),
        ({"width": 8}, "width must be a multiple of 16 pixels; got 8, nearest: 16"),
        ({"height": 32.0}, "height must be a multiple of 16 pixels; got 32.0"),
        ({"prompt": None}, "a video needs the prompt"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 videos"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"strength": 0}, "strength must be above 0"),
        ({"strength": 0.1}, "less than one step"),
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"frames": 9}, "frames=9, but the video has 5"),
        ({"method": "freeswim"}, "method must be a method or a pattern"),
        ({"cache_steps": 0}, "cache_steps must be an int of at least 1"),
        ({"base_size": None}, "trained on is not known; give it in pixels"),
        ({"base_size": 16}, r"base_size must be \(height, width\)"),
        ({"base_size": (16, 20)}, "width must be a multiple of 16 pixels"),
    ],
    ids=str,
)
def test_what_does_not_fit(pipe, clip, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        upscale(pipe, clip, **{"prompt": "a red circle", **change})


@pytest.mark.parametrize(
    "video, words",
    [
        (np.zeros((4, 16, 16, 3)), r"4 frames do not fit the model, which needs 4n\+1; nearest: 1, 5"),
        (np.zeros((5, 48, 48, 3)), "height=32 is smaller than the 48 pixels of the small video"),
        (np.full((5, 16, 16, 3), 2.0), "numbers from 0 to 1; got 2 to 2"),
        (np.full((5, 16, 16, 3), np.nan), "numbers from 0 to 1; got nan"),
        (np.zeros((5, 3, 16, 16)), r"a video must be \[frames, height, width, 3\]"),
        (np.zeros((5, 16, 16)), r"a video must be \[frames, height, width, 3\]"),
        ([], r"a video must be \[frames, height, width, 3\]"),
        (17, r"a video must be \[frames, height, width, 3\]"),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_videos_that_do_not_fit(pipe, video, words):
    with pytest.raises((ValueError, TypeError), match=words):
        upscale(pipe, video, prompt="a red circle")


def test_pipelines_that_do_not_fit(pipe, clip, monkeypatch):
    with pytest.raises(TypeError, match="upscale_video runs WanPipeline and WanImageToVideoPipeline; got"):
        upscale(MODELS["WanTransformer3DModel"].build(), clip, prompt="a red circle")
    monkeypatch.setattr(pipe, "text_encoder", None)
    with pytest.raises(ValueError, match="has no text encoder to read the prompt"):
        upscale(pipe, clip, prompt="a red circle")


def test_numbers_that_are_no_picture_leave_nothing_behind(pipe, clip, monkeypatch):
    before = dict(vars(pipe.transformer))
    monkeypatch.setattr(type(pipe.vae), "decode", lambda *a, **k: (torch.full((1, 3, 5, 32, 32), torch.nan),))
    with pytest.raises(RuntimeError, match="NaN"):
        upscale(pipe, clip, prompt="a red circle", steps=2)
    assert dict(vars(pipe.transformer)) == before
