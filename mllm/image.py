"""What methods look at: an image on its way into the text model, and a layer of the text model reading the prompt."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from vision_attn.mllm.tokens import Tokens, take


@dataclasses.dataclass(frozen=True)
class Image:
    """The visual tokens of one image, or one frame of a video, of one row of the batch; newline tokens are left out.

    What a method does not name in its `looks` is None.

    Args:
        features: `[tokens, width]`, as the text model gets them.
        text: `[text tokens, width]`, the embedded words of the row.
        ids: long `[text tokens]`, these words; None where the prompt came as embeddings.
        number: of the image in the batch, for methods that draw.
        attention: float32 `[layers of the tower, tokens]`: what the class token gives to each, mean over heads; where
            there is none, what each receives, mean over heads and rows. A token made of several patches has their mean.
        keys: float32 `[tokens, heads, head_dim]`, of the last of these layers.
        vision: `[tokens, channels]`, the features of the tower as its projector gets them, one row per token.
        cls: `[channels]`, the class token among them, where the projector takes single patches.
        project: makes features `[n, width]` of such rows `[n, channels]`.
        grid: rows and columns of the tokens, where they are one rectangle as far as is known.
    """

    features: torch.Tensor
    text: torch.Tensor
    ids: torch.Tensor | None = None
    number: int = 0
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    cls: torch.Tensor | None = None
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    grid: tuple[int, int] | None = None


class Layer:
    """A layer of the text model at the entry of the prompt.

    Args:
        number: from 0.
        module: the decoder layer.
        hidden: `[batch, n, width]`, what enters it.
        tokens: which tokens these are.
        rotary: cos and sin of their positions.
        embeddings: `[batch, n, width]`, what entered the first layer.
    """

    def __init__(
        self,
        number: int,
        module: Any,
        hidden: torch.Tensor,
        tokens: Tokens,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        embeddings: torch.Tensor,
    ) -> None:
        self.number, self.module, self.hidden, self.tokens = number, module, hidden, tokens
        self.rotary, self.embeddings = rotary, embeddings
        self.cached: tuple[torch.Tensor, torch.Tensor] | None = None
        self.notes: dict[str, Any] = {}  # what a method that shortens the cache leaves for itself

    @property
    def attn(self) -> Any:
        return self.module.self_attn

    def last(self, count: int = 1) -> torch.Tensor:
        """The last `count` real tokens of each row, long `[batch, count]`; a shorter row repeats its first one."""
        place = torch.arange(len(self.tokens), device=self.hidden.device)
        order = torch.where(self.tokens.valid, place, -1).sort(dim=1).values[:, -count:]
        first = torch.where(self.tokens.valid, place, len(self.tokens)).amin(1, keepdim=True)
        return torch.maximum(order, first)

    def _heads(self, x: torch.Tensor, which: str, rows: torch.Tensor | None) -> torch.Tensor:
        """Projected, normalised and rotated heads `[batch, heads, n, head_dim]` of normalised states."""
        attn = self.attn
        x = getattr(attn, f"{which}_proj")(x).unflatten(-1, (-1, attn.head_dim))
        norm = getattr(attn, f"{which}_norm", None)
        x = (x if norm is None else norm(x)).transpose(1, 2)
        if self.rotary is None:
            return x
        cos, sin = self.rotary if rows is None else (take(part, rows, 1) for part in self.rotary)
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
        return rotate(x, x, cos, sin)[0]

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, rows, head_dim]`."""
        return self._heads(self.module.input_layernorm(take(self.hidden, rows, 1)), "q", rows)

    def keys(self) -> torch.Tensor:
        """`[batch, kv_heads, n, head_dim]`, from the cache once it is filled."""
        if self.cached is not None:
            return self.cached[0]
        return self._heads(self.module.input_layernorm(self.hidden), "k", None)

    def attention(self, rows: torch.Tensor) -> torch.Tensor:
        """Attention of some rows, float32 `[batch, heads, rows, n]`, without computing the others.

        Causal; layers with a sliding window see what they would see.
        """
        q, k = self.queries(rows).float(), self.keys().float()
        q = q.unflatten(1, (k.shape[1], -1))  # [batch, kv_heads, group, rows, head_dim]
        scores = torch.einsum("bkgrd,bknd->bkgrn", q, k).flatten(1, 2) * self.attn.scaling
        place = torch.arange(k.shape[2], device=k.device)
        seen = self.tokens.valid[:, None, :] & (place <= rows[..., None])
        window = getattr(self.attn, "sliding_window", None)
        if window is not None:
            seen &= rows[..., None] - place < window
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num()
