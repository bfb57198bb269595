"""FasterVLM: keep the patches that the class token of the vision tower looks at, in one layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vision_attn.mllm.methods.vtccls import VTCCLS


@dataclasses.dataclass(frozen=True)
class FasterVLM(VTCCLS):
    """Keep the visual tokens with the largest attention of the class token in the layer before the last.

    On a tower without a class token: the attention each patch receives, mean over heads and rows.

    Args:
        keep: visual tokens of an image that stay: a share above 0 and up to 1 (float), or a count (int).
        start_layer: as in `VTCCLS`, which with several layers it is.

    >>> import torch
    >>> from vision_attn.mllm.image import Image
    >>> attention = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    >>> FasterVLM(keep=2).select(Image(torch.zeros(4, 8), torch.zeros(2, 8), attention=attention), 2).tolist()
    [1, 3]

    Paper: [CLS] Attention is All You Need for Training-Free Visual Token Pruning.
    """

    start_layer: int | None = -2
    name: ClassVar[str] = "fastervlm"
