"""Longer videos through whole pipelines, and the NoRepeat score."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402
from vision_attn.diffusion import NTK, PI, RIFLEx, UltraViCo, YaRN, extend_video, no_repeat  # noqa: E402
from vision_attn.diffusion.extend import EXTENDERS, extension  # noqa: E402
from vision_attn.diffusion.lengths import frames_of, tokens_of  # noqa: E402
from vision_attn.diffusion.loading import load  # noqa: E402
from vision_attn.diffusion.sizes import FAMILIES  # noqa: E402
from vision_attn.diffusion.tiny import pipeline, tokenizer  # noqa: E402

DEFAULTS = {"height": 16, "width": 32, "frames": 5, "steps": 2, "guidance": 2.0, "max_sequence_length": 16}
CALL = {"height": 16, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline().save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS))
    pipe = load(folder, device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def direct(pipe, frames: int, *methods) -> np.ndarray:
    runs = [attach(pipe, method) for method in methods]
    out = pipe("a red circle", num_frames=frames, generator=noise(), output_type="np", **CALL).frames
    for run in runs:
        run.detach()
    return out


@pytest.mark.parametrize(
    "method, parts",
    [
        ("none", ()),
        ("ultravico", (UltraViCo(times=3, train_frames=2),)),
        ("riflex", (RIFLEx(train_frames=2),)),
        ("pi", (PI(train_frames=2),)),
        ("ntk", (NTK(train_frames=2),)),
        ("yarn", (YaRN(train_frames=2),)),
        ((PI(), Neighborhood(window=(3, 2, 2))), (PI(train_frames=2), Neighborhood(window=(3, 2, 2)))),
    ],
)
def test_it_is_the_pipeline_with_the_method_attached(pipe, method, parts):
    before = {name: value.clone() for name, value in pipe.transformer.named_buffers()}
    plain = direct(pipe, 21)
    made = extend_video(pipe, "a red circle", 3, method, generator=noise())
    assert made.frames.shape == (1, 21, 16, 32, 3) and made.frames.dtype == np.float32
    assert np.array_equal(made.frames, direct(pipe, 21, *parts))
    assert np.array_equal(made.frames, plain) == (not parts) and len(made.reports) == len(parts)
    assert np.array_equal(direct(pipe, 21), plain)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.named_buffers())


def test_lengths_batches_and_settings(pipe):
    made = extend_video(
        pipe, ["a red circle", "a blue square"], 1.5, generator=noise(), num_inference_steps=1, height=32
    )
    assert made.frames.shape == (2, 9, 32, 32, 3)
    assert made.reports[0].pattern["train_frames"] == 2
    assert extend_video(pipe, "a red circle", 1, generator=noise()).reports == []
    made = extend_video(pipe, "a red circle", 2, "pi", train_frames=3, num_inference_steps=1)
    assert made.frames.shape[1] == 21 and made.reports[0].denoisers[0]["trained"] == {"t": 3}
    made = extend_video(pipe, "a red circle", 2, PI(train_frames=3), num_inference_steps=1)
    assert made.frames.shape[1] == 21


def test_cogvideox_brings_its_tables_as_an_argument():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel, DDIMScheduler
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = tokenizer()
    text = T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    denoiser = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipe = CogVideoXPipeline(words, T5EncoderModel(text).eval(), vae, denoiser, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 8}
    clips = {}
    for method in ("none", "riflex", "ultravico"):
        made = extend_video(pipe, "a red circle", 3, method, generator=noise(), **call)
        assert made.frames.shape == (1, 33, 32, 32, 3)
        clips[method] = made.frames
    assert not any(np.array_equal(clips["none"], clips[method]) for method in ("riflex", "ultravico"))
    (denoiser,) = extend_video(pipe, "a red circle", 2, "pi", generator=noise(), **call).reports[0].denoisers
    assert (denoiser["trained"], denoiser["grid"], denoiser["changed"]) == ({"t": 3}, [6, 2, 2], 2)


def test_pictures_and_embeddings_instead_of_texts(pipe):
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from PIL import Image

    torch.manual_seed(0)
    denoiser = WanTransformer3DModel(**{**pipe.transformer.config, "in_channels": 36, "num_layers": 1}).eval()
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    animate = WanImageToVideoPipeline(**parts, transformer=denoiser, image_encoder=None, image_processor=None)
    animate.set_progress_bar_config(disable=True)
    call = {**CALL, "image": Image.new("RGB", (32, 16), "red"), "train_frames": 2}
    plain, edited = (extend_video(animate, "a circle", 2, way, generator=noise(), **call) for way in ("none", "ntk"))
    assert plain.frames.shape == edited.frames.shape == (1, 13, 16, 32, 3)
    assert not np.array_equal(plain.frames, edited.frames)
    text = torch.zeros(1, 16, 96)
    embedded = {"prompt_embeds": text, "negative_prompt_embeds": text}
    assert extend_video(pipe, None, 2, **embedded).frames.shape == (1, 13, 16, 32, 3)
    with pytest.raises(TypeError, match="or None beside prompt_embeds; got 'a circle'"):
        extend_video(pipe, "a circle", 2, **embedded)


def test_frames_of_published_models():
    """(F0 s - 1) c + 1 with each family's compression of time."""
    cog = {"block_out_channels": [1] * 4, "temporal_compression_ratio": 4}
    cases = {
        "WanTransformer3DModel": ({}, {}, 81, 21, 249),
        "HunyuanVideoTransformer3DModel": ({}, {"patch_size_t": 1}, 129, 33, 393),
        "CogVideoXTransformer3DModel": (cog, {}, 49, 13, 153),
    }
    for name, (vae, net, frames, tokens, tripled) in cases.items():
        token = FAMILIES[name].token(vae, net)
        assert (tokens_of(token, frames), frames_of(token, 3 * tokens)) == (tokens, tripled)
    two = FAMILIES["CogVideoXTransformer3DModel"].token(cog, {"patch_size_t": 2})
    assert (tokens_of(two, 81), frames_of(two, 22)) == (11, 173)  # 22 frames of 2 latent ones


def test_names():
    assert extension("ultravico", 4) == (UltraViCo(times=4),)
    assert extension("none", 4) == extension("pi", 1) == ()
    assert {type(extension(name, 2)[0]).name for name in EXTENDERS if name != "none"} == {*EXTENDERS} - {"none"}


def test_refusals(pipe):
    draw = "a red circle"
    wrong = [
        ((draw, 0.5), {}, ValueError, "times must be at least 1"),
        ((draw, math.nan), {}, ValueError, "times must be at least 1"),
        ((draw, None), {}, TypeError, "times must be a number"),
        ((draw, 2, "longer"), {}, ValueError, "no way 'longer' to extend a video; allowed: ultravico, riflex"),
        ((draw, 2, 7), {}, TypeError, "or what attach\\(\\) takes; got 7"),
        ((draw, 2), {"num_frames": 9}, TypeError, "leave num_frames out"),
        ((draw, 2), {"output_type": "pil"}, TypeError, "returns arrays"),
        ((5, 2), {}, TypeError, "prompt must be a text"),
        ((draw, 400), {}, ValueError, "has positions for 256 latent frames; got 800"),
        ((draw, 2, (PI(), NTK())), {}, ValueError, "already has PI"),
        ((draw, 2, (UltraViCo(), Neighborhood(window=2))), {}, ValueError, "already has LengthDecay"),
        ((draw, 2), {"height": 17}, ValueError, "divisible by"),
    ]
    before = direct(pipe, 9)
    for arguments, options, error, message in wrong:
        with pytest.raises(error, match=message):
            extend_video(pipe, *arguments, **options)
    with pytest.raises(TypeError, match="needs a pipeline, not its denoiser"):
        extend_video(pipe.transformer, draw)
    encoder, pipe.text_encoder = pipe.text_encoder, None
    with pytest.raises(ValueError, match="no text encoder"):
        extend_video(pipe, draw)
    pipe.text_encoder = encoder
    assert np.array_equal(direct(pipe, 9), before)
    flux = SimpleNamespace(components={}, transformer=MODELS["FluxTransformer2DModel"].build())
    with pytest.raises(ValueError, match="extend_video is for videos, and FluxTransformer2DModel makes images"):
        extend_video(flux, draw)


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 5, 7, 3), dtype=np.uint8)


def test_no_repeat_counts_repeated_frames():
    start = clip(12)
    whole = np.concatenate([start, start])
    assert no_repeat(whole, 12) == 0 and no_repeat(whole, 12, variant="riflex") == 0
    assert no_repeat(clip(24), 12) == 100 and no_repeat(clip(24), 12, variant="riflex", threshold=90) == 100
    part = whole.copy()
    part[15:] = clip(9, seed=1)  # 3 of 12 frames are shown again
    assert no_repeat(part, 12) == 75.0
    late = np.concatenate([start, clip(2, seed=2), start])  # the beginning comes back 2 frames after the period
    assert no_repeat(late, 12) == 0 and no_repeat(late, 18) == 0 and no_repeat(late, 20) == 100
    far = np.concatenate([start, clip(8, seed=2), start])  # and here later than it is looked for
    assert no_repeat(far, 12) == 100
    assert no_repeat(np.stack([whole, clip(24)]), 12) == 50.0
    assert no_repeat((part / 255).astype(np.float32), 12) == 75.0


def test_no_repeat_leaves_out_what_stands_still():
    still = np.repeat(clip(1), 24, 0)
    assert no_repeat(still, 12) is None
    assert no_repeat(np.stack([still, clip(24)]), 12) == 100.0
    assert no_repeat(np.stack([still, clip(24)]), 12, variant="riflex", threshold=90) == 50.0


def test_no_repeat_thresholds_are_distances_on_the_scale_of_bytes():
    video = np.zeros((20, 4, 4, 3), np.uint8)
    video[:10] = np.arange(10)[:, None, None, None] * 20
    video[10:] = video[:10] + 54
    assert no_repeat(video, 10, threshold=53.9) == 100 and no_repeat(video, 10, threshold=54) == 0
    assert no_repeat(video, 10) == 0  # 55
    assert no_repeat(video, 10, variant="riflex", threshold=53.9) == 100
    assert no_repeat(video, 10, variant="riflex") == 0


def test_no_repeat_refusals():
    with pytest.raises(ValueError, match="no variant 'paper'; allowed: ultravico, riflex"):
        no_repeat(clip(8), 4, variant="paper")
    with pytest.raises(TypeError, match=r"must be \[batch, frames, height, width, 3\]"):
        no_repeat(clip(8)[..., :2], 4)
    with pytest.raises(TypeError, match="int64"):
        no_repeat(clip(8).astype(np.int64), 4)
    for period in (0, 8):
        with pytest.raises(ValueError, match="below the 8 frames"):
            no_repeat(clip(8), period)
