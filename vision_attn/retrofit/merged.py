"""TokenMerge inside of a model: what goes from layer to layer, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vision_attn.hosts import AttachError
from vision_attn.merging import TokenMerge
from vision_attn.retrofit.families import Place, is_swin
from vision_attn.retrofit.interception import behaviour_of, own_class
from vision_attn.retrofit.merge_maps import Merge, Roles, alternate, frame_roles, grid_roles, towards
from vision_attn.retrofit.merged_modules import (
    BLOCKS,
    Around,
    Inside,
    MultiheadAround,
    MultiheadInside,
    Restored,
    RestoredAfter,
    Root,
)
from vision_attn.retrofit.run import Layer, Tower


class MergedTower(Tower):
    """One tower under token merging; `kept` are the numbers of the layers that merge nothing."""

    def __init__(self, place: Place, method: TokenMerge, kept: frozenset[int], options: dict[str, Any]) -> None:
        super().__init__(place, options["grid"], options["strict"])
        self.method, self.known = method, place.family is not None
        self.roles: dict[tuple, Roles] = {}
        # Of the call that is running, once something has merged: how many tokens each stands for, where each went.
        self.sizes: torch.Tensor | None = None
        self.places: torch.Tensor | None = None
        _check(place, method)
        if method.partition == "tome":
            self._put_into_blocks(place, kept)
            return
        for number, name, module in place.layers:
            if number in kept:
                self.dense.append(name)
            elif method.partition == "grid":
                self.add(AroundLayer(self, number, name, module), module, _variant(module, Around, MultiheadAround))
            else:
                self.add(InsideLayer(self, number, name, module), module, _variant(module, Inside, MultiheadInside))

    def _put_into_blocks(self, place: Place, kept: frozenset[int]) -> None:
        counts = sorted({number for number, _, _ in place.layers})
        schedule = self.method.schedule(len(counts))
        for index, (number, name, module) in enumerate(place.layers):
            block = _block(place, name)
            name = name.rpartition(".")[0]
            layer = BlockLayer(self, number, name, module, block.mlp)
            if number in kept:  # still weighs keys by what they stand for
                layer.merging = 0
                self.dense.append(name)
            elif schedule is not None:
                layer.merging = schedule[index]
            self.add(layer, block, BLOCKS[own_class(block).__name__])
            self.parts.append((module, behaviour_of(module), layer))
        end = getattr(place.module, place.family.end)
        self.parts.append((end, Restored if place.family.end == "norm" else RestoredAfter, self))
        self.parts.append((place.module, Root, self))

    def measure(self, embed: nn.Module, image: torch.Tensor, tokens: torch.Tensor) -> None:
        super().measure(embed, image, tokens)
        self.sizes = self.places = None

    def took(self, merge: Merge) -> None:
        """What goes from layer to layer has been merged."""
        self.sizes = merge.sizes(
            torch.ones(merge.index.shape, device=merge.index.device) if self.sizes is None else self.sizes
        )
        self.places = merge.index if self.places is None else merge.index.gather(1, self.places)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens again, `[batch, tokens, channels]`."""
        places, self.sizes, self.places = self.places, None, None
        return x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))

    def expected(self) -> tuple[tuple[int, ...], int, int]:
        """The grid, as (frames, h, w) for "vggt"; tokens before it, per frame; tokens in all."""
        grid = self.grid or self.user_grid
        if grid is None:
            raise AttachError("the grid of this call is not known; call the model itself, or pass grid= to attach")
        if self.method.partition == "grid":
            return grid, self.prefix, self.prefix + math.prod(grid)
        framed = grid if len(grid) == 3 else (1, *grid)
        special = self.prefix if self.known else self.method.num_special
        return framed, special, framed[0] * (special + framed[1] * framed[2])

    def around(self, x: torch.Tensor) -> tuple[Merge, int]:
        """How the tokens of one call merge, and the FLOPs of finding that out."""
        grid, special, _ = self.expected()
        key = (grid, x.device)
        if key not in self.roles:
            rule = grid_roles if self.method.partition == "grid" else frame_roles
            self.roles[key] = rule(grid, special, self.method, x.device)
        roles = self.roles[key]
        search = 2 * x.shape[0] * x.shape[2] * len(roles.sources) * len(roles.targets)
        return towards(x.detach(), roles, self.method.ratio), int(search)


def _check(place: Place, method: TokenMerge) -> None:
    cls, family = own_class(place.module).__name__, place.family
    modules = [module for _, _, module in place.layers]
    if any(map(is_swin, modules)):
        raise ValueError("cannot merge tokens in Swin: its windows need every token of the map")
    if family is not None and not family.merge:
        raise ValueError(f"cannot merge tokens in {cls}: only in models of timm and open_clip, and in VGGT")
    if family is not None and family.biased:
        raise ValueError(f"cannot merge tokens in {cls}: it adds a bias for every pair of places to the scores")
    if family is not None and family.frames and method.partition != "vggt":
        raise ValueError(f"partition {method.partition!r} is for one image, and {cls} sees many frames; use 'vggt'")
    if family is None and method.partition != "vggt":
        raise ValueError(
            f"partition {method.partition!r} needs a class that is known, and {cls} is not; use 'vggt' for any module "
            "with tokens"
        )
    if family is None or method.partition == "vggt":
        return
    if any(hasattr(module, "mlp_act") for module in modules):
        raise ValueError(f"cannot merge tokens in {cls}: its blocks compute attention and MLP as one")
    if any(getattr(module, "batch_first", True) is False for module in modules):
        raise ValueError(
            f"cannot merge tokens in {cls}: its blocks take the batch second; build it with batch_first=True"
        )
    if method.partition == "tome":
        blocks = {own_class(_block(place, name)).__name__ for _, name, _ in place.layers}
        if not blocks <= set(BLOCKS):
            raise ValueError(
                f"partition 'tome' goes between attention and MLP of {', '.join(BLOCKS)}; {cls} has "
                f"{', '.join(sorted(blocks))}; use partition 'grid', or 'vggt' with rotary positions"
            )


def _block(place: Place, name: str) -> nn.Module:
    """The block around an attention layer, by the name of that layer in the model."""
    inside = name.removeprefix(f"{place.name}." if place.name else "")
    return place.module.get_submodule(inside.rpartition(".")[0])


class MergedLayer(Layer):
    """What all attached layers share: counts."""

    tower: MergedTower

    def __init__(self, tower: MergedTower, number: int, name: str, attn: nn.Module) -> None:
        super().__init__(tower, number, name)
        self.weights = _weights(attn)

    def count(self, tokens: tuple[int, int, int], linear: tuple[int, int], products: tuple[int, int]) -> None:
        """One call: tokens before, inside attention and after the layer; FLOPs as the model was and now, of linear
        layers, and of the products of queries, keys and values with the search for what is alike."""
        self.seen = ("sparse", self.tower.grid or self.tower.user_grid, tokens, linear, products)
        if not torch.compiler.is_compiling():
            self.calls["sparse"] += 1

    @property
    def tokens(self) -> list[int] | None:
        return None if self.seen is None else list(self.seen[2])

    @property
    def flops(self) -> tuple[int, int] | None:
        if self.seen is None:
            return None
        before, now = (a + self.times * b for a, b in zip(*self.seen[3:], strict=True))
        return before, now


def _weights(module: nn.Module) -> int:
    """Weights that meet every token."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


class BlockLayer(MergedLayer):
    """A block that merges between attention and MLP; also the state of its attention."""

    def __init__(self, tower: MergedTower, number: int, name: str, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__(tower, number, name, attn)
        self.rest = _weights(mlp)
        self.merging: int | None = None  # None: a share
        self.metric: torch.Tensor | None = None
        self.width = 0  # heads * (head_dim + value_dim)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        """In place of `scaled_dot_product_attention`: keys count for as many tokens as they stand for."""
        if attn_mask is not None or is_causal:
            raise AttachError("a mask is about places, and merged tokens have none; use partition 'grid' or no mask")
        self.metric = key.detach().mean(1)
        self.width = int(query.shape[1]) * int(query.shape[3] + value.shape[3])
        sizes = self.tower.sizes
        if sizes is not None and self.tower.method.proportional:
            attn_mask = sizes.log()[:, None, None].to(query.dtype).expand(-1, 1, query.shape[2], -1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale, **options
        )

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        tower, metric = self.tower, self.metric
        self.metric = None
        if metric is None:
            raise AttachError(f"{self.name} ran without calling scaled_dot_product_attention")
        batch, tokens = int(x.shape[0]), int(x.shape[1])
        patches = tokens - tower.prefix
        merging = int(tower.method.ratio * patches) if self.merging is None else self.merging
        merging = min(merging, patches // 2)
        search = 0
        if merging > 0:
            merge = alternate(metric, merging, tower.prefix)
            x = merge.merge(x, tower.sizes)
            tower.took(merge)
            search = 2 * batch * (patches // 2) * (patches - patches // 2) * int(metric.shape[2])
        whole = tower.prefix + math.prod(tower.grid)
        left = int(x.shape[1])
        linear = [2 * batch * (a * self.weights + b * self.rest) for a, b in ((whole, whole), (tokens, left))]
        products = [2 * batch * n**2 * self.width for n in (whole, tokens)]
        self.count((tokens, tokens, left), tuple(linear), (products[0], products[1] + search))
        return x


class AroundLayer(MergedLayer):
    """An attention layer whose input is merged before it, and whose output is spread again."""

    def around(self, x: torch.Tensor, layer: Callable, options: dict[str, Any]) -> torch.Tensor:
        if options.get("rope") is not None:
            raise AttachError(
                "averages have no place for rotary positions; use partition 'vggt', which merges after them"
            )
        if options.get("attn_mask") is not None or options.get("is_causal"):
            raise AttachError("a mask is about places, and merged tokens have none; call without one")
        expected = self.tower.expected()[2]
        if x.shape[1] != expected:
            raise AttachError(
                f"{self.name} was called with {x.shape[1]} tokens; the grid and what is before it make {expected}"
            )
        merge, search = self.tower.around(x)
        out = merge.unmerge(layer(merge.merge(x)))
        batch, tokens, channels = (int(n) for n in x.shape)
        both = (tokens, merge.length)
        products = [4 * batch * n**2 * channels for n in both]
        linear = (2 * batch * n * self.weights for n in both)
        self.count((tokens, merge.length, tokens), tuple(linear), (products[0], products[1] + search))
        return out


class InsideLayer(MergedLayer):
    """An attention layer whose queries, keys and values are merged."""

    x: torch.Tensor | None = None  # the input of the layer, by which tokens are alike

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        """In place of `scaled_dot_product_attention`."""
        given = dict(dropout_p=dropout_p, scale=scale, **options)
        expected, tokens = self.tower.expected()[2], int(query.shape[2])
        trouble = None
        if tokens != expected or int(key.shape[2]) != tokens:
            trouble = f"it was called with {tokens} tokens, and the grid makes {expected}"
        elif attn_mask is not None or is_causal:
            trouble = "it was called with a mask, which is about places, and merged tokens have none"
        if trouble is not None:
            self.left(trouble)
            if not torch.compiler.is_compiling():
                self.calls["dense"] += 1
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **given)
        merge, search = self.tower.around(self.x)
        batch, heads = int(query.shape[0]), int(query.shape[1])

        def merged(x: torch.Tensor) -> torch.Tensor:
            return merge.merge(x.transpose(1, 2).flatten(2)).unflatten(-1, x.shape[1::2]).transpose(1, 2)

        if self.tower.method.proportional:
            sizes = merge.sizes(torch.ones(merge.index.shape, device=query.device))
            given["attn_mask"] = sizes.log()[:, None, None].to(query.dtype).expand(-1, 1, merge.length, -1)
        out = F.scaled_dot_product_attention(merged(query), merged(key), merged(value), **given)
        out = merge.unmerge(out.transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1)).transpose(1, 2)
        width = heads * int(query.shape[3] + value.shape[3])
        linear = 2 * batch * tokens * self.weights
        products = [2 * batch * n**2 * width for n in (tokens, merge.length)]
        self.count((tokens, merge.length, tokens), (linear, linear), (products[0], products[1] + search))
        return out


def _variant(module: nn.Module, plain: type, multihead: type) -> type:
    return multihead if isinstance(module, nn.MultiheadAttention) else plain
