"""CDPruner: keep the tokens that a determinantal point process finds relevant to the words, and different."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Image
from vision_attn.mllm.method import InputPrune
from vision_attn.mllm.methods.divprune import products

LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class CDPruner(InputPrune):
    """Keep visual tokens that are different from each other and relevant to the words, by greedy search.

    The kernel is `K_ij = r_i cos(x_i, x_j) r_j` of the features `x`; each step takes the token that adds the most to
    the determinant. The relevance `r` is made of the cosines of the patches to pieces of the words in the space of the
    CLIP that the tower of the model is from, with a minus sign as in the released code, scaled to (0, 1]. Checkpoints
    of vision-language models do not carry that CLIP along, so the caller gives it.

    Args:
        keep: visual tokens of an image that stay: a share above 0 and up to 1 (float), or a count (int).
        clip: a transformers `CLIPModel` with the tower of the model; None takes all tokens as equally relevant, warns,
            and leaves a search for diversity.
        encode: makes of the ids of the words of a row (long `[n]`, template included) the ids for the text encoder of
            CLIP, long `[pieces, length]`.

    Raises:
        ValueError: one of `clip` and `encode` without the other, or a CLIP of another width.

    >>> import torch
    >>> features = torch.tensor([[2.0, 0], [1, 0.1], [0, 3], [0.1, 1]])
    >>> CDPruner().select(Image(features, torch.zeros(2, 2)), 2).tolist()
    [0, 2]

    Paper: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs.
    """

    clip: Any = dataclasses.field(default=None, repr=False)
    encode: Callable[[torch.Tensor], torch.Tensor] | None = dataclasses.field(default=None, repr=False)
    name: ClassVar[str] = "cdpruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.clip is None) != (self.encode is None):
            raise ValueError("CDPruner: clip= and encode= are used together; give both, or none")

    @property
    def looks(self) -> tuple[str, ...]:
        return () if self.clip is None else ("vision",)

    def check(self, model: Any, family: Any) -> None:
        if self.clip is None:
            warnings.warn("CDPruner without clip= takes all tokens as equally relevant to the words", stacklevel=3)
            return
        have = getattr(model.config.vision_config, "hidden_size", None)
        width = self.clip.config.vision_config.hidden_size
        if not family.cls or have != width:
            raise ValueError(
                f"CDPruner(clip=...): this CLIP has a tower of width {width}, and {family.name} has one of width "
                f"{have}; give the CLIP whose tower the model has, or none"
            )

    def select(self, image: Image, keep: int) -> torch.Tensor:
        unit = torch.nn.functional.normalize(image.features.float(), dim=-1)
        relevance = torch.ones_like(unit[:, 0]) if self.clip is None else self._relevance(image)
        return greedy(unit, relevance, keep)

    def _relevance(self, image: Image) -> torch.Tensor:
        if image.ids is None:
            raise ValueError("CDPruner(clip=...) reads the words of a prompt, and this one came as embeddings")
        if image.vision.shape[-1] != self.clip.config.vision_config.hidden_size:
            raise ValueError("CDPruner(clip=...) needs one patch per token; this model joins several, use no clip=")
        clip = self.clip
        patches = clip.visual_projection(
            clip.vision_model.post_layernorm(image.vision.to(clip.visual_projection.weight))
        )
        words = clip.get_text_features(self.encode(image.ids).to(patches.device)).pooler_output.to(patches)
        patches, words = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (patches, words))
        found = -(patches @ words.T).mean(1)
        low, high = found.aminmax()
        return (found - low + 1e-6) / (high - low).clamp(min=1e-6)


def greedy(unit: torch.Tensor, relevance: torch.Tensor, keep: int) -> torch.Tensor:
    """Sorted indices of `keep` of the unit rows `[n, width]` with, step by step, the largest determinant of their
    products, weighed by the `relevance` `[n]` of both.

    Paper: Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity.
    """
    rows, gain = unit * relevance[:, None], relevance.square()
    pairs, basis = products(rows), rows.new_zeros(keep, len(rows))
    chosen = []
    for step in range(keep):
        best = gain.argmax()
        chosen.append(best)
        edge = (pairs(best) - basis[:step, best] @ basis[:step]) / gain[best].clamp(min=LEAST).sqrt()
        basis[step] = edge
        gain = (gain - edge.square()).clamp(min=LEAST)
        gain[torch.stack(chosen)] = -torch.inf
    return torch.stack(chosen).sort().values
