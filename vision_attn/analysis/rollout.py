"""Attention rollout: what a token of the last layer has gathered from the image, through all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vision_attn.analysis.layer import Attention

HEADS = {"mean": lambda w: w.mean(1), "max": lambda w: w.amax(1), "min": lambda w: w.amin(1)}


def rollout(
    layers: Sequence[Attention],
    query: str | int | tuple[int, int] = "class",
    heads: str = "mean",
    residual: float = 0.5,
) -> torch.Tensor:
    """How much of every grid token reaches a query of the last layer, `[batch, rows, columns]`.

    The product of `residual * I + (1 - residual) * A` over the layers, A with rows that sum to 1. One row of the
    product is carried back from the last layer, so no layer's weights are ever held as a whole.

    Args:
        layers: from `record`, with the same tokens in every layer.
        query: "class" (the first token off the grid), "mean" of the tokens on the grid, (row, column), or a number.
        heads: "mean", "max" or "min" over heads.
        residual: share of the skip connection, 0 to 1.

    Raises:
        ValueError: layers whose tokens differ (maps that shrink), or nothing recorded.

    >>> import timm
    >>> from vision_attn.analysis import record
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    >>> with torch.no_grad(), record(model) as recording:
    ...     out = model(torch.randn(1, 3, 96, 96))
    >>> rollout(recording.layers).shape
    torch.Size([1, 6, 6])

    Paper: Quantifying Attention Flow in Transformers.
    """
    if heads not in HEADS:
        raise ValueError(f"heads: got {heads!r}; allowed: {', '.join(HEADS)}")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual: got {residual!r}; allowed: 0 to 1")
    if not layers:
        raise ValueError("no layers; record a model first")
    last = layers[-1]
    for each in layers:
        if (each.queries, each.keys, each.key_place) != (last.keys, last.keys, last.key_place):
            raise ValueError(
                f"rollout needs the same tokens in every layer: {each.name} has {each.queries} queries and {each.keys} "
                f"keys, {last.name} has {last.queries} and {last.keys}; give the layers of one stage"
            )
    grid, prefix = last.grid, last.key_place.prefix
    carried = torch.zeros(last.batch, last.keys)
    if query == "mean":
        carried[:, prefix:] = 1 / (last.keys - prefix)
    elif query == "class" and not prefix:
        raise ValueError("there is no class token; allowed: 'mean', or (row, column) of a query")
    else:
        carried[:, 0 if query == "class" else query if isinstance(query, int) else last.token(*query)] = 1
    for each in reversed(layers):
        gathered = torch.zeros_like(carried)
        for at, weights in each.chunks(carried.any(0).nonzero().flatten()):
            weights = HEADS[heads](weights).to(carried)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
            gathered += torch.einsum("bq,bqk->bk", carried[:, at], weights)
        carried = residual * carried + (1 - residual) * gathered
    return carried[:, prefix:].unflatten(1, grid)
