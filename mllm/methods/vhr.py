"""VHR: heads whose output changes when the image is taken away are made louder."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import check_layers
from vision_attn.mllm.heads import HeadGain
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.steering import question


@dataclasses.dataclass(frozen=True)
class VHR(HeadGain):
    """Multiply the outputs of vision-aware heads by `alpha`, for all tokens of the prompt and of the answer.

    Vision-aware are, in each layer, the heads whose output at the last token of the prompt is further than the (lower)
    median from what it is when the words are read without the image; but not those that stand out in this distance and
    in the squared length of their output without the image, by more than a population standard deviation above the
    mean: they speak because the image is missing. Layers are decided from the first on, with the earlier ones made
    louder already. Costs one or two passes over the words alone when a prompt is read, and a multiplication per layer.

    Args:
        alpha: at least 0; 1 changes nothing, 2 and 3 work, 4 destroys the text, as published.
        layers: of the text model, from 0; None for layer 1 and the last 14 of 32, or so many of another depth; for
            InstructBLIP the last 18 of 32.
        shallow: with `layers=None`, take layer 1 too. It can be unstable on hard questions.
        text_branch: "reinforced" reads the words alone with louder heads too, "plain" reads them once as they are. The
            paper does not say which.

    Raises:
        ValueError: an alpha that is negative or no number; another text branch; a layer that is not there.

    >>> VHR(alpha=2.0, shallow=False).layers_of(32, "LlavaForConditionalGeneration")[:3]
    (18, 19, 20)

    Paper: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (ACL 2025).
    """

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    shallow: bool = True
    text_branch: str = "reinforced"
    name: ClassVar[str] = "vhr"

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(0, math.inf))
        if self.text_branch not in ("reinforced", "plain"):
            raise ValueError(f"VHR(text_branch={self.text_branch!r}): 'reinforced' or 'plain'")

    def check(self, model: Any, family: Any) -> None:
        self.layers_of(len(model.get_decoder().layers), family.name)

    @property
    def lockstep(self) -> bool:
        return self.text_branch == "reinforced"

    def layers_of(self, layers: int, family: str) -> tuple[int, ...]:
        if self.layers is not None:
            return tuple(sorted(check_layers("VHR", self.layers, layers)))
        bridged = family.startswith("InstructBlip")
        deep = range(layers - max(1, round((18 if bridged else 14) / 32 * layers)), layers)
        return tuple(sorted({*deep, *((1,) if self.shallow and not bridged and layers > 1 else ())}))

    def gains(self, layer: int, pictured: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        moved = divergence(pictured, words)[:, -1]
        alone = words[:, -1].float().square().sum(-1)
        moved = moved.masked_fill(_stands_out(moved) & _stands_out(alone), 0)
        aware = moved > moved.median(-1, keepdim=True).values
        return 1 + (self.alpha - 1) * aware


def divergence(pictured: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """VHD, float32 `[..., heads]`, of head outputs `[..., heads, head_dim]` with and without the image."""
    return (pictured.float() - words.float()).norm(dim=-1)


def _stands_out(x: torch.Tensor) -> torch.Tensor:
    return x > x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True)


@dataclasses.dataclass(frozen=True)
class _Divergence(HeadGain):
    last: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", {})

    def layers_of(self, layers: int, family: str) -> tuple[int, ...]:
        return tuple(range(layers))

    def gains(self, layer: int, pictured: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        self.found[layer] = divergence(pictured, words)
        return pictured.new_ones(len(pictured), pictured.shape[-2])


@torch.no_grad()
def vhd(model: Any, last: int = 1, **inputs: Any) -> torch.Tensor:
    """How far the image moves the output of every head: VHD, float32 `[batch, last, layers, heads]`.

    The last tokens are words; with an answer behind the prompt, `last` of its length gives VHD for every token of the
    answer, and `t_vhd` of that an indicator of hallucination: low where the image did not matter.

    Args:
        model: one of `vision_attn.mllm.FAMILIES`, nothing attached.
        last: how many of the last tokens, at least 1.
        inputs: of the model: ids, mask, pixels.

    Raises:
        ValueError: a row has no image, or fewer words than `last` after it.

    >>> from vision_attn.mllm import tiny
    >>> model = tiny.model().eval()
    >>> ids = torch.tensor([[1, *[model.config.image_token_id] * 64, 7, 8]])
    >>> vhd(model, input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 1, 4, 6])

    Paper: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (ACL 2025).
    """
    from vision_attn.mllm.attachment import attach

    if isinstance(last, bool) or not isinstance(last, int) or last < 1:
        raise ValueError(f"vhd(last={last!r}): a number of tokens, at least 1")
    method = _Divergence(last)
    with attach(model, method) as run:
        model(**{**inputs, "use_cache": False})
        prompt = run.engine.current
        if prompt is None or not all(prompt.visual):
            raise ValueError("vhd compares a prompt with and without its image, and a row has none")
        if not question(prompt)[:, -last:].all() or last > prompt.length:
            raise ValueError(f"vhd(last={last}): a row has fewer words after its last image")
    return torch.stack([method.found[layer] for layer in sorted(method.found)], 2)


def t_vhd(vhd: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """The `k` largest VHD of each layer, summed over layers: `[...]` from `[..., layers, heads]`.

    Args:
        k: heads per layer; None for an eighth of them, at least 1. The paper gives no number.

    >>> t_vhd(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), k=1)
    tensor(6.)
    """
    return vhd.topk(max(1, vhd.shape[-1] // 8) if k is None else k, -1).values.sum((-2, -1))
