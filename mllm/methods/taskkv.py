"""TaskKV: heads that say something else than the others keep the whole image, prompt by prompt."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import CachePrune, top
from vision_attn.mllm.methods.streamingheads import check_ends, ends


@dataclasses.dataclass(frozen=True)
class TaskKV(CachePrune):
    """Heads whose output at the last prompt token is far from that of the others keep all cached tokens.

    The rest keeps text, the first and last tokens, and the visual ones between them that the last token attends to.
    Which heads are far is found anew for every prompt and layer. The prompt is read dense, so the first token is the
    same.

    The paper's abstract leaves open what is built here: the distance is one minus the cosine to the mean over heads,
    before the output projection; a KV head is as far as the farthest of its query heads; the tokens between the ends
    are chosen by attention, mean over the query heads of each KV head.

    Args:
        heads: share of the KV heads of a layer that keep everything, above 0 and up to 1; at least one does.
        sink: first tokens of a prompt that stay, text included.
        recent: last ones, text included.
        middle: visual tokens between them that stay.

    Paper: Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads.

    >>> TaskKV(middle=64).heads
    0.25
    """

    heads: float = 0.25
    sink: int = 4
    recent: int = 64
    middle: int = 128
    name: ClassVar[str] = "task-kv"

    def __post_init__(self) -> None:
        if not 0 < self.heads <= 1:
            raise ValueError(f"TaskKV(heads={self.heads!r}): a share of the KV heads above 0 and up to 1")
        check_ends(self, "middle")

    def check(self, model: Any, family: Any) -> None:
        if model.config.get_text_config().num_key_value_heads < 2:
            raise ValueError(
                f"TaskKV tells KV heads apart, and {type(model).__name__} has one per layer, which would keep "
                "everything; use KVPrune"
            )

    def attend(self, layer: Layer, q: Any, k: Any, v: Any, mask: Any, compute: Any) -> torch.Tensor:
        out = compute(q, k, v, mask)
        last = layer.last()[..., None, None].expand(-1, -1, *out.shape[2:])
        layer.notes["outputs"] = out.gather(1, last)[:, 0].float()
        return out

    def select(self, layer: Layer) -> torch.Tensor:
        outputs, kv_heads = layer.notes["outputs"], layer.cached[0].shape[1]
        near = torch.cosine_similarity(outputs, outputs.mean(1, keepdim=True), dim=-1)
        far = -near.unflatten(1, (kv_heads, -1)).amin(-1)
        everything = top(far, torch.ones_like(far, dtype=torch.bool), [max(1, round(self.heads * kv_heads))] * len(far))
        kept = ends(layer.tokens, self.sink, self.recent)
        scores = layer.attention(layer.last())[:, :, 0].unflatten(1, (kv_heads, -1)).mean(2)
        between = layer.tokens.visual & ~kept
        middle = [top(head, between, [self.middle] * len(head)) for head in scores.unbind(1)]
        return everything[..., None] | kept[:, None] | torch.stack(middle, 1)
