"""VisualExit: from some layer on, the text model goes on without the picture."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import LayerPrune
from vision_attn.mllm.ranking import words_after

if TYPE_CHECKING:
    from vision_attn.mllm.exits import ExitRouters

RULES = ("fixed", "attention", "router")


@dataclasses.dataclass(frozen=True)
class VisualExit(LayerPrune):
    """Drop all visual tokens at one layer: a fixed one, or for every row the one from which it needs them no more.

    Args:
        layer: the first layer without them, at least 1, for the rule "fixed"; None takes three quarters of the depth.
        rule: "fixed"; "attention", a rule of this package: what the last prompt token gives to the picture, mean over
            heads, stayed below `tau` for `patience` layers in a row, after the first quarter of the layers; or
            "router", the published one: a small network after each layer says so.
        tau: share of attention, above 0 and up to 1.
        patience: layers, at least 1.
        routers: from `fit_exit`, for the rule "router".

    Raises:
        ValueError: options that do not fit together, or routers of another model.

    >>> VisualExit().cuts(32)
    (24,)

    Paper: Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings. With
    a fixed layer it is also the layer part of: Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to
    See.
    """

    layer: int | None = None
    rule: str = "fixed"
    tau: float = 0.02
    patience: int = 2
    routers: ExitRouters | None = dataclasses.field(default=None, compare=False)
    name: ClassVar[str] = "visual-exit"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"VisualExit(rule={self.rule!r}): allowed are {', '.join(map(repr, RULES))}")
        if self.rule != "fixed" and self.layer is not None:
            raise ValueError(f"VisualExit(layer={self.layer}, rule={self.rule!r}): the layer is for the rule 'fixed'")
        if (self.rule == "router") != (self.routers is not None):
            raise ValueError(
                "VisualExit: the rule 'router' needs routers=, from fit_exit, and no other rule takes them"
            )
        if not 0 < self.tau <= 1 or self.patience < 1:
            raise ValueError(
                f"VisualExit(tau={self.tau}, patience={self.patience}): tau in (0, 1], patience at least 1"
            )

    def check(self, model: Any, family: Any) -> None:
        if self.routers is not None:
            self.routers.check(model)

    def cuts(self, layers: int) -> tuple[int, ...]:
        if self.rule == "fixed":
            return (max(1, round(0.75 * layers)) if self.layer is None else self.layer,)
        if self.rule == "router":
            return self.routers.layers
        return tuple(range(self._quarter(layers) + 1, layers))

    def watches(self, layers: int) -> tuple[int, ...]:
        if self.rule != "attention":
            return ()
        return tuple(range(max(0, self._quarter(layers) - self.patience + 1), layers - 1))

    @staticmethod
    def _quarter(layers: int) -> int:
        """The first layer after which the picture may go."""
        return math.ceil(layers / 4)

    def observe(self, layer: Layer, notes: dict[str, Any]) -> None:
        given = layer.attention(layer.last())[:, :, 0].mean(1)
        low = (given * layer.tokens.visual).sum(1) < self.tau
        notes["low"] = torch.where(low, notes.get("low", 0) + 1, 0)  # layers in a row, of each row

    def select(self, layer: Layer, notes: dict[str, Any]) -> torch.Tensor:
        visual = layer.tokens.visual
        if self.rule == "fixed":
            return torch.zeros_like(visual)
        leaves = notes["low"] >= self.patience if self.rule == "attention" else self.routers.leave(layer)
        return visual & ~leaves[:, None]


def router_input(layer: Layer) -> torch.Tensor:
    """The mean of the words after the picture but the last, and the last word, `[batch, 2 width]`, float32."""
    hidden, last = layer.hidden.float(), layer.last()[:, 0]
    place = torch.arange(len(layer.tokens), device=last.device)
    asked = words_after(layer.tokens) & (place != last[:, None])
    mean = (hidden * asked[..., None]).sum(1) / asked.sum(1).clamp(min=1)[:, None]
    return torch.cat([mean, hidden[torch.arange(len(last), device=last.device), last]], 1)
