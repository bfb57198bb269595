"""What `attach` takes for vision-language models: one frozen dataclass per method, in one of four kinds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from vision_attn.mllm.image import Image, Layer
    from vision_attn.mllm.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Method:
    """One method; the fields of a subclass are its options."""

    name: ClassVar[str] = ""

    def check(self, model: Any, family: Any) -> None:
        """Raise ValueError when the method cannot work on a model; called before anything is changed."""


@dataclasses.dataclass(frozen=True)
class InputPrune(Method):
    """Drops visual tokens before the text model: every layer and the whole cache get shorter.

    Args:
        keep: visual tokens of an image that stay: a share above 0 and up to 1 (float), or a count (int). Frames of a
            video share its budget evenly where the vision tower is looked at; tiles with words between them, as those
            of Idefics3 and SmolVLM, have each their own. Tokens that end a row of an image stay besides.
    """

    keep: float | int = 0.25
    looks: ClassVar[tuple[str, ...]] = ()  # what of `Image` it needs of the tower: "attention", "keys", "vision"
    merged: ClassVar[bool] = False  # one softmax over the whole width of the tower, not one per head

    def __post_init__(self) -> None:
        check_keep(type(self).__name__, self.keep)

    def tower_layers(self, count: int, cls: bool) -> tuple[int, ...]:
        """Which of `count` layers of the vision tower it looks into: the one that the class token was published for.

        Blocks that attend in windows tell nothing across them: where a tower has such blocks, those chosen among the
        others are taken, or else the last of these.
        """
        return (max(count - 2, 0) if cls else count - 1,)

    def select(self, image: Image, keep: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Sorted indices of `keep` tokens of `image`; or those of the places to use, and the features to put there."""
        raise NotImplementedError

    def count(self, tokens: int) -> int:
        """How many of `tokens` stay; an int above that is refused."""
        return keep_count(type(self).__name__, self.keep, tokens)


@dataclasses.dataclass(frozen=True)
class LayerPrune(Method):
    """Drops visual tokens inside the text model: the layers from a cut on, and their part of the cache, get shorter."""

    def cuts(self, layers: int) -> tuple[int, ...]:
        """The layers, of so many, at whose entry tokens may be dropped; at least 1."""
        raise NotImplementedError

    def watches(self, layers: int) -> tuple[int, ...]:
        """The layers whose attention it reads, besides those of the cuts: `observe` is called there."""
        return ()

    def observe(self, layer: Layer, notes: dict[str, Any]) -> None:
        """Look at a watched layer, and leave what a later cut needs in `notes`, which live as long as the prompt."""

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        """Bool `[batch, n]` over the tokens of a cut layer: the visual ones to keep. Others always stay."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class CachePrune(Method):
    """Shortens the cache after the prompt was read; the first token is that of the untouched model."""

    rows: ClassVar[int] = 32  # last prompt rows whose attention it needs

    def attend(self, layer: Layer, q: Any, k: Any, v: Any, mask: Any, compute: Callable[..., Any]) -> torch.Tensor:
        """Around the attention of a layer that reads the prompt, `[batch, heads, n, head_dim]` to `[batch, n, heads,
        head_dim]`; may leave in `layer.notes` what `select` needs."""
        return compute(q, k, v, mask)

    def select(self, layer: Layer) -> torch.Tensor:
        """Bool `[batch, kv_heads, n]`: the visual tokens in the cache of a layer to keep. Others always stay."""
        raise NotImplementedError

    def store(self, layer: Layer, keep: torch.Tensor) -> tuple[Any, Tokens]:
        """The layer of the cache that holds the tokens `keep` (bool `[batch, kv_heads, n]`) of `layer.cached`, and what
        its tokens are."""
        from vision_attn.mllm.caches import shortened

        return shortened(*layer.cached, keep, layer.tokens)


def check_numbers(method: Method, **limits: tuple[float, float]) -> None:
    """Raise ValueError for a field that is no finite number within its limits, least and most."""
    for field, (least, most) in limits.items():
        value = getattr(method, field)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not least <= value <= most:
            allowed = f"from {least} to {most}" if math.isfinite(most) else f"of at least {least}"
            raise ValueError(f"{type(method).__name__}({field}={value!r}): {field} is a finite number {allowed}")


def check_keep(name: str, keep: Any) -> None:
    """Raise for a `keep` that is neither a share above 0 and up to 1 nor a count of at least 1."""
    good = isinstance(keep, (int, float)) and not isinstance(keep, bool) and math.isfinite(keep)
    if not good or (isinstance(keep, float) and not 0 < keep <= 1) or (isinstance(keep, int) and keep < 1):
        raise ValueError(
            f"{name}(keep={keep!r}): keep is a share of the visual tokens above 0 and up to 1.0, or a count of at "
            "least 1"
        )


def keep_count(name: str, keep: float | int, tokens: int) -> int:
    """How many of `tokens` stay.

    Raises:
        ValueError: a count above `tokens`.
    """
    if isinstance(keep, int):
        if keep > tokens:
            raise ValueError(f"{name}(keep={keep}): the image has {tokens} tokens; keep at most so many, or a share")
        return keep
    return max(1, round(keep * tokens))


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the `count` largest of `scores` `[n]`, earlier ones first in a tie.

    >>> largest(torch.tensor([1.0, 5, 2, 5]), 2).tolist()
    [1, 3]
    """
    return ranked(scores)[:count].sort().values


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """Indices of `scores` `[n]` from the largest to the smallest, earlier ones first in a tie."""
    return scores.float().argsort(descending=True, stable=True)


def top(scores: torch.Tensor, among: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Bool `[batch, n]`: in each row the `counts` largest `scores` where `among` is True, earlier ones first in a tie.

    >>> top(torch.tensor([[3.0, 9, 3, 5]]), torch.tensor([[True, False, True, True]]), [2]).tolist()
    [[True, False, False, True]]
    """
    order = scores.float().masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device)
    chosen = place < torch.tensor(counts, device=scores.device)[:, None]
    return torch.zeros_like(among).scatter(1, order, chosen) & among
