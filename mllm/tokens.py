"""Which tokens of a prompt are still there, and how tensors and masks follow them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens that a layer works on, right-aligned.

    Args:
        column: long `[batch, n]`, where each token stood in the prompt; 0 where there is none.
        valid: bool `[batch, n]`, False where a row has fewer than `n` tokens or the prompt was padded.
        visual: bool `[batch, n]`, the visual ones.
    """

    column: torch.Tensor
    valid: torch.Tensor
    visual: torch.Tensor

    @staticmethod
    def of_prompt(valid: torch.Tensor, visual: torch.Tensor) -> Tokens:
        """All tokens of a prompt: bool `[batch, length]`, what is no padding and what is visual."""
        column = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return Tokens(column, valid, visual & valid)

    def __len__(self) -> int:
        return self.column.shape[1]

    @property
    def whole(self) -> bool:
        """No row is padded."""
        return bool(self.valid.all())

    def kept(self, keep: torch.Tensor) -> tuple[Tokens, torch.Tensor]:
        """The tokens where `keep` (bool `[batch, n]`) is True, and where they stand among the present ones, long."""
        keep = keep & self.valid
        n = int(keep.sum(1).max())
        # A stable sort puts what is kept last, in order, and so right-aligns every row.
        index = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - n :]
        valid = keep.gather(1, index)
        return Tokens(self.column.gather(1, index) * valid, valid, self.visual.gather(1, index) & valid), index

    def mask(self, more: int = 0) -> torch.Tensor:
        """The 2-D mask of these tokens and of `more` after them, long `[batch, n + more]`.

        Always a tensor, also when all is visible: without one the mask code of transformers takes gaps in the positions
        for the borders of packed sequences.
        """
        after = self.valid.new_ones(self.valid.shape[0], more)
        return torch.cat([self.valid, after], 1).long()


def take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows `index` (long `[batch, n]`) of `x` along `dim`; the first dimension of `x` is the batch, or 1 for all."""
    x = x.expand(index.shape[0], *x.shape[1:])
    shape = [index.shape[0] if i == 0 else index.shape[1] if i == dim % x.ndim else 1 for i in range(x.ndim)]
    size = [index.shape[1] if i == dim % x.ndim else n for i, n in enumerate(x.shape)]
    return x.gather(dim, index.view(shape).expand(size))


def take_positions(position_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Positions `[batch, length]`, or `[axes, batch, length]`, of the tokens at `index`."""
    if position_ids.ndim == 2:
        return take(position_ids, index, 1)
    return torch.stack([take(axis, index, 1) for axis in position_ids])


def take_mask(
    mask: torch.Tensor, index: torch.Tensor, tokens: Tokens, keys: int, window: int | None = None
) -> torch.Tensor:
    """Rows and columns of a prepared mask `[batch, 1, length, any]`, bool or additive.

    Args:
        keys: that the result is for; those after the tokens, for which a static cache has room, are masked.
        window: of a sliding layer. Distance counts kept tokens, as the cache of such a layer does.
    """
    masked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    length, n = mask.shape[-2], index.shape[1]
    small = take(take(mask[..., :length], index, 2), index, 3)
    small = small.masked_fill(~tokens.valid[:, None, None, :], masked)
    if window is not None:
        place = torch.arange(n, device=mask.device)
        small = small.masked_fill((place[:, None] - place >= window), masked)
    return torch.nn.functional.pad(small, (0, keys - n), value=masked)


def keys_of(cache: Any, queries: int, layer: int) -> int:
    """How many keys the first call with a cache attends to in a layer."""
    return queries if cache is None else cache.get_mask_sizes(queries, layer)[0]


def real_tokens(mask: Any, like: torch.Tensor) -> torch.Tensor:
    """Bool `[batch, length]`: what a mask in one of the forms that a text model gets does not hide as padding."""
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return torch.ones_like(like)
    if mask.ndim == 4:  # the last token sees every real one
        mask = mask[:, 0, -1, : like.shape[1]]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask.bool().expand(like.shape)


def shorten(kwargs: dict[str, Any], index: torch.Tensor, tokens: Tokens, config: Any) -> None:
    """Make the mask among the arguments of a text model follow `tokens`."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if isinstance(mask, dict) and mask["full_attention"] is not None:  # None: nothing is padding
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        layers = {kind: config.layer_types.index(kind) for kind in mask}
        kwargs["attention_mask"] = {
            kind: take_mask(mask["full_attention"], index, tokens, keys_of(cache, len(tokens), layer), windows[kind])
            for kind, layer in layers.items()
        }
    elif torch.is_tensor(mask) and mask.ndim == 4:
        kwargs["attention_mask"] = take_mask(mask, index, tokens, keys_of(cache, len(tokens), 0))
    else:
        kwargs["attention_mask"] = tokens.mask()


def later_mask(mask: Any, tokens: Tokens, after: int, new: int) -> torch.Tensor | None:
    """The mask for `new` tokens that follow `tokens` and `after` more in the cache; None where all is visible.

    What a model says of the new tokens among themselves, in a prepared mask `[batch, 1, queries, keys]`, holds.
    """
    if torch.is_tensor(mask) and mask.ndim == 4 and new > 1:
        seen = tokens.mask(after).bool()[:, None, None, :].expand(-1, -1, new, -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([seen, mask[:, :, -new:, -new:].expand(len(seen), -1, -1, -1)], -1)
    return None if tokens.whole else tokens.mask(after + new)


def same_visual(theirs: Tokens, asked: torch.Tensor, mine: Tokens, own: torch.Tensor) -> torch.Tensor:
    """Which visual tokens of one prompt another prompt with the same images kept, bool `[batch, n]` over `mine`.

    Args:
        theirs: what the other prompt kept.
        asked: bool `[batch, length]`, the visual tokens of the other prompt at first; the first of them is the first of
            `own`, and so on.
        mine: tokens of this prompt that are still there.
        own: bool `[batch, length of this prompt]`, its visual tokens at first.
    """
    kept, found = torch.zeros_like(asked), torch.zeros_like(own)
    rows, places = theirs.visual.nonzero(as_tuple=True)
    kept[rows, theirs.column[rows, places]] = True
    found[own] = kept[asked]
    return found.gather(1, mine.column) & mine.visual


def runs(visual: torch.Tensor) -> list[tuple[int, int]]:
    """Start and end of every run of True in a bool `[n]`.

    >>> runs(torch.tensor([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
