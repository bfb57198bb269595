"""ZipVL: in every layer, attention and cache for as many tokens as hold the attention of some probing rows."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import CachePrune, top
from vision_attn.mllm.methods.streamingheads import ends
from vision_attn.mllm.rows import row_weights, visible
from vision_attn.mllm.tokens import Tokens, take, take_mask

MODES = ("drop", "quantize")


@dataclasses.dataclass(frozen=True)
class ZipVL(CachePrune):
    """Attend among the important tokens of each layer only, and drop the cache of the others, or keep it in fewer bits.

    How many are important is found in each layer: as many as it takes for the largest to receive `tau` of the attention
    of the probing rows, mean over heads. Which are: those that receive most per row that can see them, text, and the
    last tokens. The others get no attention output in that layer, and go on by their residual path. Layers with a
    sliding window stay as they are.

    The two versions of the paper leave open what is built here: 64 last and 64 random probing rows, text is always
    important, what is not important gets zero. Quantized: asymmetric, keys per channel in groups of 64 tokens, values
    per token, scale and zero in float16, the last tokens and the answer in full. Every step dequantizes all, which
    takes time: quantizing saves memory only.

    Args:
        tau: share of the attention that the important tokens hold, above 0 and up to 1.
        mode: "drop" (second version of the paper) or "quantize" (first version).
        bits: of important and other tokens when quantized: 1, 2, 4 or 8 each.
        recent: last tokens of the prompt that probe and are important, at least 1.
        probes: tokens at random that probe besides these.
        seed: of the draw.

    Paper: ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression.

    >>> ZipVL(tau=0.95, mode="quantize").bits
    (4, 2)
    """

    tau: float = 0.975
    mode: str = "drop"
    bits: tuple[int, int] = (4, 2)
    recent: int = 64
    probes: int = 64
    seed: int = 0
    name: ClassVar[str] = "zipvl"

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"ZipVL(tau={self.tau!r}): a share of the attention above 0 and up to 1")
        if self.mode not in MODES:
            raise ValueError(f"ZipVL(mode={self.mode!r}): one of {', '.join(MODES)}")
        object.__setattr__(self, "bits", tuple(self.bits))
        if len(self.bits) != 2 or not set(self.bits) <= {1, 2, 4, 8}:
            raise ValueError(f"ZipVL(bits={self.bits!r}): bits of important and of other tokens, each 1, 2, 4 or 8")
        for name, least in (("recent", 1), ("probes", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"ZipVL({name}={getattr(self, name)!r}): a count of tokens, at least {least}")

    def attend(self, layer: Layer, q: Any, k: Any, v: Any, mask: Any, compute: Any) -> torch.Tensor:
        n = q.shape[2]
        k, v = k[:, :, :n], v[:, :, :n]  # a static cache has room for more
        important = layer.notes["important"] = self._important(layer, q, k, mask)
        if torch.equal(important, layer.tokens.valid):
            return compute(q, k, v, mask)
        tokens, index = layer.tokens.kept(important)
        narrow = None
        if mask is not None and mask.ndim == 4:
            narrow = take_mask(mask, index, tokens, len(tokens))
        elif mask is not None:
            narrow = tokens.mask()
        q, k, v = (take(t, index, 2) for t in (q, k, v))
        if mask is None and not tokens.whole:
            narrow = visible(q, k, None, slice(None), tokens.valid)
        out = compute(q, k, v, narrow)
        out = out.masked_fill(~tokens.valid[..., None, None], 0)
        return out.new_zeros(len(q), n, *out.shape[2:]).scatter(1, index[..., None, None].expand(out.shape), out)

    def _important(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, mask: Any) -> torch.Tensor:
        """Bool `[batch, n]`."""
        tokens = layer.tokens
        rows, probing = self._rows(tokens.valid, layer.number)
        mask = mask if mask is not None and mask.ndim == 4 else None
        weights = row_weights(q, k, mask, layer.attn.scaling, rows, tokens.valid).mean(1) * probing[..., None]
        sees = (visible(q, k, mask, rows, tokens.valid)[:, 0] & probing[..., None]).sum(1)
        received = weights.sum(1)
        held = received.sort(dim=1, descending=True).values.cumsum(1)
        counts = (held < self.tau * probing.sum(1, keepdim=True)).sum(1) + 1
        chosen = top(received / sees.clamp(min=1), tokens.valid, counts.tolist())
        return tokens.valid & (chosen | ~tokens.visual | ends(tokens, 0, self.recent))

    def _rows(self, valid: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The probing rows, long `[batch, rows]`, and which of them are real. A row draws as if it were alone."""
        drawn = []
        for row in valid:
            real = row.nonzero()[:, 0]
            early = real[: -self.recent]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            some = torch.randperm(len(early), generator=generator)[: self.probes].to(real.device)
            drawn.append(torch.cat([early[some], real[-self.recent :]]))
        rows = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
        return rows.clamp(min=0), rows >= 0

    def select(self, layer: Layer) -> torch.Tensor:
        important = layer.notes["important"][:, None].expand(-1, layer.cached[0].shape[1], -1)
        return important if self.mode == "drop" else torch.ones_like(important)

    def store(self, layer: Layer, keep: torch.Tensor) -> tuple[Any, Tokens]:
        if self.mode == "drop":
            return super().store(layer, keep)
        from vision_attn.mllm.caches import QuantizedLayer

        full = ends(layer.tokens, 0, self.recent) | ~layer.tokens.visual.any(1, keepdim=True)  # or no image in the row
        important = layer.notes["important"]
        parts = [(important & ~full, self.bits[0]), (~important & ~full, self.bits[1])]
        return QuantizedLayer.of(*layer.cached, layer.tokens, parts, full)
