"""Recording the attention of a model: which layer looked where, row by row, on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vision_attn.analysis.calls import DenseCall, PatternCall, WeightsCall
from vision_attn.analysis.geometry import Place, Windows, place, windows_of
from vision_attn.analysis.layer import Attention
from vision_attn.analysis.watch import Watch
from vision_attn.kernels.problem import Problem
from vision_attn.retrofit.families import prefix_of

# Layers whose keys lie between tokens, come from windows of their own, or whose tokens are in no order of rows.
_NO_PLACE = {
    "AggregatedAttention",
    "MaskUnitAttention",
    "QuadrangleAttention",
    "SoftCausalAttention",
    "VariedWindowAttention",
}


def record(
    model: nn.Module, layers: Iterable[int | str] | None = None, grid: tuple[int, int] | None = None
) -> Recording:
    """Record the attention of a model while it runs, without changing what it computes by a bit.

    Serves softmax attention that goes through `scaled_dot_product_attention`, `nn.MultiheadAttention`, `attend` or a
    softmax: timm and open_clip models, backbones of this package, and models with a pattern attached. Queries and keys
    are kept, not weights; layers that spell attention out themselves give the weights they made.

    Args:
        model: what will be called inside the `with`; of several calls the last is kept.
        layers: numbers in order of execution, from 0, or names of modules; all when None.
        grid: (rows, columns) of the tokens, where they cannot be told from the size of the image.

    Returns:
        A context manager; afterwards `recording.layers` is a list of `Attention`.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    >>> with torch.no_grad(), record(model) as recording:
    ...     out = model(torch.randn(1, 3, 96, 96))
    >>> layer = recording.layers[3]
    >>> layer.name, layer.grid, layer.rows([0]).shape, layer.map((2, 5)).shape
    ('blocks.3.attn', (6, 6), torch.Size([1, 3, 1, 37]), torch.Size([1, 3, 6, 6]))
    """
    return Recording(model, layers, grid)


class Recording(Watch):
    """What `record` returns; `layers` holds the attention of the last call of the model."""

    def __init__(self, model: nn.Module, layers: Iterable[int | str] | None, grid: tuple[int, int] | None) -> None:
        super().__init__(model)
        self._wanted = None if layers is None else set(layers)
        self._grid = grid
        self._found: list[tuple[Any, Attention]] = []  # with the running module that each came from
        self._seen: dict[str, int] = {}  # every attention layer of the pass, wanted or not
        self._pass = 0

    @property
    def layers(self) -> list[Attention]:
        """One `Attention` per layer and call, in order of execution.

        Raises:
            ValueError: nothing was recorded; the message says what there was.
        """
        kind = type(self.model).__name__
        if not self.passes:
            raise ValueError(f"{kind} was not called with images [batch, channels, height, width] inside the `with`")
        if not self._seen or self._pass != self.passes:
            raise ValueError(
                f"{kind} ran no softmax attention over tokens; linear attention, convolutions and compiled code have "
                "no weights to show"
            )
        missing = (self._wanted or set()) - set(self._seen) - set(self._seen.values())
        if missing:
            had = ", ".join(f"{number} {name}" for name, number in self._seen.items())
            raise ValueError(f"{kind} has no attention layer {', '.join(map(str, missing))}; it has {had}")
        return [found for _, found in self._found]

    def _add(self, call: DenseCall | PatternCall | WeightsCall, first_head: int = 0) -> None:
        if self._pass != self.passes:
            self._pass, self._found, self._seen = self.passes, [], {}
        here = self.stack[-1]
        number = self._seen[here.name] = self.layer
        if self._wanted is not None and not {number, here.name} & self._wanted:
            return
        if self._found and self._found[-1][0] is here and self._found[-1][1].takes(call, first_head):
            return
        batch, _, queries, keys = call.shape
        images = self.image[0] if self.image else batch
        modules = [(c.module, c.shape) for c in reversed(self.stack)]
        places, windows = [Place(0, None)] * 2, None
        if type(here.module).__name__ in _NO_PLACE or any(getattr(m, "legacy_reshape", False) for m, _ in modules):
            pass
        elif batch % images == 0 and queries == keys and (windows := self._windows(call, modules, batch // images)):
            places = [Place(0, windows.grid)] * 2
        elif isinstance(call, PatternCall):
            grid = call.grid if len(call.grid) == 2 else None
            places = [Place(0, grid), Place(keys - call.k.shape[2], grid)]
        elif batch == images and self.image and not _padded(here.shape, queries):
            prefix = next((count for m, _ in modules if (count := _prefix(m)) is not None), 0)
            places = [place(n, self.image[2:], prefix, self._grid) for n in (queries, keys)]
        self._found.append((here, Attention(here.name, number, call, *places, windows)))

    def _windows(self, call: DenseCall | PatternCall | WeightsCall, modules: list, windows: int) -> Windows | None:
        grid = call.grid if isinstance(call, PatternCall) else ()
        channels = 0 if isinstance(call, WeightsCall) else call.q.shape[1] * call.q.shape[3]
        return windows_of(modules, windows, call.shape[2], grid, channels)

    def saw_sdpa(self, q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        shown = None
        if mask is not None:
            shown = mask.detach()
            shown = shown if q.ndim == 4 else self._fold(shown.expand(*q.shape[:-1], k.shape[-2]))
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        self._add(DenseCall(self._fold(q.detach()), self._fold(k.detach()), factor, shown, is_causal))
        return super().saw_sdpa(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)

    def saw_weights(self, weights: torch.Tensor) -> torch.Tensor:
        self._add(WeightsCall(self._fold(weights.detach())))
        return weights

    def _fold(self, x: torch.Tensor) -> torch.Tensor:
        """To `[batch, heads, tokens, channels]`."""
        axis = self.head_axis(x)
        if x.ndim == 3:
            return x[:, None] if axis == -1 else x.unflatten(0, (self.image[0], -1))
        if axis == 3:  # heads last, each query with keys of its own: [batch, height, width, heads, keys]
            return x.flatten(1, 2).transpose(1, 2)
        return x if x.ndim == 4 else x.movedim(axis, 2).flatten(0, 1)

    def saw_attend(self, problem: Problem, first_head: int, call: tuple, out: torch.Tensor) -> torch.Tensor:
        q, k, _, scale, extra_kv, extra_mask, bias = call
        q, k = (x.detach().flatten(1, -3).transpose(1, 2) for x in (q, k))
        extra = None if extra_kv is None else extra_kv[0].detach().transpose(1, 2)
        bias = None if bias is None else bias.detach()
        self._add(PatternCall(q, k, scale, problem.pattern, problem.grid, extra, extra_mask, bias), first_head)
        return out

    def saw_multihead(self, module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> bool:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        known = module.bias_k is None and not module.add_zero_attn and given["query"].ndim == 3
        if known:
            with torch.no_grad():
                self._add(multihead_call(module, given))
        return True


def multihead_call(module: nn.MultiheadAttention, given: dict[str, Any]) -> DenseCall:
    """Queries, keys and mask of an `nn.MultiheadAttention`, from its arguments by name."""
    query, key = given["query"], given["key"]
    if not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    dim = module.embed_dim
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight[:dim], module.in_proj_weight[dim : 2 * dim]
    else:
        weights = module.q_proj_weight, module.k_proj_weight
    bias = module.in_proj_bias
    biases = (None, None) if bias is None else (bias[:dim], bias[dim : 2 * dim])
    q, k = (
        nn.functional.linear(x, w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2).detach()
        for x, w, b in zip((query, key), weights, biases, strict=True)
    )
    mask = None
    for name in ("attn_mask", "key_padding_mask"):  # in both, True means hidden
        part = given.get(name)
        if part is None:
            continue
        if name == "key_padding_mask":
            part = part[:, None, None]
        elif part.ndim == 3:
            part = part.unflatten(0, (-1, module.num_heads))
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, float("-inf"))
        mask = part if mask is None else mask + part
    return DenseCall(q, k, q.shape[-1] ** -0.5, mask)


def _padded(shape: tuple[int, ...] | None, queries: int) -> bool:
    """Whether a layer gets a map of another size than it has queries, so that their places cannot be told."""
    if shape is None or len(shape) != 4:
        return False
    return queries > 1 and queries not in (shape[1] * shape[2], shape[2] * shape[3])


def _prefix(module: nn.Module) -> int | None:
    """Tokens before those of the image, where a model says so."""
    count = prefix_of(module)
    if isinstance(count, int):
        return count
    named = (getattr(module, name, None) for name in ("class_embedding", "cls_token"))
    return 1 if any(isinstance(each, torch.Tensor) for each in named) else None
