"""KVPrune: after the prompt was read, keep the cached visual tokens that its end looked at."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import CachePrune, check_keep, keep_count, top


@dataclasses.dataclass(frozen=True)
class KVPrune(CachePrune):
    """Shorten the cache of every layer by the attention of the last prompt tokens, each KV head for itself.

    Text is never dropped. Prefill costs what it costs without it, and the first token is the same.

    Args:
        keep: visual tokens of a row that stay: a share above 0 and up to 1 (float), or a count (int).
        rows: last prompt tokens whose attention counts, at least 1.
        pool: the scores are maxima over so many neighbours, odd.

    Paper: SnapKV: LLM Knows What You are Looking for Before Generation; here for visual tokens only.
    """

    keep: float | int = 0.25
    rows: int = 32
    pool: int = 7
    name: ClassVar[str] = "kvprune"

    def __post_init__(self) -> None:
        check_keep("KVPrune", self.keep)
        if self.rows < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"KVPrune(rows={self.rows}, pool={self.pool}): rows at least 1, pool odd")

    def select(self, layer: Layer) -> torch.Tensor:
        visual, heads = layer.tokens.visual, layer.cached[0].shape[1]
        scores = layer.attention(layer.last(self.rows)).mean(2).unflatten(1, (heads, -1)).mean(2)
        scores = torch.nn.functional.max_pool1d(scores, self.pool, 1, self.pool // 2)
        counts = [keep_count("KVPrune", self.keep, n) if n else 0 for n in visual.sum(1).tolist()]
        kept = [top(head, visual, counts) for head in scores.unbind(1)]
        return torch.stack(kept, 1)
