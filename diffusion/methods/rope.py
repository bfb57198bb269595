"""Other frequencies of the rotary position embedding, for videos longer and pictures larger than the trained ones.

The frequencies of an axis are `theta_j = base^(-2j/dim)`, j from 0 to dim/2 - 1, in radians per token; `L` is the
trained size of the axis, `s` how many times longer it is now.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from vision_attn.diffusion.families import Family
from vision_attn.diffusion.installed import Installed
from vision_attn.diffusion.lengths import LENGTHS, trained_frames
from vision_attn.diffusion.method import Method
from vision_attn.kernels.patterns.base import is_int


@dataclasses.dataclass(frozen=True)
class RotaryEdit(Method):
    """What the edits share. Axes that are not longer than trained keep their frequencies, to the bit.

    An edit goes together with any pattern and with `UltraViCo`.

    Args:
        train_frames: latent frames of the trained length; None where the model or `vision_attn.diffusion.lengths` says.
        train_size: trained height and width in tokens, to change these axes too; None leaves them alone.

    Raises:
        TypeError, ValueError: an option out of range; attached to a model without rotary embeddings, or whose trained
            length is not known, or to an image model without `train_size`.
    """

    train_frames: int | None = None
    train_size: tuple[int, int] | None = None
    needs_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.train_frames is not None:
            self._check_int("train_frames", self.train_frames)
        if self.train_size is not None:
            if not isinstance(self.train_size, (tuple, list)) or len(self.train_size) != 2:
                raise TypeError(f"{self._is('train_size')}: train_size must be (height, width) in tokens")
            object.__setattr__(self, "train_size", tuple(self.train_size))
            for size in self.train_size:
                self._check_int("train_size", size)

    def _check_int(self, name: str, value: Any, least: int = 1) -> None:
        if not is_int(value):
            raise TypeError(f"{self._is(name)}: {name} must be an int")
        if value < least:
            raise ValueError(f"{self._is(name)}: {name} must be at least {least}")

    def _is(self, name: str) -> str:
        return f"{type(self).__name__}({name}={getattr(self, name)!r})"

    def attach(self, target: Any, *, replace: bool = False) -> Installed:
        from vision_attn.diffusion.rotary import RotaryRun

        return RotaryRun(target, self, replace)

    def trained(self, module: Any, family: Family) -> dict[str, int]:
        """Axis -> trained size in tokens, for the axes that the edit may change."""
        from vision_attn.diffusion.rotary import rotary_of

        if self.needs_noise and rotary_of(family).noise is None:
            raise ValueError(f"{type(self).__name__} follows the share of noise, which {family.name} is not told")
        sizes: dict[str, int] = {}
        if "t" in family.axes:
            sizes["t"] = self.train_frames or trained_frames(module, family)
        elif self.train_size is None:
            raise ValueError(f"{family.name} makes images; pass train_size=(height, width), in tokens")
        if self.train_size is not None:
            if family.name == "CogVideoXTransformer3DModel":
                raise ValueError("the pipelines of CogVideoX fit height and width to the trained size; no train_size")
            sizes.update(zip("hw", self.train_size, strict=True))
        return sizes

    def edited(
        self, theta: torch.Tensor, axis: str, size: int, trained: int, family: Family, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The frequencies that replace `theta`, fastest first."""
        raise NotImplementedError

    def gain(self, times: float) -> float:
        """What queries and keys are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class PI(RotaryEdit):
    """Position interpolation: `theta_j / s`, which squeezes all positions into the trained range.

    Takes `train_frames` and `train_size`, see `RotaryEdit`.

    >>> PI(train_frames=2).edited(torch.tensor([1.0, 0.1]), "t", 8, 2, None, None)
    tensor([0.2500, 0.0250])

    Paper: Extending Context Window of Large Language Models via Positional Interpolation.
    """

    name: ClassVar[str] = "pi"

    def edited(self, theta, axis, size, trained, family, noise):
        return theta * (trained / size)


@dataclasses.dataclass(frozen=True)
class NTK(RotaryEdit):
    """Another base, `base * s^(dim / (dim - 2))`: the fastest frequency stays, the slowest is divided by s.

    Takes `train_frames` and `train_size`, see `RotaryEdit`. An axis with one frequency keeps it.

    >>> NTK(train_frames=2).edited(torch.tensor([1.0, 0.1]), "t", 8, 2, None, None)
    tensor([1.0000, 0.0250])

    Source: "NTK-aware scaled RoPE" (bloc97, 2023), as described in YaRN's paper.
    """

    name: ClassVar[str] = "ntk"

    def edited(self, theta, axis, size, trained, family, noise):
        rank = torch.arange(len(theta), dtype=theta.dtype, device=theta.device) / max(len(theta) - 1, 1)
        return theta * (trained / size) ** rank


@dataclasses.dataclass(frozen=True)
class YaRN(RotaryEdit):
    """PI for frequencies that turn less than `low` times in the trained length, none above `high`, a ramp between.

    Args:
        train_frames, train_size: see `RotaryEdit`.
        low: turns, below `high`.
        high: turns.
        sharpen: multiply queries and keys by `0.1 ln(s) + 1` too, s of the longest axis, as for language models.

    >>> YaRN(train_frames=8, low=1, high=2).edited(torch.tensor([2.0, 0.5]), "t", 16, 8, None, None)
    tensor([2.0000, 0.2500])

    Paper: YaRN: Efficient Context Window Extension of Large Language Models.
    """

    low: float = 1.0
    high: float = 32.0
    sharpen: bool = False
    name: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{self._is(name)}: {name} must be a number of turns")
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"YaRN(low={self.low}, high={self.high}): low must be below high, both at least 0")
        if not isinstance(self.sharpen, bool):
            raise TypeError(f"{self._is('sharpen')}: sharpen must be True or False")

    def edited(self, theta, axis, size, trained, family, noise):
        turns = trained * theta / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return theta * (keep + (1 - keep) * (trained / size))

    def gain(self, times):
        return 0.1 * math.log(times) + 1 if self.sharpen else 1.0


@dataclasses.dataclass(frozen=True)
class TASR(RotaryEdit):
    """PI while there is much noise, NTK when there is little, and a linear mix in between.

    The share of noise is `timestep / 1000`. The paper says where it starts and ends; the mix is linear in that share
    here. Takes `train_frames` and `train_size`, see `RotaryEdit`.

    >>> TASR(train_frames=2).edited(torch.tensor([1.0]), "t", 4, 2, None, torch.tensor(1.0))
    tensor([0.5000])

    Source: time-aware scaled RoPE of Lumina-Next (arXiv 2406.18583), as a baseline of UltraViCo.
    """

    name: ClassVar[str] = "tasr"
    needs_noise: ClassVar[bool] = True

    def edited(self, theta, axis, size, trained, family, noise):
        theta = theta.to(noise)
        given = theta, axis, size, trained, family, noise
        return noise * PI.edited(self, *given) + (1 - noise) * NTK.edited(self, *given)


@dataclasses.dataclass(frozen=True)
class RIFLEx(RotaryEdit):
    """One frequency per axis, the one behind the repetition, is slowed down until it turns less than once.

    It becomes `share * 2 pi / tokens of the axis`. Which one: `index`; else the one whose turn is nearest to `period`;
    else what is published for the model (Wan: the fastest; HunyuanVideo: the fourth; CogVideoX: the second). For height
    and width it is the one whose turn is nearest to the trained size.

    Args:
        train_frames, train_size: see `RotaryEdit`.
        period: latent frames after which the model repeats itself, above 0.
        index: number of the temporal frequency, 0 for the fastest.
        share: of a turn, above 0; 0.9 as in the published code, 1 as in the paper.

    >>> RIFLEx(train_frames=2, index=1).edited(torch.tensor([1.0, 0.5, 0.1]), "t", 8, 2, None, None)
    tensor([1.0000, 0.7069, 0.1000])

    Paper: RIFLEx: A Free Lunch for Length Extrapolation in Video Diffusion Transformers.
    """

    period: float | None = None
    index: int | None = None
    share: float = 0.9
    name: ClassVar[str] = "riflex"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index is not None:
            self._check_int("index", self.index, least=0)
            if self.period is not None:
                raise ValueError(f"{self!r}: give period or index, not both")
        for name in ("period", "share"):
            value = getattr(self, name)
            if value is None and name == "period":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{self._is(name)}: {name} must be a number")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{self._is(name)}: {name} must be above 0")

    def trained(self, module, family):
        if "t" in family.axes and (self.period, self.index) == (None, None) and family.name not in LENGTHS:
            raise ValueError(f"after how long {family.name} repeats itself is not known; pass period= or index=")
        return super().trained(module, family)

    def edited(self, theta, axis, size, trained, family, noise):
        each = torch.arange(len(theta))
        if axis == "t" and self.period is None:
            at = LENGTHS[family.name].riflex if self.index is None else self.index
            if at >= len(theta):
                raise ValueError(f"RIFLEx(index={at}): the model has {len(theta)} temporal frequencies, 0 the fastest")
        else:
            turn = self.period if axis == "t" else trained
            at = (2 * math.pi / theta - turn).abs().argmin()
        return torch.where(each == at, self.share * 2 * math.pi / size, theta)
