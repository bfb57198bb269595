"""UltraViCo: attention between frames farther apart than in training is weakened, with the settings of each model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from vision_attn.diffusion.attachment import attach, denoisers
from vision_attn.diffusion.families import family_of
from vision_attn.diffusion.installed import Installed
from vision_attn.diffusion.lengths import LENGTHS, Length, require_video, trained_frames
from vision_attn.diffusion.method import Method
from vision_attn.kernels.patterns import LengthDecay


@dataclasses.dataclass(frozen=True)
class UltraViCo(Method):
    """Videos longer than the trained length: scores between distant tokens are multiplied by a number below 1.

    It attaches the pattern `LengthDecay`, filled in for the model; None stands for the published setting. The rule
    also acts on a video of the trained length, on the pairs more than half of it apart.

    Args:
        times: length of the video over the trained one, at least 1; picks alpha and beta where they depend on it.
        alpha: multiplier of distant scores, 0 to 1. 0.9 where nothing is published.
        beta: multiplier around the repetitions, 0 to 1, for models that repeat themselves. 0.6 likewise.
        train_frames: latent frames of the trained length; see `vision_attn.diffusion.lengths`.
        period: latent frames after which the model repeats itself; 0 for never.
        gamma: half width of the bands around the repetitions, in latent frames.
        first_frame: shield the first latent frame from frames past the trained length (Wan).
        center_keys: subtract the mean key first, as the published code does; False is the formula of the paper.

    Raises:
        TypeError, ValueError: an option out of range; attached to a model of images, or to one whose trained length is
            not known.

    >>> from diffusers import WanTransformer3DModel
    >>> small = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, text_dim=16, ffn_dim=32, freq_dim=16)
    >>> UltraViCo(times=3).pattern(WanTransformer3DModel(**small))
    LengthDecay(train_frames=21, alpha=0.9, beta=0.6, period=None, gamma=4.0, first_frame=True, center_keys=True, \
shape='constant')

    Paper: UltraViCo: Breaking Extrapolation Limits in Video Diffusion Transformers.
    """

    times: float | None = None
    alpha: float | None = None
    beta: float | None = None
    train_frames: int | None = None
    period: float | None = None
    gamma: float | None = None
    first_frame: bool | None = None
    center_keys: bool = True
    name: ClassVar[str] = "ultravico"

    def __post_init__(self) -> None:
        check_times("UltraViCo", self.times)
        alpha, beta = (0.9 if self.alpha is None else self.alpha), (0.6 if self.beta is None else self.beta)
        self._fill(1 if self.train_frames is None else self.train_frames, alpha, beta, Length(1, {}))

    def _fill(self, frames: int, alpha: float, beta: float, known: Length) -> LengthDecay:
        period = known.period if self.period is None else self.period
        return LengthDecay(
            frames,
            alpha,
            beta,
            None if period == 0 and not isinstance(period, bool) else period,
            known.gamma if self.gamma is None else self.gamma,
            known.first_frame if self.first_frame is None else self.first_frame,
            self.center_keys,
        )

    def pattern(self, module: Any) -> LengthDecay:
        """The pattern for a denoiser."""
        family = family_of(module, None)
        require_video(family, "UltraViCo")
        known = LENGTHS.get(family.name, Length(1, {}))
        alpha, beta = (0.9, 0.6)
        if self.times is not None and known.decay:
            alpha, beta = known.decay[min(known.decay, key=lambda times: (abs(times - self.times), times))]
        alpha, beta = (alpha if self.alpha is None else self.alpha), (beta if self.beta is None else self.beta)
        frames = trained_frames(module, family) if self.train_frames is None else self.train_frames
        return self._fill(frames, alpha, beta, known)

    def attach(self, target: Any, **options: Any) -> Installed:
        return attach(target, self.pattern(next(iter(denoisers(target)[1].values()))), **options)

    def refuse_unknown(self, options: dict[str, Any]) -> None:
        """Everything is passed on to `attach`."""


def check_times(what: str, times: Any) -> None:
    """Raise TypeError or ValueError unless `times` is None or a number of at least 1."""
    if times is None:
        return
    if isinstance(times, bool) or not isinstance(times, (int, float)):
        raise TypeError(f"{what}(times={times!r}): times must be a number, how much longer than trained")
    if not (math.isfinite(times) and times >= 1):
        raise ValueError(f"{what}(times={times!r}): times must be at least 1, how much longer than trained")
