"""What heads are worth: take one away, or all the others, and see what changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vision_attn.analysis.recording import Recording
from vision_attn.analysis.watch import Watch
from vision_attn.kernels.problem import Problem

MEASURES = ("probability", "logit", "accuracy", "cosine")
_MULTIHEAD = inspect.signature(F.multi_head_attention_forward)


def head_mask(model: nn.Module, layer: int | str, heads: int | Iterable[int], others: bool = False) -> HeadMask:
    """While entered, the output of some heads of one layer is 0, before the output projection.

    Works on every layer that `record` can see, attached patterns included. Gradients flow through what is left.

    Args:
        layer: number in order of execution, from 0, as in `record`, or the name of the module.
        heads: which ones, from 0.
        others: take all the others away instead.

    Raises:
        ValueError: at the end, if the model ran and has no such layer or head.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    >>> x = torch.randn(1, 3, 96, 96)
    >>> with torch.no_grad(), head_mask(model, layer=3, heads=[0, 2]):
    ...     changed = model(x)
    """
    return HeadMask(model, layer, heads, others)


class HeadMask(Watch):
    """What `head_mask` returns."""

    def __init__(self, model: nn.Module, layer: int | str, heads: int | Iterable[int], others: bool = False) -> None:
        super().__init__(model)
        self.target, self.others = layer, others
        self.heads = {heads} if isinstance(heads, int) else set(heads)
        self._count = 0  # heads of the layer, once it ran
        self._had: list[str] = []

    def __exit__(self, kind, *error):
        super().__exit__(kind, *error)
        if kind is not None or not self.passes:
            return
        if not self._count:
            had = ", ".join(f"{number} {name}" for number, name in enumerate(self._had)) or "none"
            raise ValueError(f"{type(self.model).__name__} has no attention layer {self.target!r}; it has {had}")
        if not self.heads <= set(range(self._count)):
            raise ValueError(f"layer {self.target} has heads 0 to {self._count - 1}; got {sorted(self.heads)}")

    def _here(self) -> bool:
        number, name = self.layer, self.stack[-1].name
        if number == len(self._had):
            self._had.append(name)
        return self.target in (number, name)

    def _keep(self, x: torch.Tensor, count: int, first: int = 0) -> torch.Tensor:
        """1 for heads that stay and 0 for the others, of `count` heads from `first`."""
        self._count = max(self._count, first + count)
        gone = [(first + head in self.heads) != self.others for head in range(count)]
        return torch.tensor([0.0 if each else 1.0 for each in gone], device=x.device, dtype=x.dtype)

    def _masked(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        if axis == -1:
            return x * self._keep(x, 1)
        if x.ndim == 3:
            heads = x.shape[0] // self.image[0]
            return (x.unflatten(0, (-1, heads)) * self._keep(x, heads)[:, None, None]).flatten(0, 1)
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        return x * self._keep(x, x.shape[axis]).view(shape)

    def saw_sdpa(self, q, *args: Any, **kwargs: Any):
        out = super().saw_sdpa(q, *args, **kwargs)
        return self._masked(out, self.head_axis(q)) if self._here() else out

    def saw_weights(self, weights: torch.Tensor) -> torch.Tensor:
        return self._masked(weights, self.head_axis(weights)) if self._here() else weights

    def saw_attend(self, problem: Problem, first_head: int, call: tuple, out: torch.Tensor) -> torch.Tensor:
        return out * self._keep(out, problem.heads, first_head)[:, None] if self._here() else out

    def saw_multihead(self, module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> bool:
        return not self._here()

    def saw_multihead_function(self, *args: Any, **kwargs: Any) -> Any:
        given = _MULTIHEAD.bind(*args, **kwargs).arguments
        weight, heads = given["out_proj_weight"], given["num_heads"]
        given["out_proj_weight"] = weight * self._keep(weight, heads).repeat_interleave(weight.shape[1] // heads)
        return F.multi_head_attention_forward(**given)


def head_importance(
    model: nn.Module,
    x: torch.Tensor,
    measure: str = "probability",
    target: torch.Tensor | None = None,
    layers: Iterable[int | str] | None = None,
    others: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, torch.Tensor]:
    """What each head is worth, by layer: the change when it is taken away, in float32 `[heads]`.

    The model runs once per head. It is called as it is, so put it in eval mode.

    Args:
        x: images `[batch, channels, height, width]`.
        measure: "probability" or "logit": how much that of the class falls, on average; "accuracy": how much it falls;
            "cosine": 1 - cosine of the model's features (its output where it has no `forward_head`) before and after.
        target: classes `[batch]`; those that the intact model chooses when None, except for "accuracy".
        layers: numbers or names as in `record`; all when None.
        others: take all other heads of the layer away, and keep the one.
        progress: wrapped around the list of heads, for example `tqdm.tqdm`.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=10).eval()
    >>> head_importance(model, torch.randn(2, 3, 96, 96), layers=[5])["blocks.5.attn"].shape
    torch.Size([3])
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: got {measure!r}; allowed: {', '.join(MEASURES)}")
    if measure == "accuracy" and target is None:
        raise ValueError("measure='accuracy' needs target, the right classes [batch]")
    with torch.no_grad():
        with Recording(model, layers, None) as recording:
            before = _outcome(model, x, measure)
        heads: dict[str, int] = {}
        for attention in recording.layers:
            heads[attention.name] = max(heads.get(attention.name, 0), attention.heads)
        if target is None:
            target = before.argmax(-1) if measure != "cosine" else torch.zeros(len(x), dtype=torch.long)
        start = _score(before, before, target, measure)
        change = {name: torch.zeros(count) for name, count in heads.items()}
        for name, head in progress([(name, head) for name, count in heads.items() for head in range(count)]):
            with HeadMask(model, name, head, others):
                after = _outcome(model, x, measure)
            change[name][head] = start - _score(after, before, target, measure)
    return change


def _outcome(model: nn.Module, x: torch.Tensor, measure: str) -> torch.Tensor:
    if measure == "cosine" and hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(x), pre_logits=True).float().flatten(1)
    out = model(x)
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} must return [batch, classes]; give the part of the model that does, such as "
            "model.visual"
        )
    return out.float()


def _score(after: torch.Tensor, before: torch.Tensor, target: torch.Tensor, measure: str) -> float:
    if measure == "cosine":
        return float(F.cosine_similarity(after, before, dim=-1).mean())
    if measure == "accuracy":
        return float((after.argmax(-1) == target.to(after.device)).float().mean())
    values = after.softmax(-1) if measure == "probability" else after
    return float(values.gather(1, target.to(after.device)[:, None]).mean())
