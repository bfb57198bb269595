"""How fast a device is, as data: profiles with published rates, and that of this machine once it was measured."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch

PROFILES = Path(__file__).parent / "profiles"
HERE = "here"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Rates of a device. A JSON file in `profiles/`, written by hand from published numbers or by `measure`.

    `flops_per_s` holds rates by dtype name and way of computing: "dense", and either "full" and "masked" for tiles of a
    GPU kernel, or names of backends for gathered tiles on a CPU. They were taken at `head_dim`. `sources` says where
    each number comes from.
    """

    device: str
    origin: str
    head_dim: int
    bytes_per_s: float
    flops_per_s: dict[str, dict[str, float]]
    cache_bytes_per_s: float | None = None
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


def here() -> Path:
    """Where the profile of this machine is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vision-attn" / "profile.json"


def load_profile(device: str | os.PathLike) -> Profile:
    """The profile called `device`: a name in `profiles/`, "here", or a `.json` file.

    Raises:
        ValueError: no such profile, or a file that does not hold one.

    >>> load_profile("h100").origin
    'published rates, not measured by us'
    """
    names = sorted(path.stem for path in PROFILES.glob("*.json"))
    path = here() if device == HERE else Path(device) if str(device).endswith(".json") else PROFILES / f"{device}.json"
    if device == HERE and not path.exists():
        raise ValueError("this machine has no profile yet; run `vision-attn simulate --measure` (some seconds)")
    if not path.exists():
        raise ValueError(f"no device profile {str(device)!r}; allowed: {', '.join([*names, HERE])}, or a .json file")
    try:
        profile = Profile(**json.loads(path.read_text()))
        rates = [rate for ways in profile.flops_per_s.values() for rate in ways.values()]
        if not all(rate > 0 for rate in [*rates, profile.bytes_per_s]):
            raise ValueError("rates must be above 0")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a device profile: {error}; see {PROFILES.name}/h100.json") from error
    return profile


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
