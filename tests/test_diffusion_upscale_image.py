"""upscale_image on tiny random models: its stages, what is attached in them, and what it refuses."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from vision_attn import Dense, Neighborhood  # noqa: E402
from vision_attn.diffusion import CLEAR, LinFusion, tiny_image, upscale_image  # noqa: E402
from vision_attn.diffusion.image_stages import stage_sizes  # noqa: E402

SHORT = dict(steps=2, max_sequence_length=16)


@pytest.fixture(scope="module")
def flux():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return tiny_image.flux()


@pytest.fixture(scope="module")
def unet():
    return tiny_image.stable_diffusion()


def test_sizes_grow_evenly_and_end_at_the_target():
    assert stage_sizes((64, 64), (128, 128), 2.0, 8) == [(128, 128)]
    assert stage_sizes((64, 64), (512, 512), 2.0, 8) == [(128, 128), (256, 256), (512, 512)]
    assert stage_sizes((64, 64), (520, 64), 2.0, 8) == [(112, 64), (184, 64), (304, 64), (520, 64)]
    assert stage_sizes((64, 64), (64, 64), 2.0, 8) == [(64, 64)]
    for base, target in (((50, 70), (400, 330)), ((30, 30), (90, 300))):
        sizes = [base, *stage_sizes(base, target, 3.0, 10)]
        assert sizes[-1] == target
        for small, large in zip(sizes, sizes[1:], strict=False):  # rounding to tokens may add half a token
            assert all(one <= two <= 3 * one + 10 for one, two in zip(small, large, strict=True))


def test_from_a_prompt_with_clear(flux):
    """The published settings: ntk, flow shift and proportional attention while it runs, nothing of it afterwards."""
    scheduler, theta, seen = flux.scheduler, flux.transformer.pos_embed.theta, []
    hook = flux.transformer.register_forward_pre_hook(
        lambda m, a, k: seen.append((m.pos_embed.theta, k["timestep"])), with_kwargs=True
    )
    steps = []
    out = upscale_image(
        flux, ["a red circle", "a blue cross"], 96, 96, base_size=(48, 48), progress=lambda *n: steps.append(n),
        generator=torch.Generator().manual_seed(0), steps=4, max_sequence_length=16,
    )  # fmt: skip
    hook.remove()
    assert [stage.shape for stage in out.stages] == [(2, 48, 48, 3), (2, 96, 96, 3)] and out.images is out.stages[-1]
    assert out.report.options == {"temperature": "proportional", "train_tokens": 4608, "ntk": 10}
    assert steps == [(1, 3), (2, 3), (3, 3)]  # 0.7 of 4 steps
    assert [t for t, _ in seen] == [theta] * 4 + [10 * theta] * (len(seen) - 4)
    assert flux.scheduler is scheduler and flux.transformer.pos_embed.theta == theta
    levels = [t[0].item() for _, t in seen[4:]]
    assert np.allclose(levels, [10 * s / (1 + 9 * s) for s in (0.75, 0.5, 0.25)], atol=1e-3)  # a shift of 10


def test_an_image_goes_through_every_stage(flux):
    small = np.random.default_rng(0).random((48, 48, 3), np.float32)
    attached = upscale_image(
        flux,
        small,
        96,
        192,
        prompt="a red circle",
        method=CLEAR(2, 3),
        generator=torch.Generator().manual_seed(1),
        **SHORT,
    )
    assert [stage.shape[1:3] for stage in attached.stages] == [(48, 48), (72, 96), (96, 192)]
    assert np.array_equal(attached.stages[0][0], small)
    assert attached.report.denoisers[0].grids == [[12, 24]]  # the last met
    dense = upscale_image(
        flux, small, 96, 192, prompt="a red circle", method=Dense(), generator=torch.Generator().manual_seed(1), **SHORT
    )
    assert not np.array_equal(dense.images, attached.images)


def test_a_unet_with_linear_attention(unet):
    small, steps = np.zeros((2, 48, 48, 3), np.uint8), []
    out = upscale_image(
        unet, small, 96, 96, prompt="a red circle", method=LinFusion(), steps=3, progress=lambda *n: steps.append(n)
    )
    assert steps == [(1, 2), (2, 2)]
    assert out.images.shape == (2, 96, 96, 3) and "linear" in str(out.report)
    options = dict(method=Dense(), steps=2, base_size=(48, 48), negative_prompt="a blue square")
    assert upscale_image(unet, ["a red circle"] * 2, 96, 96, **options).images.shape == (2, 96, 96, 3)
    with pytest.raises(ValueError, match="a U-Net needs method="):
        upscale_image(unet, small, 96, 96, prompt="a red circle")
    with pytest.raises(ValueError, match="strength=0.2 of 4 steps is less than one step"):
        upscale_image(unet, small, 96, 96, 0.2, prompt="a red circle", method=Dense(), steps=4)


def test_what_is_refused(flux):
    small = np.zeros((48, 48, 3), np.uint8)
    good = dict(prompt="a red circle", **SHORT)
    cases = [
        ((small, 96, 90), good, ValueError, "width must be a multiple of 8 pixels"),
        ((small, 96, 88), good | {"method": CLEAR(2, 3)}, ValueError, "width must be a multiple of 24 pixels"),
        ((small, 40, 96), good, ValueError, "height=40 is smaller than the 48 pixels"),
        ((small, 96, 96), SHORT, ValueError, "needs the prompt"),
        ((small, 96, 96), good | {"prompt": ["a", "b"]}, ValueError, "2 prompts for 1 images"),
        (("a red circle", 96, 96), good, TypeError, "given twice"),
        ((small[..., 0], 96, 96), good, TypeError, r"an image must be \[height, width, 3\]"),
        ((small * 1.0 + 7, 96, 96), good, ValueError, "must hold numbers from 0 to 1"),
        ((small, 96, 96), good | {"strength": 0}, ValueError, "strength above 0"),
        ((small, 96, 96), good | {"factor": 1.0}, ValueError, "factor must be a number above 1"),
        ((small, 96, 96), good | {"method": "clear"}, TypeError, "method must be a method or a pattern"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            upscale_image(flux, *given, **options)
    with pytest.raises(TypeError, match="runs pipelines of FLUX and Stable Diffusion; got Linear"):
        upscale_image(torch.nn.Linear(1, 1), small, 96, 96, **good)
    encoder, flux.text_encoder = flux.text_encoder, None
    try:
        with pytest.raises(ValueError, match="no text encoder"):
            upscale_image(flux, small, 96, 96, **good)
    finally:
        flux.text_encoder = encoder


def test_a_failure_in_a_stage_leaves_no_trace(flux):
    small = np.zeros((48, 48, 3), np.uint8)

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_image(flux, small, 96, 96, prompt="a red circle", method=Neighborhood(window=3), progress=fail, **SHORT)
    hooks = [m._diffusers_hook.hooks for m in flux.transformer.modules() if hasattr(m, "_diffusers_hook")]
    assert not any(hooks) and not hasattr(flux.transformer, "_vision_attn_held")
