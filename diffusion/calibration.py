"""calibrate(): measure what layers and heads look at on a few prompts, and pick the cheapest pattern that keeps it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from vision_attn.diffusion.attachment import planned
from vision_attn.diffusion.families import Grid
from vision_attn.diffusion.method import Preset
from vision_attn.diffusion.watch import Watch, Watcher, reach
from vision_attn.joint import fit
from vision_attn.kernels.patterns import BlockList, Circle, Dense, Pattern, PerHead

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured: print it for a table, `preset` to attach it, `choose` for another budget.

    Args:
        model: class of the denoiser.
        grids: token grid per layer.
        candidates: the patterns that were tried.
        recalls: per layer `[heads, candidates]`, the share of the attention mass that a candidate keeps, mean over the
            sampled rows; the lower one where a pipeline has two denoisers.
        energy: per layer `[heads, frames, distance]`, the mean weight of a key by its distance from the query in frames
            and in tokens within a frame, times the number of tokens, so that 1 is uniform; NaN where there is no pair.
        rows: sampled rows per head and layer.
        prompts: how many prompts were drawn.
        recall: the budget that `preset` keeps.
        per_head: whether `preset` lets heads differ.
    """

    model: str
    grids: tuple[Grid, ...]
    candidates: tuple[Pattern, ...]
    recalls: tuple[torch.Tensor, ...]
    energy: tuple[torch.Tensor, ...]
    rows: int
    prompts: int
    recall: float
    per_head: bool

    @property
    def preset(self) -> Preset:
        """The cheapest patterns within the budget, to attach or to save."""
        return self.choose(self.recall, self.per_head)

    def choose(self, recall: float, per_head: bool = True) -> Preset:
        """The cheapest patterns that keep at least `recall` of the attention mass of every head.

        Cheap means few query-key pairs. With `per_head` every head gets its own pattern, otherwise every layer one that
        all of its heads can do with. Where no candidate keeps enough, attention stays dense.
        """
        _check_share(recall)
        patterns = []
        for grid, heads in zip(self.grids, self.recalls, strict=True):
            fitted = [fit(pattern, grid) for pattern in self.candidates]
            order = sorted(range(len(fitted)), key=lambda c: fitted[c].density(grid))

            def cheapest(kept: torch.Tensor, order=order) -> Pattern:
                return next((self.candidates[c] for c in order if kept[c] >= recall), Dense())

            if not per_head:
                patterns.append(cheapest(heads.amin(0)))
                continue
            runs = [(pattern, len(list(same))) for pattern, same in itertools.groupby(map(cheapest, heads))]
            one = runs[0][0] if len(runs) == 1 else PerHead(tuple((count, pattern) for pattern, count in runs))
            patterns.append(one)
        size, prompts = "x".join(map(str, self.grids[0])), f"{self.prompts} prompt{'s' * (self.prompts > 1)}"
        note = f"calibrated to keep {recall:.4g} of the attention mass of every head on {prompts}, {size}"
        return Preset(tuple(patterns), {}, self.model, note)

    def head_densities(self, preset: Preset | None = None) -> list[list[float]]:
        """Share of the query-key pairs that a preset of `choose` computes, per layer and head; `preset` by default."""
        chosen = zip(self._per_head(preset), self.grids, strict=True)
        return [[fit(pattern, grid).density(grid) for pattern in heads] for heads, grid in chosen]

    def kept(self, preset: Preset | None = None) -> list[list[float]]:
        """Measured recall per layer and head of a preset of `choose`; `preset` by default."""
        chosen = zip(self._per_head(preset), self.recalls, strict=True)
        column = {pattern: c for c, pattern in enumerate(self.candidates)}
        return [
            [float(measured[head, column[p]]) if p in column else 1.0 for head, p in enumerate(heads)]
            for heads, measured in chosen
        ]

    def _per_head(self, preset: Preset | None) -> list[list[Pattern]]:
        layers = zip((preset or self.preset).pattern, self.recalls, strict=True)
        parts = [p.parts if isinstance(p, PerHead) else ((len(heads), p),) for p, heads in layers]
        return [[pattern for count, pattern in each for _ in range(count)] for each in parts]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the energy."""
        rounded = [[[round(share, 4) for share in head] for head in heads.tolist()] for heads in self.recalls]
        return {
            "model": self.model, "grids": [list(grid) for grid in self.grids], "rows": self.rows,
            "prompts": self.prompts, "recall": self.recall, "per_head": self.per_head,
            "candidates": [pattern.to_dict() for pattern in self.candidates],
            "recalls": rounded,
            "densities": [[round(d, 4) for d in heads] for heads in self.head_densities()],
            "preset": self.preset.to_dict(),
        }  # fmt: skip

    def __str__(self) -> str:
        preset, grid = self.preset, " x ".join(map(str, self.grids[0]))
        shares, kept = [sum(d) / len(d) for d in self.head_densities(preset)], self.kept(preset)
        lines = [
            f"{self.model}, grid {grid}: {len(self.candidates)} candidates, {self.rows} rows per head and layer, "
            f"recall at least {self.recall:.4g}",
            f"pairs computed: {sum(shares) / len(shares):.1%} of dense",
            f"{'layer':>5} {'pairs':>7} {'recall, lowest head':>20}  pattern",
        ]
        for layer, (share, heads, pattern) in enumerate(zip(shares, kept, preset.pattern, strict=True)):
            lines.append(f"{layer:>5} {share:>7.1%} {min(heads):>20.3f}  {_short(pattern)}")
        return "\n".join(lines)

    __repr__ = __str__

    def draw(self, path: str | os.PathLike | None = None) -> Figure:
        """How attention falls off over space and time, and what was picked; see `draw_calibration`."""
        from vision_attn.diffusion.pictures import draw_calibration

        return draw_calibration(self, path)


def calibrate(
    pipe: Any,
    prompts: str | Iterable[str],
    recall: float = 0.95,
    candidates: Iterable[Pattern] | None = None,
    rows: int = 64,
    per_head: bool = True,
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """Measure how much attention mass each candidate keeps, per layer and head, and pick the cheapest within a budget.

    The prompts are drawn with dense attention. In every denoiser call some query rows are sampled and only their
    weights are computed: never the whole map. Text tokens count as kept, because every pattern keeps them.

    Args:
        pipe: a diffusers pipeline of a supported family, nothing attached.
        prompts: one or several; steps and guidance calls all count alike.
        recall: share of the attention mass that every head must keep, above 0, at most 1.
        candidates: patterns to try; by default neighborhoods of many extents, and radial attention for video.
        rows: query tokens sampled per denoiser call.
        per_head: let the heads of a layer have different patterns (`PerHead`), which is computed part by part.
        seed: of noise and rows; prompts count up from it.
        **call: of the pipeline, such as height, width, num_frames, num_inference_steps.

    Returns:
        A `Calibration`: `.preset` for `attach`, `.recalls`, `.draw(path)`.

    Raises:
        TypeError, ValueError: an argument out of range, a candidate that drops nothing by itself (score rules, lists
            made from data), no text encoder, something attached already.

    >>> from vision_attn.diffusion.loading import load
    >>> pipe = load().pipe
    >>> sizes = dict(height=48, width=48, num_frames=17, max_sequence_length=16, num_inference_steps=1)
    >>> found = calibrate(pipe, "a red circle moves right", recall=0.9, rows=8, **sizes)
    >>> len(found.recalls), found.recalls[0].shape, found.preset.model
    (6, torch.Size([4, 11]), 'WanTransformer3DModel')
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(pipe, prompts, recall, rows, call)
    candidates = () if candidates is None else tuple(dict.fromkeys(_checked(c) for c in candidates))
    plan = planned(pipe, Dense(), (0, 0, 0, "both"), "none", None, None, None, False)
    with Watch(*plan, replace=False) as watch:
        for context in watch.contexts:
            context.candidates, context.rows = candidates, rows
            context.generator = torch.Generator().manual_seed(seed)
        for at, prompt in enumerate(prompts):
            noise = torch.Generator("cpu").manual_seed(seed + at)
            pipe(prompt=prompt, generator=noise, output_type="latent", **call)
    model = type(next(iter(plan[1])).module).__name__
    return gather(watch.contexts, model, len(prompts), recall, per_head)


def gather(contexts: list[Watcher], model: str, prompts: int, recall: float, per_head: bool) -> Calibration:
    """The sums of one or two denoisers as a `Calibration`."""
    contexts = [context for context in contexts if context.kept]
    if not contexts:
        raise ValueError("no self-attention over the image was seen; was the denoiser called?")
    first, layers = contexts[0], sorted(contexts[0].kept)
    recalls = [functools.reduce(torch.minimum, [c.kept[i].cpu() / c.seen[i] for c in contexts]) for i in layers]
    energy = []
    for layer in layers:
        size = torch.Size(reach(first.layer_grids[layer]))
        mass = sum(c.energy[layer].cpu() for c in contexts)
        pairs = sum(c.pairs[layer].cpu() for c in contexts)
        tokens = torch.Size(first.layer_grids[layer]).numel()
        energy.append((mass / pairs * tokens).unflatten(-1, size))
    grids = tuple(first.layer_grids[layer] for layer in layers)
    rows = min(min(c.seen.values()) for c in contexts)
    return Calibration(model, grids, first.candidates, tuple(recalls), tuple(energy), rows, prompts, recall, per_head)


def _check(pipe: Any, prompts: list[str], recall: float, rows: int, call: dict[str, Any]) -> None:
    if isinstance(pipe, torch.nn.Module) or not callable(pipe):
        raise TypeError(f"calibrate draws with a diffusers pipeline; got {type(pipe).__name__}")
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must be one or more texts that are not empty; got {prompts!r}")
    _check_share(recall)
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"rows must be an int of at least 1; got {rows!r}")
    encoders = {n: m for n, m in getattr(pipe, "components", {}).items() if n.startswith("text_encoder")}
    if encoders and not any(encoders.values()):
        raise ValueError(f"this {type(pipe).__name__} has no text encoder to read prompts with; load it with one")
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in call if name not in known]:
        raise TypeError(f"{type(pipe).__name__} has no {', '.join(unknown)}; it knows {', '.join(list(known)[1:])}")


def _check_share(recall: Any) -> None:
    if isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1:
        raise ValueError(f"recall must be a share above 0 and at most 1, such as 0.95; got {recall!r}")


def _checked(pattern: Any) -> Pattern:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"candidates must be patterns such as Neighborhood(window=7); got {pattern!r}")
    pooled = isinstance(pattern, Circle) and pattern.pooled is not None
    if isinstance(pattern, (PerHead, BlockList)) or pooled or pattern.score_rule((3, 3, 3)) is not None:
        raise ValueError(
            f"{pattern} cannot be a candidate: what a candidate keeps must follow from positions alone, which is not "
            "so for score rules, pooled tokens and lists made from data; heads are told apart without PerHead"
        )
    return pattern


def _short(pattern: Pattern) -> str:
    if isinstance(pattern, PerHead):
        return ", ".join(f"{heads}x {_short(part)}" for heads, part in pattern.parts)
    fields = dataclasses.fields(pattern)
    changed = [f"{f.name}={getattr(pattern, f.name)}" for f in fields if getattr(pattern, f.name) != f.default]
    return f"{type(pattern).__name__}({', '.join(changed)})"
