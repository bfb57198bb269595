"""How long the videos were that a model learned from, and the published settings for longer ones, as data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from vision_attn.diffusion.families import Family
from vision_attn.diffusion.sizes import FAMILIES as SIZES


@dataclasses.dataclass(frozen=True)
class Length:
    """What is published about longer videos of one family.

    Args:
        frames: latent frames of the length it was trained on; CogVideoX says so in its config instead.
        decay: length in times the trained one -> alpha and beta of UltraViCo.
        period: latent frames after which the model repeats itself; None for one that does not.
        gamma: half width of UltraViCo's bands around the repetitions, in latent frames.
        first_frame: whether UltraViCo shields the first latent frame, which is a single picture.
        riflex: number of the temporal frequency that RIFLEx changes, 0 for the fastest.
    """

    frames: int
    decay: dict[int, tuple[float, float]]
    period: float | None = None
    gamma: float = 4.0
    first_frame: bool = False
    riflex: int = 0


# Papers and code of UltraViCo (arXiv 2511.20123) and RIFLEx (arXiv 2502.15894). Other families: nothing is published.
LENGTHS = {
    "WanTransformer3DModel": Length(21, {2: (0.9, 0.6)}, first_frame=True),
    "HunyuanVideoTransformer3DModel": Length(
        33, {2: (0.95, 0.6), 3: (0.9, 0.6), 4: (0.9, 0.8)}, period=50, gamma=4, riflex=3
    ),
    "CogVideoXTransformer3DModel": Length(13, {2: (0.9, 0.6), 4: (0.85, 0.6)}, period=20, gamma=1, riflex=1),
}


def trained_frames(module: torch.nn.Module, family: Family) -> int:
    """Latent frames, in tokens, of the length a denoiser was trained on.

    They are looked up in the `defaults.json` of the folder it was loaded from, in its config (CogVideoX), then in
    `LENGTHS`.

    Raises:
        ValueError: nobody says.
    """
    config = getattr(module, "config", None)
    frames = folder_defaults(module).get("frames")
    if frames is not None:
        vae = _read(Path(config._name_or_path).parent / "vae" / "config.json")
        return tokens_of(SIZES[family.name].token(vae, dict(config)), frames)
    if getattr(config, "sample_frames", None):
        latents = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return -(-latents // (config.patch_size_t or 1))
    if family.name not in LENGTHS:
        raise ValueError(
            f"it is not known how long the videos were that {family.name} was trained on; pass train_frames=, the "
            "latent frames of one of them"
        )
    return LENGTHS[family.name].frames


def tokens_of(token: tuple[int, ...], frames: int) -> int:
    """Latent frames, in tokens, of a video; `token` starts with frames per latent frame and latent frames per token.

    >>> tokens_of((4, 1, 16, 16), 81), frames_of((4, 1, 16, 16), 42)
    (21, 165)
    """
    latent, per_token, *_ = token
    return -(-((frames - 1) // latent + 1) // per_token)


def frames_of(token: tuple[int, ...], tokens: int) -> int:
    """Frames of a video of so many latent frames, in tokens."""
    latent, per_token, *_ = token
    return (tokens * per_token - 1) * latent + 1


def check_positions(module: torch.nn.Module, tokens: int) -> None:
    """Raise ValueError when a denoiser has no positions for so many latent frames, in tokens."""
    config = module.config
    most = config.get("rope_max_seq_len")
    if config.get("max_size"):
        most = max(config.max_size) // config.patch_size[0]
    if most and tokens > most:
        raise ValueError(f"{type(module).__name__} has positions for {most} latent frames; got {tokens}")


def folder_defaults(module: torch.nn.Module) -> dict[str, Any]:
    """The `defaults.json` of the folder that a denoiser was loaded from; empty where there is none."""
    folder = Path(getattr(getattr(module, "config", None), "_name_or_path", None) or "")
    return _read(folder.parent / "defaults.json") if folder.name else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def require_video(family: Family, what: str) -> None:
    """Raise ValueError for a family that makes images."""
    if "t" not in family.axes:
        raise ValueError(f"{what} is for videos, and {family.name} makes images; allowed: {', '.join(_videos())}")


def _videos() -> list[str]:
    return [name for name, sizes in SIZES.items() if sizes.fps]
