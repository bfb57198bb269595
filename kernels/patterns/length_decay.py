"""UltraViCo: videos longer than those the model was trained on, by weakening what lies beyond the trained length."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch

from .base import Predicate, ScoreRule, Tensors, check_grid, is_int
from .blocks import Blocked, Lists, lists_from_map

SHAPES = ("constant", "linear", "parabolic")
BANDS = range(1, 5)  # repetitions whose surroundings count as a risk
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class LengthDecay(Blocked):
    """Every token sees every token, but scores between distant ones are multiplied by a number below 1.

    The grid is `(frames, h, w)` or `(frames, positions)`; let `P` be the tokens of a frame and `d = abs(query - key)`
    the distance of two token numbers. A scaled score stays as it is when it is negative, or when `d <= train_frames * P
    / 2`. Otherwise it is multiplied by `beta` when `d` lies in one of the bands `(m * period - gamma) * P <= d <= (m *
    period + gamma) * P`, m from 1 to 4, and by `alpha` when not. Extra tokens are left alone. (Adding `log(alpha)` to
    the scores is something else: it also acts on negative scores, and not in proportion.)

    Args:
        train_frames: latent frames of the length that the model was trained on, at least 1; 21 for Wan2.1, 33 for
            HunyuanVideo, 13 for CogVideoX-5B.
        alpha: the multiplier, 0 to 1; 0.85 for sharper, 0.95 for milder. For the other shapes `(near, far)`, the
            multipliers at distance 0 and at the length of the sequence; the paper tries (0.95, 0.85).
        beta: the multiplier in the bands, 0 to 1.
        period: latent frames after which the model repeats itself, above 0; 50 for HunyuanVideo, about 20 for
            CogVideoX-5B. None for models that do not repeat (Wan): no bands.
        gamma: half width of a band in latent frames, at least 0; 4 for HunyuanVideo, 1 for CogVideoX-5B.
        first_frame: queries up to token number P do not see keys past token number `train_frames * P`; the setting for
            Wan, whose first latent frame is a single picture.
        center_keys: first subtract the mean of all keys (grid and visible extra tokens), per batch entry and head, as
            the published code does. Without the rule this would change nothing but lse, which then is not that of
            another call over other keys; here it decides which scores are negative. False is the formula of the paper.
        shape: "constant", or how the multiplier goes from near to far: "linear" in the distance, or "parabolic".

    Raises:
        TypeError, ValueError: an option out of range here; in `check` (and so in `attend`) a grid with a single axis.

    >>> pattern = LengthDecay(train_frames=2, alpha=0.9)
    >>> pattern.score_rule((4, 3))(torch.tensor([1.0, 1.0, -1.0]), torch.tensor(0), torch.tensor([3, 4, 4]))
    tensor([ 1.0000,  0.9000, -1.0000])

    Paper: UltraViCo: Breaking Extrapolation Limits in Video Diffusion Transformers.
    """

    train_frames: int
    alpha: float | tuple[float, float] = 0.9
    beta: float = 0.6
    period: float | None = None
    gamma: float = 4.0
    first_frame: bool = False
    center_keys: bool = True
    shape: str = "constant"
    name: ClassVar[str] = "length-decay"

    def __post_init__(self) -> None:
        if not is_int(self.train_frames):
            raise TypeError(f"LengthDecay(train_frames={self.train_frames!r}): train_frames must be an int")
        if self.train_frames < 1:
            raise ValueError(f"LengthDecay(train_frames={self.train_frames!r}): train_frames must be at least 1")
        if self.shape not in SHAPES:
            raise ValueError(f"LengthDecay(shape={self.shape!r}): shape must be one of {', '.join(map(repr, SHAPES))}")
        self._set_alpha()
        self._set_number("beta", 1, "from 0 to 1")
        self._set_number("gamma", math.inf, "finite and at least 0")
        if self.period is not None:
            self._set_number("period", math.inf, "finite and above 0, or None for no bands")
            if not self.period:
                raise ValueError("LengthDecay(period=0): period must be above 0, or None for no bands")
        for name in ("first_frame", "center_keys"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"LengthDecay({name}={getattr(self, name)!r}): {name} must be True or False")

    def _set_alpha(self) -> None:
        ends = tuple(self.alpha) if isinstance(self.alpha, (list, tuple)) else (self.alpha,)
        wanted = 1 if self.shape == "constant" else 2
        if len(ends) != wanted:
            form = "one number" if wanted == 1 else "two numbers, near and far, such as (0.95, 0.85)"
            raise ValueError(f"LengthDecay(alpha={self.alpha!r}): shape {self.shape!r} takes {form}")
        ends = tuple(_number("alpha", a, 1, "from 0 to 1") for a in ends)
        object.__setattr__(self, "alpha", ends if wanted == 2 else ends[0])

    def _set_number(self, name: str, most: float, words: str) -> None:
        object.__setattr__(self, name, _number(name, getattr(self, name), most, words))

    def check(self, grid: tuple[int, ...]) -> None:
        check_grid(grid)
        if len(grid) == 1:
            raise ValueError(f"LengthDecay needs a grid of (frames, h, w) or (frames, positions); got {grid}")

    def untouched(self, grid: tuple[int, ...]) -> int:
        """The largest distance of two token numbers at which scores stay as they are."""
        return self.train_frames * math.prod(grid[1:]) // 2

    def bands(self, grid: tuple[int, ...]) -> list[tuple[int, int]]:
        """Smallest and largest distance of two token numbers in every band."""
        if self.period is None:
            return []
        positions = math.prod(grid[1:])
        ends = [((m * self.period - self.gamma) * positions, (m * self.period + self.gamma) * positions) for m in BANDS]
        return [(math.ceil(first), math.floor(last)) for first, last in ends]

    def cut(self, grid: tuple[int, ...]) -> tuple[int, int] | None:
        """`(q, k)`: queries up to token number q do not see keys past token number k. None when all see all."""
        positions = math.prod(grid[1:])
        last = self.train_frames * positions
        return (positions, last) if self.first_frame and last + 1 < math.prod(grid) else None

    def multiplier(self, distance: torch.Tensor, grid: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What scores that are not negative are multiplied by, for distances of token numbers."""
        if self.shape == "constant":
            factor = torch.full_like(distance, self.alpha, dtype=dtype)
        else:
            near, far = self.alpha
            x = distance.to(torch.promote_types(dtype, torch.float32)) / math.prod(grid)
            factor = (near + (far - near) * (x if self.shape == "linear" else x * x)).to(dtype)
        for first, last in self.bands(grid):
            factor = factor.masked_fill((distance >= first) & (distance <= last), self.beta)
        return factor.masked_fill(distance <= self.untouched(grid), 1.0)

    def score_rule(self, grid: tuple[int, ...], device: Any = "cpu") -> ScoreRule:
        def rule(scores: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            factor = self.multiplier((query - key).abs(), grid, scores.dtype)
            return torch.where(scores < 0, scores, scores * factor)

        return rule

    def prepare(
        self, k: torch.Tensor, v: torch.Tensor, extra_kv: Tensors, extra_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors, torch.Tensor | None]:
        if not self.center_keys:
            return k, v, extra_kv, extra_mask
        wide = torch.promote_types(k.dtype, torch.float32)
        total = k.flatten(1, -3).sum(1, keepdim=True, dtype=wide)  # [batch, 1, kv_heads, head_dim]
        count = math.prod(k.shape[1:-2])
        if extra_kv is not None:
            seen = extra_kv[0]
            if extra_mask is not None:
                seen = seen.masked_fill(~extra_mask[..., None, None], 0)
            total = total + seen.sum(1, keepdim=True, dtype=wide)
            count = count + (seen.shape[1] if extra_mask is None else extra_mask.sum(1).view(-1, 1, 1, 1))
        mean = total / count
        if extra_kv is not None:
            extra_kv = (extra_kv[0] - mean).to(k.dtype), extra_kv[1]
        return (k - mean.view(len(k), *[1] * (k.ndim - 3), *k.shape[-2:])).to(k.dtype), v, extra_kv, extra_mask

    def predicate(self, grid: tuple[int, ...], device: Any = "cpu") -> Predicate:
        cut = self.cut(grid)
        if cut is None:
            return lambda query, key: torch.ones_like(query + key, dtype=torch.bool)
        return lambda query, key: (query > cut[0]) | (key <= cut[1])

    def density(self, grid: tuple[int, ...]) -> float:
        self.check(grid)
        cut, tokens = self.cut(grid), math.prod(grid)
        return 1.0 if cut is None else 1 - (cut[0] + 1) * (tokens - cut[1] - 1) / tokens**2

    def lists(self, grid: tuple[int, ...], device: Any = "cpu") -> Lists:
        return _lists(self.cut(grid), math.prod(grid), str(device))


@functools.lru_cache(maxsize=16)
def _lists(cut: tuple[int, int] | None, tokens: int, device: str) -> Lists:
    first = torch.arange(0, tokens, BLOCK)
    last = (first + BLOCK).clamp(max=tokens) - 1
    visited = full = torch.ones(len(first), len(first), dtype=torch.bool)
    if cut is not None:
        visited = (last > cut[0])[:, None] | (first <= cut[1])
        full = (first > cut[0])[:, None] | (last <= cut[1])
    lists = lists_from_map((BLOCK, BLOCK), visited, full)
    return Lists(lists.block, lists.index.to(device), lists.count.to(device), lists.full_count.to(device))


def _number(name: str, value: Any, most: float, words: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"LengthDecay({name}={value!r}): {name} must be a number, {words}")
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError(f"LengthDecay({name}={value!r}): {name} must be {words}")
    return float(value)
