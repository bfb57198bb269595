"""attach() for vision models: put a pattern into the attention of a timm or open_clip tower, and take it out again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vision_attn.hosts import AttachError, plain
from vision_attn.joint import fit, joint_attention
from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.patterns import Dense, Pattern, PerHead, Radial
from vision_attn.kernels.patterns.base import check_grid
from vision_attn.merging import TokenMerge
from vision_attn.retrofit import swin
from vision_attn.retrofit.families import Place, find, is_swin
from vision_attn.retrofit.interception import behaviour_of, own_class
from vision_attn.retrofit.merged import MergedTower
from vision_attn.retrofit.run import Layer, Run, Tower


def attach(
    model: nn.Module,
    pattern: Pattern | TokenMerge,
    *,
    dense_layers: int | Iterable[int] = 0,
    grid: tuple[int, ...] | None = None,
    prefix: int | None = None,
    backend: str | None = None,
    strict: bool = False,
    replace: bool = False,
) -> Run:
    """Make the self-attention of a vision model follow `pattern`, until detached.

    Patch tokens follow the pattern among themselves, on the grid that the model itself cuts the image into. Class and
    register tokens see everything and are seen by everything. In a Swin model the pattern takes the place of the
    shifted windows, on the whole map, with the relative positions that the model learned. A layer that stays dense is
    untouched, bit for bit. Where the model passes a mask, or adds a bias for every pair of places as BEiT does,
    attention is computed dense and the pattern hides the rest: right, but nothing is saved.

    Args:
        model: a timm ViT, DeiT, DINO, EVA, BEiT or Swin, an open_clip model (its image tower; the text tower stays as
            it is), a ViT, DeiT, DINOv2, DINOv3, CLIP or SigLIP of transformers with `attn_implementation="sdpa"`, VGGT
            or a model built like it (for `TokenMerge("vggt")`), or any module that contains one; with `grid` another
            module whose attention calls `scaled_dot_product_attention`.
        pattern: who sees whom on the token grid `(h, w)`. One int for all axes is cut down on an axis that is shorter;
            a tuple must fit. Or a `TokenMerge`, which changes how many tokens there are.
        dense_layers: the first layers that stay as they are, or the numbers of those layers, from 0.
        grid: sizes in tokens, for a model whose class is not known; its sequences must be exactly the grid by rows,
            after `prefix` other tokens. For `TokenMerge("vggt")` also `(frames, h, w)`.
        prefix: class and register tokens before the grid, for such a model; `model.num_prefix_tokens`, or none, if
            absent.
        backend: kernel backend by name; None lets `attend` pick.
        strict: raise where a call would stay dense with a warning.
        replace: detach what is attached to the same modules first; otherwise that is an error.

    Returns:
        A `Run`: context manager, `run.report`, `run.measure(images)`, `run.detach()`.

    Raises:
        TypeError: the model or the pattern is of the wrong kind.
        ValueError: there is no attention to attach to, the class is refused, or an option is out of range. Calls that
            cannot be served raise `AttachError`, a ValueError.

    >>> import timm
    >>> from vision_attn import Neighborhood
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2).eval()
    >>> with torch.no_grad(), attach(model, Neighborhood(window=3), dense_layers=1) as run:
    ...     logits = model(torch.randn(1, 3, 96, 96))
    >>> run.report.towers[0].modules, run.report.towers[0].calls
    (['blocks.1.attn'], {'sparse': 1, 'masked': 0, 'dense': 0})
    """
    merging = isinstance(pattern, TokenMerge)
    if not merging and not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as Neighborhood(window=7), or TokenMerge(); got {pattern!r}")
    if isinstance(pattern, Radial):
        raise ValueError("Radial follows the distance between frames, and this is an image; use Neighborhood or Window")
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach to a torch module; got {type(model).__name__}")
    if backend is not None and (merging or backend not in BACKENDS):
        allowed = "None, for TokenMerge" if merging else f"{', '.join(BACKENDS)}, or None to let attend pick"
        raise ValueError(f"unknown backend {backend!r}; allowed: {allowed}")
    if grid is not None:
        grid = tuple(grid)
        check_grid(grid, rank=(2, 3) if merging else (2,))
    if prefix is not None and (grid is None or not isinstance(prefix, int) or prefix < 0):
        raise ValueError(f"prefix is a number of tokens, from 0, and goes with grid; got {prefix!r} and grid={grid}")
    several = isinstance(dense_layers, Iterable) and not isinstance(dense_layers, (str, bytes))
    dense = tuple(sorted(set(dense_layers))) if several else dense_layers
    options = {"dense_layers": dense, "grid": grid, "backend": backend, "strict": strict}
    towers: list[Tower] = []
    for place in find(plain(model), grid, prefix):
        kept = dense_numbers(dense, sorted({number for number, _, _ in place.layers}))
        tower = MergedTower if merging else PatternTower
        towers.append(tower(place, pattern, kept, options))
    return Run(model, towers, pattern.to_dict(), options, replace)


class PatternTower(Tower):
    """One tower under a pattern; `kept` are the numbers of the layers that stay as they are."""

    def __init__(self, place: Place, pattern: Pattern, kept: frozenset[int], options: dict[str, Any]) -> None:
        if place.family is not None and place.family.frames:
            raise ValueError(
                f"{own_class(place.module).__name__} has tokens of its own before every frame, which no pattern knows; "
                "use TokenMerge('vggt')"
            )
        super().__init__(place, options["grid"], options["strict"])
        self.pattern, self.backend = pattern, options["backend"]
        self.plans: dict[tuple[int, ...], tuple[Pattern, bool]] = {}
        for number, name, module in place.layers:
            if number in kept:
                self.dense.append(name)
            elif is_swin(module):
                swin.check(module, pattern)
                self.add(SwinLayer(self, number, name), module, swin.SwinBlock)
            else:
                self.add(SequenceLayer(self, number, name), module, behaviour_of(module))

    def plan(self, grid: tuple[int, ...]) -> tuple[Pattern, bool]:
        """The pattern fitted to a grid, and whether it is plain attention there; compiled code knows that of `Dense()`
        only."""
        if torch.compiler.is_compiling():
            return fit(self.pattern, grid), isinstance(self.pattern, Dense)
        if grid not in self.plans:
            pattern = fit(self.pattern, grid)
            self.plans[grid] = pattern, pattern.is_dense(grid)
        return self.plans[grid]

    def hides_only(self, grid: tuple[int, ...]) -> bool:
        """Whether a mask can stand for the pattern, which then does nothing but hide."""
        parts = [part for _, part in self.pattern.parts] if isinstance(self.pattern, PerHead) else [self.pattern]
        return all(type(p).prepare is Pattern.prepare and p.score_rule(grid) is None for p in parts)

    def allowed(self, pattern: Pattern, grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Bool `[tokens, tokens]`, or one per head: the pattern with the tokens before the grid."""
        mask = pattern.mask(grid, device)
        return F.pad(mask, (self.prefix, 0, self.prefix, 0), value=True)


class PatternLayer(Layer):
    """What all layers under a pattern share: counts."""

    tower: PatternTower

    def count(self, kind: str, grid: tuple[int, ...], pattern: Any, every: int, prefix: int, width: int) -> None:
        """One call: `every` pairs before, `width` = batch * heads * (head_dim + value_dim)."""
        self.seen = (kind, grid, pattern, every, prefix, int(width))
        if not torch.compiler.is_compiling():
            self.calls[kind] += 1

    @property
    def density(self) -> float | None:
        if self.seen is None:
            return None
        kind, grid, pattern = self.seen[:3]
        return 1.0 if kind == "dense" else pattern.density(grid)

    @property
    def flops(self) -> tuple[int, int] | None:
        """Of the products of queries, keys and values."""
        if self.seen is None:
            return None
        kind, grid, _, every, prefix, width = self.seen
        now = every
        if kind == "sparse":  # under a mask everything is computed, then hidden
            tokens = math.prod(grid)
            now = round(self.density * tokens**2) + prefix * (2 * tokens + prefix)
        return 2 * every * width * self.times, 2 * now * width * self.times


class SequenceLayer(PatternLayer):
    """One attention layer over a sequence: tokens before the grid, then the grid."""

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """In place of `scaled_dot_product_attention`: `[batch, heads, tokens, head_dim]`."""
        given = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        tower, tokens = self.tower, int(query.shape[-2])
        grid = tower.grid
        trouble = None
        if grid is None:
            raise AttachError(
                f"{self.name} was called before the image was cut into tokens, so its grid is not known; call the "
                "model itself, or pass grid=(h, w) to attach"
            )
        if query.ndim != 4 or int(key.shape[-2]) != tokens:
            trouble = "it was called as cross-attention"
        elif tokens != tower.prefix + math.prod(grid):
            trouble = (
                f"it was called with {tokens} tokens, and {tower.prefix} tokens before a grid of {grid[0]} x {grid[1]} "
                f"make {tower.prefix + math.prod(grid)}"
            )
        elif dropout_p > 0 or is_causal:
            trouble = "it was called with dropout of attention weights or a causal mask"
        elif attn_mask is not None and not tower.hides_only(grid):
            trouble = f"it was called with a mask, and {type(tower.pattern).__name__} does more than hide"
        if trouble is not None:
            self.left(trouble)
            self.saw("dense", query, value, None)
            return F.scaled_dot_product_attention(query, key, value, **given)
        pattern, full = tower.plan(grid)
        if full or attn_mask is not None:
            self.saw("sparse" if full else "masked", query, value, pattern)
            if not full:
                allowed = tower.allowed(pattern, grid, query.device)
                whole = attn_mask.dtype == torch.bool
                given["attn_mask"] = allowed & attn_mask if whole else attn_mask.masked_fill(~allowed, -math.inf)
            return F.scaled_dot_product_attention(query, key, value, **given)
        self.saw("sparse", query, value, pattern)
        start = tower.prefix
        return joint_attention(
            query, key, value, None, pattern, grid, start, not start, scale, enable_gqa, tower.backend
        )

    def saw(self, kind: str, query: torch.Tensor, value: torch.Tensor, pattern: Pattern | None) -> None:
        batch, heads, tokens, width = (int(n) for n in query.shape)
        width = batch * heads * (width + int(value.shape[-1]))
        self.count(kind, self.tower.grid, pattern, tokens * tokens, self.tower.prefix, width)


class SwinLayer(PatternLayer):
    """One Swin block, on the whole map."""

    def attention_map(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        tower, attn = self.tower, block.attn
        batch, height, width = (int(n) for n in x.shape[:3])
        pattern = fit(tower.pattern, (height, width))
        rows, columns = attn.window_size
        # Before: every window of the padded map is dense.
        every = -(-height // rows) * -(-width // columns) * (rows * columns) ** 2
        channels = attn.qkv.weight.shape[0] // 3
        self.count("sparse", (height, width), pattern, every, 0, batch * 2 * channels)
        return swin.map_attention(attn, x, pattern, tower.backend)


def dense_numbers(dense_layers: Any, numbers: list[int]) -> frozenset[int]:
    """The numbers of the layers that stay dense, of all `numbers`.

    >>> sorted(dense_numbers(2, [0, 1, 2, 3])), sorted(dense_numbers((3,), [0, 1, 2, 3]))
    ([0, 1], [3])
    """
    entries = dense_layers if isinstance(dense_layers, tuple) else (dense_layers,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entries):
        raise ValueError(
            f"dense_layers must be an int (the first layers) or an iterable of layer numbers from 0; got {entries}"
        )
    dense = frozenset(entries if isinstance(dense_layers, tuple) else range(dense_layers))
    have = f"dense_layers={dense_layers!r}, but the model has the layers {numbers[0]} to {numbers[-1]}"
    if not dense <= set(numbers):
        raise ValueError(have)
    if len(dense) == len(numbers):
        raise ValueError(f"{have}, so nothing would be attached")
    return dense
