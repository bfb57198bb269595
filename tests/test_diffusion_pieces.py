"""Pieces of a video, of its latents and of its tokens put together are the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers.models.attention import FeedForward  # noqa: E402

from vision_attn.diffusion import extend_video  # noqa: E402
from vision_attn.diffusion.loading import load  # noqa: E402
from vision_attn.diffusion.pieces import TOKENS, decode, encode, feed_forward_in_pieces  # noqa: E402


@pytest.fixture(scope="module")
def pipe():
    pipe = load(device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiles(monkeypatch, vae, tile: int, stride: int) -> None:
    for side in ("height", "width"):
        monkeypatch.setattr(vae, f"tile_sample_min_{side}", tile)
        monkeypatch.setattr(vae, f"tile_sample_stride_{side}", stride)


def test_one_piece_is_what_the_pipeline_does(pipe):
    call = dict(height=48, width=64, num_frames=5, num_inference_steps=1, max_sequence_length=16)
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    with torch.no_grad():
        expected = pipe("a red circle", generator=seeded(), output_type="np", **call).frames
        latents = pipe("a red circle", generator=seeded(), output_type="latent", **call).frames
        np.testing.assert_allclose(decode(pipe, latents), expected, atol=1e-6)
        two = decode(pipe, torch.cat([latents, latents.flip(-1)]))
    assert two.shape == (2, 5, 48, 64, 3)
    np.testing.assert_allclose(two[0], expected[0], atol=1e-6)


def test_an_enlarged_video_is_encoded_as_one(pipe):
    video = np.random.default_rng(0).random((2, 5, 20, 31, 3), dtype=np.float32)
    pixels = [F.interpolate(torch.from_numpy(clip).permute(0, 3, 1, 2), (48, 64), mode="bilinear") for clip in video]
    vae = pipe.vae
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        modes = [vae.encode(clip.permute(1, 0, 2, 3)[None] * 2 - 1).latent_dist.mode() for clip in pixels]
        found = encode(pipe, video, 48, 64)
    torch.testing.assert_close(found, (torch.cat(modes) - mean) / std, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tile, stride", [(32, 24), (32, 32), (24, 8), (40, 24), (16, 8)])
def test_tiles_add_up(pipe, monkeypatch, tile, stride):
    """A VAE that only changes the size makes visible how tiles are laid and weighed: together they are the whole."""
    tiles(monkeypatch, pipe.vae, tile, stride)
    seen = []

    def enlarge(z, **_):
        seen.append(z.shape[-2:])
        return (z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2),)

    class Small:
        def __init__(self, x):
            seen.append(x.shape[-2:])
            self.latent_dist, self.pixels = self, x

        def mode(self):
            return F.avg_pool3d(self.pixels, (1, 8, 8)).repeat(1, 6, 1, 1, 1)[:, :16]

    monkeypatch.setattr(pipe.vae, "decode", enlarge)
    monkeypatch.setattr(pipe.vae, "encode", Small)
    latents = torch.randn(1, 16, 1, 9, 13, generator=torch.Generator().manual_seed(0)) * 0.1
    video = np.random.default_rng(0).random((1, 1, 20, 31, 3), dtype=np.float32)
    for call in (lambda on: decode(pipe, latents, on), lambda on: encode(pipe, video, 72, 104, on).numpy()):
        np.testing.assert_allclose(call(True), call(False), atol=1e-5)
        whole, most = seen.pop(), max(map(max, seen))
        assert max(whole) > most and len(seen) > 3, seen
        seen.clear()


def test_feed_forward_layers_take_some_tokens_at_a_time():
    layer = FeedForward(8, activation_fn="gelu-approximate").eval()
    seen = []
    layer.net[0].register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    x = torch.randn(2, 2 * TOKENS + 5, 8)
    with torch.no_grad():
        whole = layer(x)
        with feed_forward_in_pieces(torch.nn.ModuleList([layer])):
            assert torch.allclose(layer(x), whole, atol=1e-6)
        assert seen == [2 * TOKENS + 5, TOKENS, TOKENS, 5] and "forward" not in vars(layer)
    with feed_forward_in_pieces(layer):  # gradients need the whole layer
        assert layer(x).requires_grad and seen[-1] == x.shape[1]


def test_a_longer_video_is_decoded_in_tiles_where_the_vae_is_set_so(pipe, monkeypatch):
    tiles(monkeypatch, pipe.vae, 32, 24)
    seen, whole = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **k: seen.append(tuple(z.shape[2:])) or whole(z, **k))
    call = dict(times=1, num_inference_steps=1, guidance_scale=1.0)
    made = [extend_video(pipe, "a red circle", generator=torch.Generator().manual_seed(0), **call).frames]
    monkeypatch.setattr(pipe.vae, "use_tiling", True)
    made.append(extend_video(pipe, "a red circle", generator=torch.Generator().manual_seed(0), **call).frames)
    assert seen == [(5, 6, 6), (5, 4, 4), (5, 4, 3), (5, 3, 4), (5, 3, 3)]
    assert 0 < np.abs(made[0] - made[1]).max() < 0.5
