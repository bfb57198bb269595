"""Token merging as a method: its options, as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

PARTITIONS = ("tome", "grid", "vggt")
_DEFAULT = {  # what None means in each partition
    "tome": {"ratio": 8, "protect": 0.0, "proportional": True},
    "grid": {"ratio": 0.5, "protect": 0.0, "proportional": False},
    "vggt": {"ratio": 0.9, "protect": 0.1, "proportional": False},
}


@dataclasses.dataclass(frozen=True)
class TokenMerge:
    """Fewer tokens: those that look alike are averaged. `attach(model, TokenMerge())` puts it into a transformer.

    - "tome": between attention and MLP of every block, for good: tokens go from layer to layer as averages, weighted
      by how many each stands for. Every other token may merge into one of the rest. After the last block all get their
      place back, so that maps and pooling keep their meaning.
    - "grid": around attention alone: one token of every cell takes in others, attention and its projections run on
      what is left, and each token gets the result of where it went. The rest of the block sees all tokens.
    - "vggt": the same for queries, keys and values, after rotary positions, over frames: the frames `dst_frames`,
      special tokens, and one token per cell of the other frames take in others. In VGGT and models built like it this
      goes into the attention over all frames by itself. Of many frames 32 % of the tokens are left (35 % if `strict`),
      not the nominal 10 %: a quarter takes in others, and a tenth is protected.

    Args:
        partition: "tome", "grid" or "vggt".
        ratio: how many merge. "tome": an int per layer (8 by default), a pair `(int, inflect)` for a number that goes
            linearly from `int * (1 - inflect)` to `int * (1 + inflect)` over the layers, or a share of the patch tokens
            per layer; never more than half of them. Otherwise a share of all tokens, 0.5 for "grid" and 0.9 for "vggt";
            never more than may merge.
        protect: "vggt": share of the tokens, at equal distances, that never merge; 0.1 by default.
        cell: "grid" and "vggt": height and width of a cell in tokens.
        seed: picks the token of a cell, the same in every layer and call; None is the first one.
        dst_frames: "vggt": frames whose tokens all stay.
        num_special: "vggt": tokens before the grid of every frame; a tower that is known tells them itself.
        proportional: a key that stands for s tokens counts s times, by `log(s)` on its scores; by default for "tome".
        strict: "vggt": protected tokens that also take in others are kept twice, as in the published code.

    Raises:
        TypeError, ValueError: an option of the wrong kind, out of range, or of another partition.

    >>> TokenMerge(ratio=(8, -0.5)).schedule(4)
    [12, 9, 6, 4]

    Papers: Token Merging: Your ViT But Faster; Token Merging for Fast Stable Diffusion; FastVGGT.
    """

    partition: str = "tome"
    ratio: int | float | tuple[int, float] | None = None
    protect: float | None = None
    cell: int | tuple[int, int] = 2
    seed: int | None = 33
    dst_frames: tuple[int, ...] = (0,)
    num_special: int = 0
    proportional: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}; got {self.partition!r}")
        for name, value in _DEFAULT[self.partition].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("ratio", "cell", "dst_frames"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self._ratio_fits():
            allowed = "a share from 0 to 1"
            if self.partition == "tome":
                allowed = "an int of at least 0, a share from 0.0 to 0.5, or (int, inflect from -1 to 1)"
            raise ValueError(f"ratio of partition {self.partition!r} must be {allowed}; got {self.ratio!r}")
        if not _is_number(self.protect) or not 0 <= self.protect < 1:
            raise ValueError(f"protect must be a share, at least 0 and below 1; got {self.protect!r}")
        cell = self.cell if isinstance(self.cell, tuple) else (self.cell, self.cell)
        if len(cell) != 2 or not all(_is_count(n, 1) for n in cell):
            raise ValueError(f"cell must be one or two ints of at least 1; got {self.cell!r}")
        object.__setattr__(self, "cell", cell)
        if self.seed is not None and not _is_count(self.seed, 0):
            raise ValueError(f"seed must be an int of at least 0, or None; got {self.seed!r}")
        if not isinstance(self.dst_frames, tuple) or not all(_is_count(n, 0) for n in self.dst_frames):
            raise ValueError(f"dst_frames must be numbers of frames from 0; got {self.dst_frames!r}")
        if not _is_count(self.num_special, 0):
            raise ValueError(f"num_special must be an int of at least 0; got {self.num_special!r}")
        for name in ("proportional", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        self._check_partition()

    def _ratio_fits(self) -> bool:
        ratio = self.ratio
        if self.partition != "tome":
            return _is_number(ratio) and 0 <= ratio <= 1
        if isinstance(ratio, tuple):
            return len(ratio) == 2 and _is_count(ratio[0], 0) and _is_number(ratio[1]) and -1 <= ratio[1] <= 1
        return _is_count(ratio, 0) or (isinstance(ratio, float) and 0 <= ratio <= 0.5)

    def _check_partition(self) -> None:
        """Nothing that is given may have no effect."""
        others = {"protect": 0.0, "dst_frames": (0,), "num_special": 0, "strict": False}
        if self.partition == "tome":
            others |= {"cell": (2, 2), "seed": 33}
        if self.partition == "grid":
            others["proportional"] = False
        idle = [name for name, value in others.items() if self.partition != "vggt" and getattr(self, name) != value]
        if idle:
            raise ValueError(f"partition {self.partition!r} has no {', '.join(idle)}")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values, as of a pattern."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"pattern": "token-merge"} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def schedule(self, layers: int) -> list[int] | None:
        """Tokens that merge in each layer; None where that is a share of what is there."""
        if isinstance(self.ratio, float):
            return None
        count, inflect = self.ratio if isinstance(self.ratio, tuple) else (self.ratio, 0.0)
        low = int(count * (1 - inflect))
        step = (2 * count - 2 * low) / max(layers - 1, 1)
        return [int(low + step * layer) for layer in range(layers)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
