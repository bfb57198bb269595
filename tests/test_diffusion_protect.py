"""Posterior collapse: the score against the divergence it stands for, the steps against a loop, and what it does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from vision_attn.diffusion.loading import load  # noqa: E402
from vision_attn.diffusion.protect import collapse_score, posterior, protect_image  # noqa: E402
from vision_attn.shapes import render, sample_scene  # noqa: E402


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).eval()


@pytest.fixture(scope="module")
def shapes_vae():
    return load().pipe.vae


def psnr(a, b):
    return float(-10 * torch.log10((a - b).square().mean()))


@pytest.mark.parametrize("variance", [1e-2, 1.0, torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) + 0.5])
def test_the_score_is_a_divergence(variance):
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    variance = torch.as_tensor(variance).double()
    own = torch.distributions.Normal(mean, logvar.exp().sqrt())
    other = torch.distributions.Normal(torch.zeros_like(mean), variance.sqrt().expand_as(mean))
    # KL = -score + half the log variance of the target per number
    expected = 0.5 * variance.log().expand_as(mean).sum() - torch.distributions.kl_divergence(own, other).sum()
    torch.testing.assert_close(collapse_score(mean, logvar, variance), expected)


@pytest.mark.parametrize("variance, away", [(1e-8, False), (0.5, False), (None, False), (1e-8, True)])
def test_steps_are_those_of_a_plain_loop(vae, variance, away):
    torch.manual_seed(1)
    image, eps, step = torch.rand(2, 3, 12, 20), 0.02, 0.008
    x = image.clone()
    moments = lambda x: vae.quant_conv(vae.encoder(2 * x - 1)).chunk(2, 1)  # noqa: E731
    with torch.no_grad():
        target = 1.0 if away else moments(image)[1].exp() if variance is None else variance
    for _ in range(4):
        x = x.detach().requires_grad_()
        mean, logvar = moments(x)
        score = 0.5 * (1 + logvar - (mean**2 + logvar.exp()) / target).sum()
        (-score if away else score).backward()
        with torch.no_grad():
            x = (x + step * x.grad.sign()).clamp(image - eps, image + eps).clamp(0, 1)
    vae.zero_grad()
    found = protect_image(vae, image, eps=eps, step=step, iterations=4, variance=variance, away=away)
    # where a gradient is zero up to rounding its sign may differ
    assert ((found - x).abs() < 1e-6).float().mean() > 0.999
    assert (found - image).abs().max() <= eps + 1e-6 and not torch.equal(found, image)


def test_the_weights_stay_as_they_were(vae):
    before = {name: (p.clone(), p.requires_grad, p.grad) for name, p in vae.named_parameters()}
    next(vae.parameters()).requires_grad_(False)
    protect_image(vae, torch.rand(3, 8, 8), iterations=1)
    flags = [p.requires_grad for p in vae.parameters()]
    assert not flags[0] and all(flags[1:])
    next(vae.parameters()).requires_grad_(True)
    for name, p in vae.named_parameters():
        assert torch.equal(p, before[name][0]) and p.grad is None


def test_whole_numbers_stay_within_the_budget(vae):
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    found = protect_image(vae, array, iterations=10)
    change = found.astype(int) - array
    assert found.dtype == np.uint8 and found.shape == array.shape and np.abs(change).max() == 16
    picture = protect_image(vae, Image.fromarray(array), iterations=10)
    assert isinstance(picture, Image.Image) and np.array_equal(np.asarray(picture), found)
    gray = protect_image(vae, Image.fromarray(array[..., 0]), iterations=1)
    assert gray.mode == "RGB"


def test_half_precision_is_finite(vae):
    import copy

    half = copy.deepcopy(vae).bfloat16()
    image = torch.rand(1, 3, 16, 16)
    found = protect_image(half, image, iterations=2)
    assert found.dtype == torch.float32 and found.isfinite().all() and not torch.equal(found, image)


def frames(count):
    rng = np.random.default_rng(0)
    return torch.stack([torch.from_numpy(render(sample_scene(rng))[0]).permute(2, 0, 1).float() for _ in range(count)])


def rebuilt(vae, pixels):
    with torch.no_grad():
        return (vae.decode(vae.encode(2 * pixels[:, :, None] - 1).latent_dist.mean).sample[:, :, 0] + 1) / 2


def test_it_collapses_the_latents_of_the_shapes_vae_far_more_than_noise_does(shapes_vae):
    image, eps = frames(4), 16 / 255
    found = protect_image(shapes_vae, image, eps=eps, iterations=15)
    noisy = (image + eps * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    with torch.no_grad():
        clean, noise, protected = (posterior(shapes_vae, x)[0].norm() for x in (image, noisy, found))
    assert protected < 0.93 * min(clean, noise)
    plain = rebuilt(shapes_vae, image)
    assert psnr(rebuilt(shapes_vae, found), plain) < psnr(rebuilt(shapes_vae, noisy), plain) - 3
    pushed = protect_image(shapes_vae, image, eps=eps, iterations=15, away=True)
    with torch.no_grad():
        assert posterior(shapes_vae, pushed)[0].norm() > 1.03 * max(clean, noise)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(eps=0), "eps must be a number above 0"),
        (dict(eps=2.0), "eps must be .* at most 1"),
        (dict(step=-1), "step must be"),
        (dict(iterations=0), "iterations must be an int of at least 1"),
        (dict(variance=math.nan), "variance must be"),
        (dict(away=True, variance=1.0), "variance does not apply"),
        (dict(image=torch.rand(3, 8, 9)), "8 x 9 pixels; AutoencoderKL needs multiples of 2"),
        (dict(image=torch.rand(8, 8)), "a tensor must be"),
        (dict(image=torch.rand(3, 8, 8) * 255), "pixels must be in 0..1"),
        (dict(image=np.zeros((8, 8, 3))), "an array must be uint8"),
        (dict(image=np.zeros((8, 8, 3), np.uint8), eps=0.001), "less than one level"),
        (dict(image="cat.png"), "image must be a tensor, a PIL image"),
        (dict(vae=torch.nn.Linear(2, 2)), "vae must be a VAE of diffusers"),
    ],
)
def test_bad_input(vae, changes, message):
    call = {"vae": vae, "image": torch.rand(3, 8, 8), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        protect_image(**call)


def test_an_autoencoder_without_a_posterior():
    with pytest.raises(ValueError, match="AutoencoderTiny gives no mean and variance"):
        protect_image(diffusers.AutoencoderTiny(), torch.rand(3, 64, 64))
