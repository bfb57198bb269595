"""Videos larger than the model was trained on: a small one is enlarged, noised, and denoised again with FreeSwim."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_attn.diffusion.attachment import attach, denoisers
from vision_attn.diffusion.checkpoint import Checkpoint, states
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.methods.freeswim import FreeSwim
from vision_attn.diffusion.native import Native, native
from vision_attn.diffusion.pieces import decode, encode, feed_forward_in_pieces
from vision_attn.diffusion.pixels import as_pixels, counting, finite
from vision_attn.diffusion.restart import shifted, skip_steps
from vision_attn.kernels.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Upscaled:
    """A large video and the small one it was made from.

    Args:
        frames: `[batch, frames, height, width, 3]`, float32 from 0 to 1.
        base: the same at the size it was given or drawn.
        report: of what was attached; None where nothing was.
    """

    frames: np.ndarray
    base: np.ndarray
    report: Any


def upscale_video(
    pipe: Any,
    video_or_prompt: Any,
    height: int,
    width: int,
    strength: float = 0.7,
    cache_steps: int | None = 2,
    *,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    method: Method | Pattern | None = None,
    base_size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    tiling: bool = True,
    checkpoint: str | Path | None = None,
    progress: bool | Callable[[int, int], None] = False,
    **call: Any,
) -> Upscaled:
    """Make a video of `height` x `width` pixels with a Wan pipeline, beyond the size its model was trained on.

    A video of the training size is drawn from the prompt (or taken as given), enlarged, encoded, noised, and the last
    `strength` of the denoising steps run again on it at the new size, with FreeSwim attached.

    Args:
        pipe: a `WanPipeline` or `WanImageToVideoPipeline`, or one that derives from them.
        video_or_prompt: a prompt or a list of prompts; or a video `[frames, h, w, 3]`, or a batch of them `[batch,
            frames, h, w, 3]`, numbers from 0 to 1 or uint8, as array, tensor or list of PIL images.
        height: pixels, whole tokens of the model (16 for Wan2.1), not below the small video's.
        width: the same.
        strength: share of the steps that run again, above 0, up to 1. More adds detail, less keeps to the small video.
        cache_steps: every how many steps the global copy of FreeSwim is computed; None: always, both guidance calls.
        prompt: for a video that is given.
        negative_prompt: what to keep out; None is words for repetition and low detail for Wan2.1, else nothing.
        method: what to attach instead of `FreeSwim(cache_steps=cache_steps)`; `Dense()` is the untouched model.
        base_size: `(height, width)` in pixels that the model was trained on, where that is not known.
        frames: of the small video; None is the number of the model.
        steps: of the whole schedule; None is the number of the model.
        guidance: strength of the prompt; None is that of the model.
        shift: flow shift of the second pass; None is 9 for Wan2.1 as published, else the scheduler's own.
        generator: of the noise.
        tiling: encode and decode in tiles where the VAE's `tile_sample_*` find the video large, and run feed-forward
            layers on some tokens at a time, for less memory.
        checkpoint: folder in which the state is kept after every refresh of the global copy, to go on from there when
            the same call is made again after an interruption; emptied at the end.
        progress: True for a bar on stderr, or a function of (steps done, steps in all).
        call: more arguments of the pipeline's call, such as `image` for image-to-video (by default the first frame of a
            video that is given) or `max_sequence_length`.

    Returns:
        An `Upscaled`: `frames`, `base` and `report`.

    Raises:
        TypeError: not a Wan pipeline; a video of another form.
        ValueError: sizes that do not make whole tokens or shrink the video, a number of frames that does not fit, a
            training size that is not known, a pipeline without text encoder, a checkpoint of another call.
        RuntimeError: the model produced numbers that are no picture.

    >>> from vision_attn.diffusion.loading import load
    >>> pipe = load(device="cpu").pipe
    >>> pipe.set_progress_bar_config(disable=True)
    >>> small = np.zeros((5, 48, 48, 3), np.uint8)
    >>> upscale_video(pipe, small, 96, 96, prompt="a red circle moves right", steps=2).frames.shape
    (1, 5, 96, 96, 3)

    Paper: FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video
    Generation.
    """
    known = _check(pipe, base_size)
    steps = known.steps if steps is None else steps
    guidance = known.guidance if guidance is None else guidance
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be an int of at least 1; got {steps!r}")
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1; got {strength!r}")
    run = min(int(steps * strength), steps)
    if not run:
        raise ValueError(f"strength={strength} of {steps} steps is less than one step; raise either")
    if method is None:
        method = FreeSwim(base=known.grid, cache_steps=cache_steps)
    if not isinstance(method, (Method, Pattern)):
        raise TypeError(f"method must be a method or a pattern; got {method!r}")

    prompts, video = _prompts_and_video(pipe, video_or_prompt, prompt)
    negative = known.negative if negative_prompt is None else negative_prompt
    if isinstance(negative, str):
        negative = [negative] * len(prompts)
    if len(negative) != len(prompts):
        raise ValueError(f"{len(negative)} negative prompts for {len(prompts)} prompts; give one, or one each")
    _check_size(pipe, height, width, video.shape[2:4] if video is not None else (known.height, known.width))
    count = (known.frames if video is None else video.shape[1]) if frames is None else frames
    if video is not None and count != video.shape[1]:
        raise ValueError(f"frames={frames}, but the video has {video.shape[1]}; leave frames out")
    _check_frames(pipe, count)
    scheduler = shifted(pipe.scheduler, known.shift if shift is None else shift)

    call = {"negative_prompt": negative, "guidance_scale": guidance, "num_frames": count, **call}
    kept = Checkpoint(checkpoint, {
        "height": height, "width": width, "prompts": prompts, "run": run, "steps": steps,
        "method": method.to_dict(), "scheduler": dict(scheduler.config), "model": pipe.name_or_path,
        "call": {name: value for name, value in call.items() if isinstance(value, (str, int, float, list))},
        "video": video, "base_size": (known.height, known.width), "noise": states(generator),
    })  # fmt: skip
    with _quiet(pipe), torch.no_grad():
        if video is None:
            video = kept.load_base(generator)
        if video is None:
            small = dict(height=known.height, width=known.width, num_inference_steps=steps, output_type="np")
            video = finite(pipe(prompt=prompts, generator=generator, **small, **call).frames, pipe)
            kept.save_base(video, generator)
        if "image" in inspect.signature(type(pipe).__call__).parameters and "image" not in call:
            call["image"] = _picture(video[0, 0])
        done, latents, state = kept.load_step(pipe._execution_device)
        if latents is None:
            late = skip_steps(scheduler, steps - run)
            latents = encode(pipe, video, height, width, tiling)
            latents = _noised(latents, late, steps, generator)
            kept.save_step(0, latents, late)
        late = skip_steps(scheduler, steps - run, done, state)
        every = getattr(method, "cache_steps", None) or 1
        with counting(progress, run, done) as count_step:

            def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
                now = done + step + 1
                if now % every == 0 and now < run:  # the calls before the next refresh need what was stored
                    kept.save_step(now, tensors["latents"], late)
                count_step(now)
                return {}

            denoiser = next(iter(denoisers(pipe)[1].values()))
            pieces = feed_forward_in_pieces(denoiser) if tiling else contextlib.nullcontext()
            with _scheduler(pipe, late), pieces, attach(pipe, method) as attached:
                latents = pipe(
                    prompt=prompts, height=height, width=width, num_inference_steps=steps, latents=latents,
                    generator=generator, callback_on_step_end=after, output_type="latent", **call,
                ).frames  # fmt: skip
        large = finite(decode(pipe, latents, tiling), pipe)
    kept.clear()
    return Upscaled(large, video, attached.report)


def _check(pipe: Any, base_size: tuple[int, int] | None) -> Native:
    """What the model was made for; raises where it is no Wan pipeline or that is not known."""
    cls = type(pipe).__name__
    arguments = inspect.signature(type(pipe).__call__).parameters
    from diffusers import AutoencoderKLWan

    needed = {"latents", "height", "width", "num_frames", "callback_on_step_end", "guidance_scale"}
    if not isinstance(getattr(pipe, "vae", None), AutoencoderKLWan) or not needed <= set(arguments):
        raise TypeError(
            f"upscale_video runs WanPipeline and WanImageToVideoPipeline; got {cls}. For another pipeline enlarge, "
            "encode and noise a video yourself, and denoise it inside attach(pipe, FreeSwim(base=...))"
        )
    denoiser = next(iter(denoisers(pipe)[1].values()))
    known = native(denoiser)
    if base_size is not None:
        if not isinstance(base_size, (tuple, list)) or len(base_size) != 2:
            raise TypeError(f"base_size must be (height, width) in pixels; got {base_size!r}")
        _check_size(pipe, *base_size, base_size)
        token = _token(pipe)
        grid = tuple(size // side for size, side in zip(base_size, token[1:], strict=True))
        rest = known or Native(*base_size, grid, 5.0, None, 50, 81)
        known = dataclasses.replace(rest, height=base_size[0], width=base_size[1], grid=grid)
    if known is None:
        raise ValueError(
            f"the size that the model of this {cls} was trained on is not known; give it in pixels, "
            "base_size=(height, width)"
        )
    return known


def _token(pipe: Any) -> tuple[int, int, int]:
    """(frames per latent frame, height and width of a token in pixels)."""
    patch = next(iter(denoisers(pipe)[1].values())).config.patch_size
    space = pipe.vae_scale_factor_spatial
    return pipe.vae_scale_factor_temporal, space * patch[1], space * patch[2]


def _check_size(pipe: Any, height: int, width: int, smallest: tuple[int, int]) -> None:
    for name, size, token, least in zip(("height", "width"), (height, width), _token(pipe)[1:], smallest, strict=True):
        step = math.lcm(token, 16)  # what the pipeline itself asks for
        if type(size) is not int or size < 1 or size % step:
            below = int(size) // step * step if isinstance(size, (int, float)) else 0
            nearest = f"{below} and {below + step}" if below > 0 else f"{step}"
            raise ValueError(f"{name} must be a multiple of {step} pixels; got {size!r}, nearest: {nearest}")
        if size < least:
            raise ValueError(
                f"{name}={size} is smaller than the {least} pixels of the small video; upscale_video only enlarges"
            )


def _check_frames(pipe: Any, count: int) -> None:
    per = _token(pipe)[0]
    if type(count) is not int or count < 1 or (count - 1) % per:
        below = max(int(count) - 1, 0) // per * per + 1
        raise ValueError(f"{count} frames do not fit the model, which needs {per}n+1; nearest: {below}, {below + per}")


def _prompts_and_video(pipe: Any, given: Any, prompt: Any) -> tuple[list[str], np.ndarray | None]:
    texts = isinstance(given, str) or (isinstance(given, (list, tuple)) and given and isinstance(given[0], str))
    if texts and prompt is not None:
        raise TypeError("a prompt was given twice; prompt= goes with a video")
    text, video = (given, None) if texts else (prompt, as_pixels(given, "video"))
    if text is None:
        raise ValueError("a video needs the prompt that it is drawn from again; give prompt=...")
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"this {type(pipe).__name__} has no text encoder to read the prompt; load it with one")
    prompts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(each, str) for each in prompts):
        raise TypeError(f"a prompt must be text; got {prompts!r}")
    if video is not None and len(prompts) == 1:
        prompts *= len(video)
    if video is not None and len(prompts) != len(video):
        raise ValueError(f"{len(prompts)} prompts for {len(video)} videos; give one, or one each")
    return prompts, video


def _noised(latents: torch.Tensor, late: Any, steps: int, generator: Any) -> torch.Tensor:
    """Latents with the noise of the first step that `late` offers."""
    from diffusers.utils.torch_utils import randn_tensor

    late.set_timesteps(steps, device=latents.device)
    late.set_begin_index(0)
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    first = late.timesteps[:1].repeat(len(latents))
    if hasattr(late, "scale_noise"):
        return late.scale_noise(latents, first, noise)
    return late.add_noise(latents, noise, first)


def _picture(frame: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray((frame * 255).round().astype(np.uint8))


@contextlib.contextmanager
def _scheduler(pipe: Any, scheduler: Any) -> Iterator[None]:
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own bar, which counts the steps left out too."""
    had, before = hasattr(pipe, "_progress_bar_config"), dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        if had:
            pipe._progress_bar_config = before
        else:
            del pipe._progress_bar_config
