"""Run a pipeline once, with or without a pattern, and compare two results."""

import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vision_attn.diffusion.loading import LoadedPipeline

if TYPE_CHECKING:
    from vision_attn.kernels.patterns import Pattern


@dataclass(frozen=True)
class Attachment:
    """A pattern and where it stays dense, as `attach` takes them."""

    pattern: "Pattern"
    dense_steps: int = 0
    dense_layers: int = 0

    @property
    def schedule(self) -> dict[str, int]:
        return {"dense_steps": self.dense_steps, "dense_layers": self.dense_layers}


@dataclass(frozen=True)
class Sample:
    """Frames uint8 `[frames, height, width, 3]`, seconds of the whole call, and the report of the attachment."""

    frames: np.ndarray
    seconds: float
    report: dict[str, Any] | None


def call_arguments(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names of the pipeline's `__call__`; those that are None are left to the pipeline.

    Raises:
        ValueError: a setting the pipeline has no argument for.
    """
    names = {
        "frames": "num_frames",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "negative": "negative_prompt",
    }
    known = inspect.signature(type(pipe).__call__).parameters
    # Without this PixArt draws at a size of its own list and resizes.
    call: dict[str, Any] = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    for key, value in settings.items():
        name = names.get(key, key)
        if value is None or (key == "frames" and value == 1 and name not in known):
            continue
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} has no {name}, so --{key} {value!r} cannot be used; leave it out")
        call[name] = value
    return call


def sample(
    loaded: LoadedPipeline,
    prompt: str,
    seed: int,
    arguments: dict[str, Any],
    attachment: Attachment | None = None,
    bar: str = "",
) -> Sample:
    """Draw one prompt. The noise comes from a CPU generator, so a seed means the same picture on every device.

    Args:
        arguments: of the pipeline's call, see `call_arguments`.
        attachment: None for the untouched model.
        bar: name of the progress bar on stderr; no bar without a name.

    Raises:
        RuntimeError: the model produced numbers that are no picture.
    """
    loaded.pipe.set_progress_bar_config(disable=not bar, desc=bar)
    generator = torch.Generator("cpu").manual_seed(seed)
    start = time.perf_counter()
    if attachment is None:
        out, report = loaded.pipe(prompt, generator=generator, output_type="np", **arguments), None
    else:
        from vision_attn import attach

        with attach(loaded.pipe, attachment.pattern, **attachment.schedule) as run:
            out = loaded.pipe(prompt, generator=generator, output_type="np", **arguments)
        report = run.report.to_dict()
    seconds = time.perf_counter() - start
    pixels = np.asarray(out.frames[0] if hasattr(out, "frames") else out.images[:1], dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise RuntimeError(f"the model produced NaN in {loaded.dtype}; use --dtype float32 or bfloat16")
    return Sample((pixels.clip(0, 1) * 255).round().astype(np.uint8), seconds, report)


def warm_up(
    loaded: LoadedPipeline, prompt: str, arguments: dict[str, Any], attachments: list[Attachment | None], bar: str
) -> None:
    """Two steps of each kind, so that neither of two timed runs pays for imports, compilation and first allocations."""
    short = arguments | {"num_inference_steps": min(2, arguments.get("num_inference_steps", 2))}
    for attachment in attachments:
        if attachment is not None:
            attachment = Attachment(attachment.pattern, 0, attachment.dense_layers)
        sample(loaded, prompt, 0, short, attachment, bar)


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """PSNR in dB (None for identical frames) and SSIM, both over uint8 frames `[frames, height, width, 3]`.

    >>> clip = np.zeros((2, 16, 16, 3), np.uint8)
    >>> compare(clip, clip)
    {'psnr': None, 'ssim': 1.0}
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    same = np.array_equal(reference, other)
    side = min(7, *reference.shape[1:3])
    window = side if side % 2 else side - 1
    ssim = [
        structural_similarity(a, b, win_size=window, channel_axis=-1) for a, b in zip(reference, other, strict=True)
    ]
    psnr = None if same else float(peak_signal_noise_ratio(reference, other, data_range=255))
    return {"psnr": psnr, "ssim": float(np.mean(ssim))}
