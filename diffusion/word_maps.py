"""Where the words of a prompt act in a picture: attention to the text, averaged while a pipeline runs."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook
from torch.overrides import TorchFunctionMode

from vision_attn.diffusion.attachment import denoisers
from vision_attn.diffusion.context import Context
from vision_attn.diffusion.families import Grid
from vision_attn.diffusion.hooks import RootHook
from vision_attn.diffusion.installed import CROSS_ATTENTION, Installed
from vision_attn.diffusion.schedule import Schedule, Steps
from vision_attn.diffusion.subject_hooks import subject_layers
from vision_attn.hosts import AttachError
from vision_attn.kernels.patterns import Dense

HOOK = "vision_attn_words"


class WordMaps(Installed):
    """Collects maps of words during the conditional calls of a pipeline, until detached; pictures stay as they are.

    Args:
        target: a pipeline or denoiser whose attention to the text is a layer of its own.
        positions: per sample of the batch, per phrase, the places of its words in the text; empty where it is absent.
    """

    label = "WordMaps"

    def __init__(self, target: Any, positions: list[list[list[int]]]) -> None:
        super().__init__()
        self.positions = positions
        self.sums: dict[Grid, torch.Tensor] = {}
        self.calls: dict[Grid, int] = {}
        pipe, modules = denoisers(target)
        found = {name: subject_layers(module) for name, module in modules.items()}
        options = dict(pattern=Dense(), backend=None, strict=False, temperature="none", train_tokens=None, grid=None)
        with self.installing():
            for name, module in modules.items():
                family, _, crosses = found[name]
                self.claim(module, CROSS_ATTENTION)
                context = Context(family, module.config, Schedule(calls="cond"), Steps(pipe), options)
                parameters = list(inspect.signature(module.forward).parameters)
                self.hook(module, RootHook(context, parameters), HOOK)
                for layer in crosses.values():
                    self.hook(layer, WordHook(self, context), HOOK)
                    self.native_backend(getattr(layer, "processor", None))

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, grid: Grid) -> None:
        """Add up one layer, `[samples, heads, tokens, head_dim]`."""
        if len(query) != len(self.positions):
            raise AttachError(f"a batch of {len(query)} prompts, where the words of {len(self.positions)} are known")
        last = max((place for phrases in self.positions for places in phrases for place in places), default=0)
        if last >= key.shape[2]:
            raise AttachError(
                f"words at token {last} of a prompt, of which the model reads {key.shape[2]}; give shorter prompts"
            )
        maps = torch.zeros(len(query), len(self.positions[0]), query.shape[2])
        for sample, phrases in enumerate(self.positions):
            for head in range(query.shape[1]):  # one at a time: a long text times a long video is much
                scores = (query[sample, head].float() @ key[sample, head].float().T) * scale
                if mask is not None:
                    seen = mask.expand(len(query), query.shape[1], *mask.shape[2:])[sample, head]
                    scores = scores.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else scores + seen
                weights = scores.softmax(-1)
                for phrase, places in enumerate(phrases):
                    if places:
                        maps[sample, phrase] += weights[:, places].mean(-1).cpu() / query.shape[1]
        self.sums[grid] = self.sums.get(grid, 0) + maps
        self.calls[grid] = self.calls.get(grid, 0) + 1

    @property
    def maps(self) -> torch.Tensor:
        """Mean weight of each phrase over heads, words, layers and steps, `[samples, phrases, *grid]`.

        Coarser levels of a U-Net are enlarged to the finest.

        Raises:
            ValueError: nothing was run yet.
        """
        if not self.sums:
            raise ValueError("no conditional call has been made yet, so there are no maps of words")
        finest = max(self.sums, key=math.prod)
        total = 0
        for grid, sums in self.sums.items():
            maps = sums.unflatten(2, grid)
            if grid != finest:
                maps = F.interpolate(maps, finest, mode="bilinear")
            total = total + maps
        return total / sum(self.calls.values())


class WordHook(ModelHook):
    """On an attention layer to the text: looks at its weights."""

    def __init__(self, maps: WordMaps, context: Context) -> None:
        super().__init__()
        self.maps, self.context = maps, context

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.context.active:
            return self.fn_ref.original_forward(*args, **kwargs)
        with Watched(self.maps, self.context):
            return self.fn_ref.original_forward(*args, **kwargs)


class Watched(TorchFunctionMode):
    """Shows every attention call to the maps, and leaves it as it is."""

    def __init__(self, maps: WordMaps, context: Context) -> None:
        super().__init__()
        self.maps, self.context = maps, context

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            query, key, mask = call["query"], call["key"], call.get("attn_mask")
            place = self.context.place(int(query.shape[2]))
            if place is None:
                raise AttachError(f"attention of {query.shape[2]} tokens to the text, which have no place on the grid")
            if self.context.half == "cond":
                query, key = (x[len(x) // 2 :] for x in (query, key))
                mask = mask if mask is None or len(mask) == 1 else mask[len(mask) // 2 :]
            self.maps.add(query, key, mask, call.get("scale") or query.shape[-1] ** -0.5, place[0])
        return func(*args, **kwargs)


def word_places(tokenizer: Any, prompt: str, words: str) -> list[int]:
    """Where the tokens of `words` are among those of `prompt`, every time they occur; empty when they do not."""
    text, sought = tokenizer(prompt).input_ids, tokenizer(words, add_special_tokens=False).input_ids
    if not sought:
        raise ValueError(f"the tokenizer makes nothing of the words {words!r}")
    starts = [i for i in range(len(text) - len(sought) + 1) if text[i : i + len(sought)] == sought]
    return sorted({i + offset for i in starts for offset in range(len(sought))})


def thresholded(maps: torch.Tensor, threshold: float | None = None) -> torch.Tensor:
    """Where each phrase of a picture is: bool of the same shape, no token in two.

    A token is in the mask of the phrase whose map, divided by its mean, is highest there, if that map is above the
    threshold.

    Args:
        maps: `[phrases, *grid]`; each is brought to 0..1 by its least and greatest value. One of zeros stays empty.
        threshold: between 0 and 1. None takes the one of Otsu for each map, which parts its values best in two.
    """
    masks = torch.zeros_like(maps, dtype=torch.bool)
    flat = maps.flatten(1)
    best = (flat / flat.mean(1, keepdim=True).clamp(min=1e-12)).argmax(0).view(maps.shape[1:])
    for phrase, values in enumerate(maps):
        low, high = values.min(), values.max()
        if high > low:
            scaled = (values - low) / (high - low)
            masks[phrase] = (scaled > (_otsu(scaled) if threshold is None else threshold)) & (best == phrase)
    return masks


def _otsu(values: torch.Tensor) -> float:
    """The value that parts `values` into two classes whose means are furthest apart, weighted by their sizes."""
    ordered = values.flatten().sort()[0].double()
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    low = ordered.cumsum(0)[:-1]
    between = count * (len(ordered) - count) * (low / count - (ordered.sum() - low) / (len(ordered) - count)) ** 2
    return float(ordered[between.argmax()])
