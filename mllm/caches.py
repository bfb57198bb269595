"""Layers of a cache for what the dynamic one has no room for: heads of different length, and tokens in few bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer

from vision_attn.hosts import AttachError
from vision_attn.mllm.tokens import Tokens, take

GROUP = 64  # tokens whose keys share a scale per channel
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class HeldLayer(DynamicLayer):
    """A layer whose tensors are in `held`, batch first, besides `keys` and `values`."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, torch.Tensor] = {}
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of `held`."""
        return sum(t.nbytes for t in self.held.values())

    def _batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.held = {name: change(t) for name, t in self.held.items()}
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._batch(lambda t: t[indices])


class RaggedLayer(HeldLayer):
    """KV heads with different numbers of tokens; heads of one length are stored together.

    In every row the heads are sorted by length, so that which of them are long may differ from row to row. `held` has
    this `order` `[batch, kv_heads]`, and for every part, neighbours in that order, `keys` and `values`
    `[batch, heads, n, head_dim]`, right-aligned, and `bias` `[batch, heads, tokens of the prompt]`, what is added to
    the scores of a token: 0; `-inf` where there is none; log N for one that stands for N.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means = False
        self.plain: list[bool] = []  # of each part: all of it is there and counts once
        self.after = 0  # tokens that followed the prompt
        self.reader: str | None = None  # who reads in the call that runs: "parts" or "whole"

    @classmethod
    def of(
        cls, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, tokens: Tokens, means: bool = False
    ) -> tuple[RaggedLayer, Tokens]:
        """The layer, and its tokens as one that reads the whole has them; the column of a mean, and where a head has
        nothing, is -1.

        Args:
            keys, values: `[batch, kv_heads, n, head_dim]`.
            keep: bool `[batch, kv_heads, n]`.
            tokens: what the n are.
            means: what a head loses stays as one token: its mean, which counts as often as tokens were lost.
        """
        self, heads = cls(), keys.shape[1]
        column, visual = (t[:, None].expand(-1, heads, -1) for t in (tokens.column, tokens.visual))
        bias = torch.zeros(keep.shape, device=keys.device)
        self.means = means
        if means:
            lost = tokens.valid[:, None] & ~keep
            count = lost.sum(-1, keepdim=True)
            share = (lost / count.clamp(min=1))[..., None, :]
            keys, values = (torch.cat([(share @ t.float()).to(t.dtype), t], 2) for t in (keys, values))
            bias = torch.cat([count.clamp(min=1).log(), bias], -1)
            keep = torch.cat([count > 0, keep], -1)
            column, visual = torch.nn.functional.pad(column, (1, 0), value=-1), torch.nn.functional.pad(visual, (1, 0))
        bias = bias.masked_fill(~keep, -torch.inf)
        counts = keep.sum(-1)
        order = counts.argsort(dim=1, descending=True, stable=True)
        sizes = counts.gather(1, order).amax(0).tolist()
        place = keep.int().argsort(dim=-1, stable=True)  # what is kept comes last, in order
        self.held["order"], first = order, 0
        for size, group in itertools.groupby(sizes):
            those, part = order[:, first : first + len(list(group))], len(self.plain)
            first += those.shape[1]
            index = _heads(place, those)[..., place.shape[-1] - size :]
            for name, t in (("keys", keys), ("values", values), ("bias", bias)):
                t = _heads(t, those)
                at = index if t.ndim == 3 else index[..., None].expand(*index.shape, t.shape[-1])
                self.held[f"{name}{part}"] = t.gather(2, at)
            self.plain.append(not self.held[f"bias{part}"].any())
        index = place[..., place.shape[-1] - sizes[0] :]
        there = keep.gather(-1, index)
        column = column.gather(-1, index).masked_fill(~there, -1)
        return self, Tokens(column, there.any(1), visual.gather(-1, index) & there)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all keys and values where others read them too, and for `attend` nothing of use."""
        reader, self.reader = self.reader, None
        if reader is None:
            raise AttachError(
                "this cache has heads of different length, which can be read only while the method that made it is "
                "attached, and not from a copy; start a new cache"
            )
        for part, those in enumerate(self._orders()):
            for name, new in (("keys", key_states), ("values", value_states)):
                self.held[f"{name}{part}"] = torch.cat([self.held[f"{name}{part}"], _heads(new, those)], 2)
        self.after += key_states.shape[2]
        return (key_states, value_states) if reader == "parts" else (self._whole("keys"), self._whole("values"))

    def attend(self, q: torch.Tensor, compute: Attention) -> torch.Tensor:
        """Attention of the newest tokens, part by part: `[batch, heads, n, head_dim]` to `[batch, n, heads, head_dim]`.

        Args:
            compute: attention on given keys and values, that takes bool masks.
        """
        kv_heads, outs = self.held["order"].shape[1], []
        group = q.shape[1] // kv_heads
        for part, those in enumerate(self._orders()):
            own = _heads(q.unflatten(1, (kv_heads, group)), those).flatten(1, 2)
            mask = None
            if not self.plain[part] or q.shape[2] > 1:
                mask = self._mask(self.held[f"bias{part}"], q, self.means).repeat_interleave(group, 1)
            out = compute(own, self.held[f"keys{part}"], self.held[f"values{part}"], mask)
            outs.append(out.unflatten(2, (-1, group)).transpose(1, 2))
        return _heads(torch.cat(outs, 1), self.held["order"].argsort(1)).transpose(1, 2).flatten(2, 3)

    def whole_mask(self, q: torch.Tensor, group: int, additive: bool) -> torch.Tensor:
        """The mask `[batch, heads, new, n + new]` of all keys for `q` `[..., new, any]`, its own not appended yet.

        Args:
            group: query heads per KV head.
            additive: as scores to add, which it is in any case where means count more than once; otherwise bool.
        """
        bias = self._whole("bias", -torch.inf)
        return self._mask(bias, q, additive or self.means, q.shape[-2]).repeat_interleave(group, 1)

    def _mask(self, bias: torch.Tensor, q: torch.Tensor, additive: bool, coming: int = 0) -> torch.Tensor:
        new, after = q.shape[-2], self.after + coming
        bias = torch.nn.functional.pad(bias, (0, after))[:, :, None].expand(-1, -1, new, -1)
        later = torch.ones(new, bias.shape[-1], dtype=torch.bool, device=bias.device).triu(bias.shape[-1] - new + 1)
        bias = bias.masked_fill(later, -torch.inf)
        return bias.to(q.dtype).clamp(min=torch.finfo(q.dtype).min) if additive else bias == 0

    def _orders(self) -> list[torch.Tensor]:
        counts = [self.held[f"bias{part}"].shape[1] for part in range(len(self.plain))]
        return list(self.held["order"].split(counts, 1))

    def _whole(self, name: str, fill: float = 0.0) -> torch.Tensor:
        """All heads in their own order, the short ones filled up in front."""
        longest = self.held[f"{name}0"].shape[2]
        parts = []
        for part in range(len(self.plain)):
            t = self.held[f"{name}{part}"]
            missing = (longest - t.shape[2], 0)
            parts.append(torch.nn.functional.pad(t, missing if t.ndim == 3 else (0, 0, *missing), value=fill))
        return _heads(torch.cat(parts, 1), self.held["order"].argsort(1))

    def get_seq_length(self) -> int:
        return self.held["keys0"].shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed > self.after:
            raise AttachError(
                f"cannot take {removed} tokens off a cache with {self.after} after the prompt, of which heads hold "
                "different tokens; start a new cache"
            )
        for part in range(len(self.plain)):
            for name in ("keys", "values"):
                t = self.held[f"{name}{part}"]
                self.held[f"{name}{part}"] = t[:, :, : t.shape[2] - removed]
        self.after -= removed


class QuantizedLayer(HeldLayer):
    """Tokens in few bits, first those of one width and then those of the next; the last ones and what follows in full.

    Codes are asymmetric: keys per channel in groups of `GROUP` tokens, values per token, scale and zero in float16. All
    is dequantized at every step, so it takes less memory, and more time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[int, int]] = []  # of each part: tokens, bits

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: Tokens,
        parts: list[tuple[torch.Tensor, int]],
        full: torch.Tensor,
    ) -> tuple[QuantizedLayer, Tokens]:
        """The layer, and its tokens in the order in which it has them.

        Args:
            keys, values: `[batch, kv_heads, n, head_dim]`.
            tokens: what the n are.
            parts: bool `[batch, n]` and bits; each token in one part, or in full.
            full: bool `[batch, n]`.
        """
        self, found = cls(), []
        self.dtype, self.device = keys.dtype, keys.device
        for those, bits in [*parts, (full, 0)]:
            own, index = tokens.kept(those)
            k, v = take(keys, index, 2), take(values, index, 2)
            found.append(own)
            if not bits:
                self.keys, self.values = k, v
            if not bits or not len(own):
                continue
            name = len(self.parts)
            self.parts.append((len(own), bits))
            lead = -len(own) % GROUP
            groups = torch.nn.functional.pad(k, (0, 0, lead, 0)).unflatten(2, (-1, GROUP))
            real = torch.nn.functional.pad(own.valid, (lead, 0)).view(len(k), 1, -1, GROUP, 1)
            self._quantize(f"keys{name}", groups, real, bits)
            self._quantize(f"values{name}", v, own.valid[:, None, :, None], bits)
        column, valid, visual = (
            torch.cat([getattr(own, name) for own in found], 1) for name in ("column", "valid", "visual")
        )
        column, visual = (t[:, None].expand(-1, keys.shape[1], -1) for t in (column, visual))
        return self, Tokens(column, valid, visual)

    def _quantize(self, name: str, x: torch.Tensor, real: torch.Tensor, bits: int) -> None:
        """Numbers that share a scale lie along dimension 3; those that are not `real` have no say in it."""
        x = x.float()
        low = x.masked_fill(~real, torch.inf).amin(3, keepdim=True)
        high = x.masked_fill(~real, -torch.inf).amax(3, keepdim=True)
        low, high = (t.nan_to_num(0, 0, 0) for t in (low, high))  # nothing real
        scale, zero = ((high - low) / (2**bits - 1)).half(), low.half()
        codes = ((x - zero.float()) / scale.float()).nan_to_num(0, 0, 0).round().clamp(0, 2**bits - 1)
        self.held |= {name: pack(codes.to(torch.uint8), bits), f"{name}scale": scale, f"{name}zero": zero}

    def _dequantize(self, name: str, bits: int) -> torch.Tensor:
        codes = unpack(self.held[name], bits, self.keys.shape[-1] if name[0] == "k" else self.values.shape[-1])
        return (codes * self.held[f"{name}scale"].float() + self.held[f"{name}zero"].float()).to(self.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(key_states, value_states)
        keys, values = [], []
        for part, (count, bits) in enumerate(self.parts):
            k = self._dequantize(f"keys{part}", bits).flatten(2, 3)
            keys.append(k[:, :, k.shape[2] - count :])
            values.append(self._dequantize(f"values{part}", bits))
        return torch.cat([*keys, self.keys], 2), torch.cat([*values, self.values], 2)

    def get_seq_length(self) -> int:
        return sum(count for count, _ in self.parts) + self.keys.shape[2]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below `2**bits`, uint8 `[..., n]`, as bytes `[..., n * bits / 8]` rounded up.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    return (codes.int() << torch.arange(each, device=codes.device) * bits).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The codes of `pack`, int32 `[..., n]`.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    return ((packed.int()[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :n]


def shortened(
    keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, tokens: Tokens
) -> tuple[DynamicLayer, Tokens]:
    """A layer with the tokens `keep` (bool `[batch, kv_heads, n]`): a stock one where all heads keep equally many."""
    counts = keep.sum(-1)
    if (counts != counts[:, :1]).any():
        return RaggedLayer.of(keys, values, keep, tokens)
    index = keep.int().argsort(dim=-1, stable=True)[..., keep.shape[-1] - int(counts.max()) :]
    there = keep.gather(-1, index)
    column, visual = (
        t[:, None].expand(-1, keep.shape[1], -1).gather(-1, index) for t in (tokens.column, tokens.visual)
    )
    at = index[..., None].expand(*index.shape, keys.shape[-1])
    layer = DynamicLayer()
    layer.update(keys.gather(2, at), values.gather(2, at))
    return layer, Tokens(column, there[:, 0], visual & there)


def _heads(t: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Entries `order` (long `[batch, m]`) of `t` `[batch, heads, ...]` along the heads."""
    return t.gather(1, order.view(*order.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:]))
