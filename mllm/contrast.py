"""Methods that choose the next token from more than the logits of the model: the kind, and the formulas they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vision_attn.mllm.method import Method

if TYPE_CHECKING:
    from vision_attn.mllm.branch import Branch
    from vision_attn.mllm.reading import Reading


OUT_OF_REACH = 10000.0


@dataclasses.dataclass(frozen=True)
class Step:
    """What is known when a token is chosen.

    Args:
        number: of the token among those generated in this call, from 1.
        other: logits of the second branch, float32 `[rows, vocabulary]`; None where there is none.
        early: layer -> logits of what enters it, float32 `[rows, vocabulary]`, where the method asked for them.
        branch: the second branch.
    """

    number: int
    other: torch.Tensor | None
    early: dict[int, torch.Tensor]
    branch: Branch | None = None


@dataclasses.dataclass(frozen=True)
class Contrast(Method):
    """Chooses the next token from the logits and others beside them.

    Args of subclasses are their options; `text` is True for methods that change rows without an image too, and those
    have no second branch.
    """

    text: ClassVar[bool] = False

    @property
    def contrasts(self) -> bool:
        """Whether, with these options, it changes logits at all."""
        return True

    def other(self, reading: Reading) -> Reading:
        """The prompt as the second branch reads it."""
        raise NotImplementedError

    def early(self, layers: int, model: Any) -> tuple[int, ...]:
        """The layers, of so many, whose input it wants to see as logits."""
        return ()

    def watch(self, engine: Any, undo: list[Callable[[], None]]) -> None:
        """Hook what it wants to see of the model."""

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """New logits from those of the main branch, float32 `[rows, vocabulary]`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WordContrast(Contrast):
    """Chooses the next token by `gamma (c - u) + u`, of log-probabilities with the image, `c`, and of the words alone,
    `u`. Subclasses have a field `gamma`; 1 makes no second branch."""

    least: ClassVar[float] = 0.1  # words less probable than this share of the best one are never said

    @property
    def contrasts(self) -> bool:
        return self.gamma != 1

    def other(self, reading: Reading) -> Reading:
        return reading.without_images()

    def combine(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        with_image, without = z.log_softmax(-1), step.other.log_softmax(-1)
        return cut(self.gamma * (with_image - without) + without, with_image, self.least)


def cut(final: torch.Tensor, z: torch.Tensor, beta: float) -> torch.Tensor:
    """`final` where `z` is at least `beta` times as probable as its best token; the others are out of reach.

    Papers put -inf there. Here it is `z - 10000`, whose probability is 0 all the same: should a processor that comes
    later forbid all that is left, as one for a least length may, the likeliest of the others is said, not token 0.

    >>> cut(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([3.0, 2.0, -1.0]), beta=0.1).tolist()
    [5.0, 6.0, -10001.0]
    """
    least = z.amax(-1, keepdim=True) + (math.log(beta) if beta > 0 else -math.inf)
    return torch.where(z < least, z - OUT_OF_REACH, final)


def contrast(z: torch.Tensor, other: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """`(1 + alpha) z - alpha other`, cut.

    >>> contrast(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0]), alpha=1.0, beta=0.1).tolist()
    [2.0, 2.0]
    """
    return cut((1 + alpha) * z - alpha * other, z, beta)
