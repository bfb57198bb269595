"""What a token has gathered from every other through all layers, without a map of all pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from vision_attn.mllm.interface import Compute, listen, switch
from vision_attn.mllm.rows import row_weights, visible

ROWS = 256  # rows of attention that exist at once


@dataclasses.dataclass(frozen=True)
class Attention:
    """Queries and keys of one layer over a whole prompt; its weights are made some rows at a time.

    Args:
        q: `[batch, heads, n, head_dim]`, positions applied; `k`: `[batch, kv_heads, n, head_dim]`.
        mask: as the attention got it; None is causal.
        valid: bool `[batch, n]`, what is no padding.
    """

    q: torch.Tensor
    k: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    valid: torch.Tensor

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Attention, float32 `[batch, heads, rows, n]`, some rows at a time; rows of padding are 0."""
        for rows in self.cuts():
            yield rows, row_weights(self.q, self.k, self.mask, self.scale, rows, self.valid)

    def seen_by(self) -> torch.Tensor:
        """How many real rows see each token, long `[batch, n]`."""
        return sum(visible(self.q, self.k, self.mask, rows, self.valid).sum(2)[:, 0] for rows in self.cuts())

    def cuts(self) -> list[slice]:
        return [slice(start, start + ROWS) for start in range(0, self.q.shape[2], ROWS)]


def attentions(model: Any, inputs: dict[str, Any]) -> list[Attention]:
    """Read prompts once, and give queries and keys of every layer of the text model.

    Args:
        inputs: as for a call of the model: a prompt, or a prompt and its answer.

    Raises:
        ValueError: tokens are dropped inside the text model, so that its layers do not read the same ones.
    """
    found: list[Attention] = []
    given = inputs.get("attention_mask")
    valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if given is None else given.bool()

    def keep(module: Any, q, k, v, mask, scale: float, compute: Compute) -> torch.Tensor:
        if k.shape[2] != valid.shape[1]:
            raise ValueError(
                f"a layer reads {k.shape[2]} of {valid.shape[1]} tokens; detach what drops tokens before its flow is "
                "followed"
            )
        found.append(Attention(q.detach(), k.detach(), mask, scale, valid))
        return compute(q, k, v, mask)

    undo = [switch(model.config.get_text_config())]
    undo += [listen(layer.self_attn, keep) for layer in model.get_decoder().layers]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for each in reversed(undo):
            each()
    return found


def rollout(model: Any, inputs: dict[str, Any], token: int = -1) -> torch.Tensor:
    """How much of every token reaches one of the last layer, float32 `[batch, length]`; rows sum to 1.

    The product of `0.5 I + 0.5 mean over heads` over the layers. In a causal model it piles up on the first columns;
    `attention_flow` evens that out.

    Args:
        model: a vision-language model; what is attached may steer it, but not drop tokens.
        inputs: as for a call of the model: a prompt, or a prompt and its answer.
        token: column of the token that looks, in the padded prompt; negative from the end.

    Raises:
        ValueError: tokens are dropped, or there is no such column.

    >>> from vision_attn.mllm import tiny
    >>> ids = torch.tensor([[1, 7, 8, 9]])
    >>> rollout(tiny.model(), {"input_ids": ids}).sum().item()
    1.0

    Paper: Quantifying Attention Flow in Transformers.
    """
    layers = attentions(model, inputs)
    carried = _one(layers[-1], token)
    for layer in reversed(layers):
        carried = 0.5 * carried + 0.5 * _gathered(layer, carried)[0].mean(1)
    return carried


def attention_flow(
    model: Any, inputs: dict[str, Any], token: int = -1, head_weights: bool = True, regularise: bool = True
) -> torch.Tensor:
    """VL-SAM's map: what reaches a token through all layers, float32 `[batch, length]`.

    Heads count by how sharply they look, and after each layer a column counts less the more rows can see it. With
    `S = mean over heads of W w`, `W` the mean over rows of the greatest weight, it is the row of `token` in
    `R[l] = (I + S[l]) (I + R[l - 1])`, `R[-1] = 0`, whose column `j` is multiplied after each layer by
    `1 - (seen_by(j) - 1) / n`; `n` is the number of tokens, where the paper leaves open what divides.

    Args:
        inputs: a prompt and its answer, up to the name of an object.
        token: column of the token that looks, in the padded prompt; negative from the end.
        head_weights: False counts all heads the same.
        regularise: False leaves the columns as they are.

    Raises:
        ValueError: tokens are dropped, or there is no such column.

    >>> from vision_attn.mllm import tiny
    >>> attention_flow(tiny.model(), {"input_ids": torch.tensor([[1, 7, 8, 9]])}).shape
    torch.Size([1, 4])

    Paper: Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts.
    """
    layers = attentions(model, inputs)
    carried = _one(layers[-1], token)
    found, factor = torch.zeros_like(carried), torch.ones_like(carried)
    # A row x of R[l] is y D + (row y of R[l - 1]) D with y = x (I + S[l]): only rows are carried back.
    for layer in reversed(layers):
        heads, sharp = _gathered(layer, carried)
        carried = carried + (heads * sharp[..., None] if head_weights else heads).mean(1)
        if regularise:
            factor = factor * (1 - (layer.seen_by() - 1) / layer.valid.sum(1, keepdim=True))
        found = found + carried * factor
    return found * layers[0].valid


def _one(layer: Attention, token: int) -> torch.Tensor:
    row, length = torch.zeros(layer.valid.shape, device=layer.q.device), layer.valid.shape[1]
    if not -length <= token < length:
        raise ValueError(f"token={token}: the prompt has columns 0 to {length - 1}, or from {-length} to -1")
    row[:, token] = 1
    return row


def _gathered(layer: Attention, carried: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[batch, n]` times the attention of each head, `[batch, heads, n]`; and how sharp each head is."""
    heads, sharp = 0, 0
    for rows, w in layer.parts():
        heads = heads + torch.einsum("br,bhrn->bhn", carried[:, rows], w)
        sharp = sharp + w.amax(-1).sum(-1)
    return heads, sharp / layer.valid.sum(1, keepdim=True)
