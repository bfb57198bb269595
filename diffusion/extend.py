"""Videos longer than those a model was trained on, without training."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import Any

import numpy as np
import torch

from vision_attn.diffusion.attachment import attach, denoisers
from vision_attn.diffusion.families import Family, family_of
from vision_attn.diffusion.lengths import (
    check_positions,
    folder_defaults,
    frames_of,
    require_video,
    trained_frames,
)
from vision_attn.diffusion.method import Method
from vision_attn.diffusion.methods import method_class
from vision_attn.diffusion.methods.ultravico import check_times
from vision_attn.diffusion.pieces import decode, feed_forward_in_pieces
from vision_attn.diffusion.pixels import finite
from vision_attn.diffusion.sizes import FAMILIES as SIZES
from vision_attn.kernels.patterns import Pattern

EXTENDERS = ("ultravico", "riflex", "pi", "ntk", "yarn", "tasr", "none")


@dataclasses.dataclass(frozen=True)
class Extended:
    """A long video.

    Args:
        frames: `[batch, frames, height, width, 3]`, float32 from 0 to 1.
        reports: of what was attached, in order; empty for "none".
    """

    frames: np.ndarray
    reports: list[Any]


def extend_video(
    pipe: Any,
    prompt: str | list[str] | None,
    times: float = 4,
    method: str | Method | Pattern | tuple[Method | Pattern, ...] = "ultravico",
    *,
    train_frames: int | None = None,
    **call: Any,
) -> Extended:
    """Draw a video `times` as long as those the model was trained on.

    For less memory with large frames call `pipe.vae.enable_tiling()` before.

    Args:
        pipe: a pipeline that draws videos: Wan, HunyuanVideo, CogVideoX, LTX, Mochi or Cosmos.
        prompt: a text, or one per video; None when `prompt_embeds` is given.
        times: length over the trained one, at least 1; rounded to whole latent frames.
        method: "ultravico", "riflex", "pi", "ntk", "yarn", "tasr" or "none" (the untouched model), with the settings
            of the model; or what `attach` takes, as in `YaRN(high=8)`, or several in a tuple: `(RIFLEx(), Radial())`.
        train_frames: latent frames of the trained length, where that is not known.
        call: more arguments of the pipeline's call, such as `generator` or `image`. Sizes, steps and guidance that are
            not given come from the `defaults.json` of the model's folder, then from the pipeline.

    Returns:
        An `Extended`: `frames` and `reports`.

    Raises:
        TypeError: not a pipeline; a method of another kind.
        ValueError: `times` below 1, a pipeline without text encoder or for images, a length past what the model has
            positions for, methods that do not go together or not with this model.
        RuntimeError: the model produced numbers that are no picture.

    >>> from vision_attn.diffusion.loading import load
    >>> pipe = load(device="cpu").pipe
    >>> pipe.set_progress_bar_config(disable=True)
    >>> extend_video(pipe, "a red circle moves right", 2, num_inference_steps=1).frames.shape
    (1, 37, 48, 48, 3)
    """
    family, module = _check(pipe, prompt, call)
    if times is None:
        raise TypeError("times must be a number, how much longer than trained; got None")
    parts = extension(method, times, train_frames)
    known = [train_frames, *(getattr(part, "train_frames", None) for part in parts)]
    trained = next((frames for frames in known if frames), None) or trained_frames(module, family)
    tokens = round(trained * times)
    check_positions(module, tokens)
    count = frames_of(SIZES[family.name].token(dict(pipe.vae.config), dict(module.config)), tokens)
    said = folder_defaults(module)
    arguments = inspect.signature(type(pipe).__call__).parameters
    own = {name: said[key] for key, name in _DEFAULTS.items() if key in said and name in arguments}
    from diffusers import WanImageToVideoPipeline, WanPipeline

    wan = isinstance(pipe, (WanPipeline, WanImageToVideoPipeline))  # whose latents can be decoded in less memory
    call = {**own, **call, "output_type": "latent" if wan else "np"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(feed_forward_in_pieces(module))
        runs = [stack.enter_context(attach(pipe, part)) for part in parts]
        frames = pipe(prompt=prompt, num_frames=count, **call).frames
    if wan:
        with torch.no_grad():
            frames = decode(pipe, frames, pipe.vae.use_tiling)
    return Extended(finite(frames, pipe), [run.report for run in runs])


# Entries of defaults.json -> arguments of pipelines.
_DEFAULTS = {
    "height": "height", "width": "width", "steps": "num_inference_steps", "guidance": "guidance_scale",
    "max_sequence_length": "max_sequence_length",
}  # fmt: skip


def extension(
    method: str | Method | Pattern | tuple[Method | Pattern, ...], times: float, train_frames: int | None = None
) -> tuple[Method | Pattern, ...]:
    """What to attach for a video `times` as long as trained, by name or as given.

    Raises:
        TypeError, ValueError: `times` below 1, an unknown name, something that cannot be attached.

    >>> extension("pi", 4)
    (PI(train_frames=None, train_size=None),)
    """
    check_times("extend_video", times)
    if isinstance(method, str):
        if method not in EXTENDERS:
            raise ValueError(f"there is no way {method!r} to extend a video; allowed: {', '.join(EXTENDERS)}")
        if method == "none" or times == 1:
            return ()
        options = {"times": times} if method == "ultravico" else {}
        return (method_class(method)(train_frames=train_frames, **options),)
    parts = method if isinstance(method, tuple) else (method,)
    if not all(isinstance(part, (Method, Pattern)) for part in parts):
        raise TypeError(f"method must be one of {', '.join(EXTENDERS)}, or what attach() takes; got {method!r}")
    return parts


def _check(pipe: Any, prompt: Any, call: dict[str, Any]) -> tuple[Family, Any]:
    found, modules = denoisers(pipe)
    if found is None:
        raise TypeError(f"extend_video needs a pipeline, not its denoiser; got {type(pipe).__name__}")
    module = next(iter(modules.values()))
    family = family_of(module, None)
    require_video(family, "extend_video")
    if "num_frames" in call:
        raise TypeError("times= says how long the video is; leave num_frames out")
    if call.get("output_type", "np") != "np":
        raise TypeError(f"extend_video returns arrays; leave output_type={call['output_type']!r} out")
    if "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no num_frames, so the length of its videos cannot be chosen")
    embedded = call.get("prompt_embeds") is not None
    if not embedded and getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"this {type(pipe).__name__} has no text encoder to read the prompt; load it with one")
    if not isinstance(prompt, type(None) if embedded else (str, list)):
        raise TypeError(f"prompt must be a text or a list of them, or None beside prompt_embeds; got {prompt!r}")
    return family, module
