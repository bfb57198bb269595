"""Run a pipeline once, with or without something attached, and compare two results."""

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vision_attn.diffusion.loading import LoadedPipeline

if TYPE_CHECKING:
    from vision_attn.diffusion.method import Method, Preset
    from vision_attn.kernels.patterns import Pattern


@dataclass(frozen=True)
class Attachment:
    """What is put into a pipeline: attention with options of `attach`, and a method for longer videos; None for one
    of them that is not wanted."""

    attention: "Pattern | Preset | None" = None
    options: dict[str, Any] = field(default_factory=dict)
    extension: "Method | None" = None

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """The runs by the name of the field, until the block ends."""
        from vision_attn import attach

        parts = {"attention": (self.attention, self.options), "extension": (self.extension, {})}
        with ExitStack() as stack:
            yield {
                name: stack.enter_context(attach(pipe, part, **options))
                for name, (part, options) in parts.items()
                if part is not None
            }

    def from_the_first_step(self) -> "Attachment":
        """The same without dense steps."""
        none = {"dense_steps": 0, "dense_last_steps": 0}
        if self.attention is not None and hasattr(self.attention, "options"):
            preset = replace(self.attention, options={**self.attention.options, **none})
            return replace(self, attention=preset)
        return replace(self, options={**self.options, **none} if self.attention is not None else {})


@dataclass(frozen=True)
class Sample:
    """Frames uint8 `[frames, height, width, 3]`, seconds of the whole call, and the reports of what was attached."""

    frames: np.ndarray
    seconds: float
    reports: dict[str, dict[str, Any]]


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
    return sample_batch(loaded, [prompt], [seed], arguments, attachment, bar)[0]


def sample_batch(
    loaded: LoadedPipeline,
    prompts: list[str],
    seeds: list[int],
    arguments: dict[str, Any],
    attachment: Attachment | None = None,
    bar: str = "",
) -> list[Sample]:
    """`sample` of several prompts in one call, each with its own noise; seconds are the share of one.

    A prompt in a batch is the picture that it is alone up to rounding, not bit for bit.
    """
    loaded.pipe.set_progress_bar_config(disable=not bar, desc=bar)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    one = len(prompts) == 1
    start = time.perf_counter()
    with (attachment or Attachment()).attached(loaded.pipe) as runs:
        out = loaded.pipe(
            prompts[0] if one else prompts,
            generator=generators[0] if one else generators,
            output_type="np",
            **arguments,
        )
    reports = {name: run.report.to_dict() for name, run in runs.items()}
    seconds = (time.perf_counter() - start) / len(prompts)
    clips = out.frames if hasattr(out, "frames") else [image[None] for image in out.images]
    made = []
    for clip in clips:
        pixels = np.asarray(clip, dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise RuntimeError(f"the model produced NaN in {loaded.dtype}; use --dtype float32 or bfloat16")
        made.append(Sample((pixels.clip(0, 1) * 255).round().astype(np.uint8), seconds, reports))
    return made


def warm_up(
    loaded: LoadedPipeline, prompt: str, arguments: dict[str, Any], attachments: list[Attachment | None], bar: str
) -> None:
    """Two steps of each kind, so that neither of two timed runs pays for imports, compilation and first allocations."""
    short = arguments | {"num_inference_steps": min(2, arguments.get("num_inference_steps", 2))}
    for attachment in attachments:
        if attachment is not None:
            attachment = attachment.from_the_first_step()
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
