"""The size a denoiser was trained on, where it is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Native:
    """What a model was made for, and how its authors run it.

    Args:
        height, width: pixels.
        grid: tokens of that size, `(h, w)`.
        guidance: strength of the prompt.
        shift: flow shift published for large videos of this model; None keeps the scheduler's own.
        steps: denoising steps.
        frames: of a clip.
        negative: what is kept out of large videos.
    """

    height: int
    width: int
    grid: tuple[int, int]
    guidance: float
    shift: float | None
    steps: int
    frames: int
    negative: str = ""


_NEGATIVE = "repeated objects, duplicates, blurry, low detail, low quality"
# (class, heads, layers) -> the settings of FreeSwim's authors for it.
_KNOWN = {
    ("WanTransformer3DModel", 12, 30): Native(480, 832, (30, 52), 5.0, 9.0, 50, 81, _NEGATIVE),  # Wan2.1 1.3B
    ("WanTransformer3DModel", 40, 40): Native(720, 1280, (45, 80), 5.0, 9.0, 50, 81, _NEGATIVE),  # Wan2.1 14B
}


def native(denoiser: Any) -> Native | None:
    """The native size of a denoiser: from the `defaults.json` of the folder it was loaded from, else from the table of
    known models; None where neither knows.

    >>> from diffusers import WanTransformer3DModel
    >>> native(WanTransformer3DModel(num_attention_heads=12, attention_head_dim=4, num_layers=30, ffn_dim=8)).grid
    (30, 52)
    """
    from vision_attn.diffusion.loading import LoadError, inspect_model

    config = denoiser.config
    folder = Path(config.get("_name_or_path") or "").parent
    if (folder / "defaults.json").is_file() and (folder / "model_index.json").is_file():
        try:
            info = inspect_model(folder)
            said = info.defaults
            tokens = info.grid(said["frames"], said["height"], said["width"])
            return Native(
                said["height"], said["width"], tokens[-2:], said["guidance"], None, said["steps"], said["frames"]
            )
        except (LoadError, KeyError):
            return None
    key = (type(denoiser).__name__, config.get("num_attention_heads"), config.get("num_layers"))
    return _KNOWN.get(key)
