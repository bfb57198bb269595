"""Images larger than the model was trained on: a small one is enlarged, noised and denoised again, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vision_attn.diffusion.attachment import attach, denoisers
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.methods.clear import CLEAR
from vision_attn.diffusion.pixels import as_pixels, counting, finite
from vision_attn.kernels.patterns import Pattern

# CLEAR's published settings for FLUX.1: 64 x 64 image and 512 text tokens, rotary base and flow shift times ten.
PUBLISHED = {"temperature": "proportional", "train_tokens": 64 * 64 + 512}
FLOW_SHIFT = 10.0


@dataclasses.dataclass(frozen=True)
class UpscaledImage:
    """Large images and what they were made from.

    Args:
        images: `[batch, height, width, 3]`, float32 from 0 to 1.
        stages: the small images, then those of every stage; the last entry is `images`.
        report: of what was attached in the last stage.
    """

    images: np.ndarray
    stages: list[np.ndarray]
    report: Any


def upscale_image(
    pipe: Any,
    image_or_prompt: Any,
    height: int,
    width: int,
    strength: float = 0.7,
    *,
    prompt: str | list[str] | None = None,
    method: Method | Pattern | None = None,
    options: dict[str, Any] | None = None,
    base_size: tuple[int, int] | None = None,
    factor: float = 2.0,
    steps: int = 20,
    guidance: float = 7.5,
    generator: torch.Generator | None = None,
    progress: bool | Callable[[int, int], None] = False,
    **call: Any,
) -> UpscaledImage:
    """Make an image of `height` x `width` pixels with FLUX or Stable Diffusion, beyond the size it was trained on.

    An image of the training size is drawn from the prompt (or taken as given). Then, until the size is reached: enlarge
    it, add noise, and run the last `strength` of the steps again with `method` attached.

    Args:
        pipe: a pipeline of FLUX, Stable Diffusion 1.5, 2.1 or XL, from text or from image.
        image_or_prompt: a prompt or a list of prompts; or an image `[h, w, 3]` or a batch of them `[batch, h, w, 3]`,
            numbers from 0 to 1 or uint8, as array, tensor, PIL image or list of PIL images.
        height: pixels; whole tokens, and whole cells where `method` pools tokens. Not below the small image's.
        width: the same.
        strength: share of the steps that run again, above 0, up to 1. More adds detail, less keeps to the small image.
        prompt: for an image that is given.
        method: None is `CLEAR(radius=16, ntk=10)` with proportional attention for FLUX.1, as published but for trained
            weights, which you give as `CLEAR(..., weights=file)`. A U-Net needs one, such as `LinFusion(weights=file)`.
        options: of `attach`, beside the method.
        base_size: `(height, width)` in pixels of the small image; None is the pipeline's own.
        factor: largest enlargement of a side in one stage, above 1.
        steps: of the whole schedule, in every stage.
        guidance: strength of the prompt in the stages; the small image is drawn with the pipeline's own.
        generator: of the noise.
        progress: True for a bar on stderr, or a function of (steps done, steps in all).
        call: more arguments of the pipeline's calls, such as `max_sequence_length`.

    Returns:
        An `UpscaledImage`: `images`, `stages` and `report`.

    Raises:
        TypeError: not such a pipeline; an image of another form.
        ValueError: sizes that do not make whole tokens or shrink the image, a U-Net without a method, no text encoder.
        RuntimeError: the model produced numbers that are no picture.

    >>> from vision_attn.diffusion.tiny_image import flux
    >>> pipe = flux()
    >>> small = np.zeros((48, 48, 3), np.uint8)
    >>> options = dict(prompt="a red circle", method=CLEAR(radius=3), steps=2, max_sequence_length=16)
    >>> [stage.shape for stage in upscale_image(pipe, small, 96, 192, **options).stages]
    [(1, 48, 48, 3), (1, 64, 96, 3), (1, 96, 192, 3)]

    Papers: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up; LinFusion: 1 GPU, 1 Minute, 16K
    Image.
    """
    draw, again, flow = _pipelines(pipe)
    if method is None and not flow:
        raise ValueError("a U-Net needs method=, such as LinFusion(weights=file), or Dense() for the untouched model")
    if method is None:
        method, options = CLEAR(radius=16, ntk=10), {**PUBLISHED, **(options or {})}
    if not isinstance(method, (Method, Pattern)):
        raise TypeError(f"method must be a method or a pattern; got {method!r}")
    if type(steps) is not int or steps < 1 or isinstance(strength, bool) or not 0 < strength <= 1:
        raise ValueError(f"steps must be at least 1 and strength above 0, at most 1; got {steps!r} and {strength!r}")
    run = steps - int(steps - steps * strength) if flow else int(steps * strength)  # as their pipelines round
    if not run:
        raise ValueError(f"strength={strength} of {steps} steps is less than one step; raise either")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor < math.inf:
        raise ValueError(f"factor must be a number above 1; got {factor!r}")

    prompts, small = _prompts_and_images(pipe, image_or_prompt, prompt)
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    whole = pipe.vae_scale_factor * (2 if flow else 1) * (getattr(method, "pooled", None) or 1)
    side = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    base = base_size or (side * pipe.vae_scale_factor,) * 2
    sizes = stage_sizes(base if small is None else small.shape[1:3], (height, width), factor, whole)

    with torch.no_grad(), _tiled(pipe.vae):
        if small is None:
            small = draw(
                prompts, height=base[0], width=base[1], num_inference_steps=steps, output_type="np",
                generator=generator, **call,
            ).images  # fmt: skip
        stages, total, report = [finite(small, pipe)], run * len(sizes), None
        with counting(progress, total) as count, attach(again, method, **(options or {})) as attached:
            for i, size in enumerate(sizes):

                def after(pipe: Any, step: int, timestep: Any, tensors: dict, done: int = i * run) -> dict:
                    count(done + step + 1)
                    return {}

                large = F.interpolate(
                    torch.from_numpy(stages[-1]).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True
                ).clamp(0, 1)
                where = dict(zip(("height", "width"), size, strict=True)) if flow else {}
                images = again(
                    prompts, image=large, strength=strength, num_inference_steps=steps, guidance_scale=guidance,
                    output_type="np", generator=generator, callback_on_step_end=after, **where, **call,
                ).images  # fmt: skip
                stages.append(finite(images, pipe))
            report = attached.report
    return UpscaledImage(stages[-1], stages, report)


def stage_sizes(base: tuple[int, int], target: tuple[int, int], factor: float, whole: int) -> list[tuple[int, int]]:
    """Sizes of the stages: as few as `factor` allows, growing evenly, in multiples of `whole` pixels.

    >>> stage_sizes((1024, 1024), (4096, 2048), factor=2.0, whole=16)
    [(2048, 1456), (4096, 2048)]
    """
    for name, size, least in zip(("height", "width"), target, base, strict=True):
        if type(size) is not int or size < 1 or size % whole:
            raise ValueError(f"{name} must be a multiple of {whole} pixels, whole tokens and cells; got {size!r}")
        if size < least:
            raise ValueError(f"{name}={size} is smaller than the {least} pixels of the small image; this only enlarges")
    ratios = [large / small for large, small in zip(target, base, strict=True)]
    count = max(1, math.ceil(math.log(max(ratios)) / math.log(factor) - 1e-9))
    sizes = [
        tuple(round(small * ratio ** (i / count) / whole) * whole for small, ratio in zip(base, ratios, strict=True))
        for i in range(1, count)
    ]
    return [*sizes, tuple(target)]


def _pipelines(pipe: Any) -> tuple[Any, Any, bool]:
    """The pipeline that draws, the one that draws again (with a scheduler of its own), and whether it is FLUX."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

    modules = denoisers(pipe)[1] if isinstance(getattr(pipe, "components", None), dict) else {}
    names = [cls.__name__ for module in modules.values() for cls in type(module).__mro__]
    flow = "FluxTransformer2DModel" in names
    if not flow and "UNet2DConditionModel" not in names:
        raise TypeError(f"upscale_image runs pipelines of FLUX and Stable Diffusion; got {type(pipe).__name__}")
    try:
        draw, again = (auto.from_pipe(pipe) for auto in (AutoPipelineForText2Image, AutoPipelineForImage2Image))
    except ValueError as error:
        raise TypeError(f"{type(pipe).__name__} has no partner that starts from an image: {error}") from error
    for each in (draw, again):
        each.set_progress_bar_config(disable=True)
    if flow:
        scheduler = pipe.scheduler
        again.scheduler = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False, shift=FLOW_SHIFT)
    return draw, again, flow


def _prompts_and_images(pipe: Any, given: Any, prompt: Any) -> tuple[list[str], np.ndarray | None]:
    texts = isinstance(given, str) or (isinstance(given, (list, tuple)) and given and isinstance(given[0], str))
    if texts and prompt is not None:
        raise TypeError("a prompt was given twice; prompt= goes with an image")
    text, images = (given, None) if texts else (prompt, as_pixels(given, "image"))
    if text is None:
        raise ValueError("an image needs the prompt that it is drawn from again; give prompt=...")
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"this {type(pipe).__name__} has no text encoder to read the prompt; load it with one")
    prompts = [text] if isinstance(text, str) else list(text)
    if images is not None and len(prompts) == 1:
        prompts *= len(images)
    if images is not None and len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images; give one, or one each")
    return prompts, images


@contextlib.contextmanager
def _tiled(vae: Any):
    """Decode in tiles what an `AutoencoderKL` finds large; the tiny autoencoder's tiles are made for one scale only."""
    before = getattr(vae, "use_tiling", None)
    if type(vae).__name__ == "AutoencoderKL":
        vae.use_tiling = True
    try:
        yield
    finally:
        if before is not None:
            vae.use_tiling = before
