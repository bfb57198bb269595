"""CARVE: look where a question makes the model look more than a description does, and look again at that alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vision_attn.mllm.attachment import attach
from vision_attn.mllm.grids import grids, overview
from vision_attn.mllm.maps import Capture
from vision_attn.mllm.regions import regions

GENERAL = "Write a general description of the image."
SHORT = "Answer the question using a single word or phrase."


@dataclasses.dataclass(frozen=True)
class Carved:
    """What came of CARVE.

    Args:
        answer: ids of the second pass, long `[tokens]`; `first` those of the first one.
        refined: PIL image, the regions that stay, cut out and enlarged.
        given: the pictures of the second pass.
        saliency: float32 `[height, width]` of the picture.
        mask: bool `[height, width]`, the regions that stay.
        steps: of generation that were compared.
    """

    answer: torch.Tensor
    first: torch.Tensor
    refined: Any
    given: list[Any]
    saliency: torch.Tensor
    mask: np.ndarray
    steps: int


@dataclasses.dataclass(frozen=True)
class CARVE:
    """Answer a question twice: the second time also from a picture of the regions that the question is about.

    Attention to the picture while answering is divided by that while describing, and summed over layers and steps; the
    top fifth of the pixels makes regions, and those with the largest sums stay. About three generations. The map is
    stretched over the whole picture, as published: have the processor resize it rather than crop it.

    Args:
        top: share of the pixels above the threshold, above 0 and below 1.
        components: share of the regions that stay, at least three.
        layers: of the text model, from 0; None for 20 to 25, or for less than 28 layers for those from 0.7 to 0.9 of
            the depth (ours).
        steps: of generation that are compared, and tokens of the answers.
        version: 4 as published; 1 to 3, its simpler forms, look at the first step only; 2 keeps the largest regions, 1
            all but those below a thousandth of the mask.
        normalise: divide both maps by their sums before they are compared (ours); as published the ratio has no bound
            where a description looks at nothing.
        pair: show the picture and its refined form; False shows the refined one alone, for models that take one.
        general, suffix: the instruction to describe, and what is put after both instructions.

    Raises:
        ValueError: a share out of range, an unknown version.

    >>> CARVE().chosen(32), CARVE().chosen(4)
    ((20, 21, 22, 23, 24, 25), (2, 3))

    Paper: Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning. Sizes and defaults are those of the
    authors' code.
    """

    top: float = 0.2
    components: float = 0.2
    layers: tuple[int, ...] | None = None
    steps: int = 32
    version: int = 4
    normalise: bool = False
    pair: bool = True
    general: str = GENERAL
    suffix: str = SHORT

    def __post_init__(self) -> None:
        for name in ("top", "components"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"CARVE({name}={getattr(self, name)!r}): a share above 0 and below 1")
        if self.version not in (1, 2, 3, 4):
            raise ValueError(f"CARVE(version={self.version!r}): allowed are 1, 2, 3 and 4")
        if self.steps < 1:
            raise ValueError(f"CARVE(steps={self.steps!r}): at least 1")

    def chosen(self, layers: int) -> tuple[int, ...]:
        """The layers that are looked at, of so many.

        Raises:
            ValueError: a layer that is not there.
        """
        if self.layers is None:
            return tuple(range(20, 26) if layers >= 28 else range(int(0.7 * layers), int(0.9 * layers) + 1))
        if not self.layers or min(self.layers) < 0 or max(self.layers) >= layers:
            raise ValueError(f"CARVE(layers={self.layers}): the text model has layers 0 to {layers - 1}")
        return self.layers

    def __call__(
        self, model: Any, read: Callable[[list[Any], str], dict[str, Any]], picture: Any, question: str
    ) -> Carved:
        """Answer a question about a PIL picture; returns a `Carved`.

        Args:
            model: of one of the families of `vision_attn.mllm.FAMILIES` with a grid, nothing attached.
            read: `(pictures, text) -> inputs` of `model.generate` for one prompt, by the processor of the model.

        Raises:
            ValueError: the model has no grid, or something is attached.
        """
        asked, described = (f"{text} {self.suffix}".strip() for text in (question, self.general))
        first, own = self._look(model, read([picture], asked))
        _, other = self._look(model, read([picture], described))
        saliency = self.saliency(own, other, picture.size)
        mask = self.mask(saliency.numpy())
        refined = cut_out(picture, mask)
        given = [picture, refined] if self.pair else [refined]
        answer = _generate(model, read(given, asked), self.steps)
        return Carved(answer, first, refined, given, saliency, mask, min(len(own), len(other)))

    def _look(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids of an answer, and the attention of its steps to the picture, `[steps, layers, rows, columns]`."""
        layers = self.chosen(len(model.get_decoder().layers))
        grid = overview(model, grids(model, inputs))
        look = Capture(layers, reduce=lambda weights, image: grid.of(weights[0, :, 0].mean(0)).cpu())
        with attach(model, look):
            ids = _generate(model, inputs, self.steps)
        return ids, torch.stack([torch.stack([step[layer] for layer in layers]) for step in look.steps])

    def saliency(self, own: torch.Tensor, other: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """How much more a question looks at each pixel than a description, float32 `[height, width]`.

        Args:
            own: attention while answering, `[steps, layers, rows, columns]`; `other` that while describing.
            size: width and height of the picture.
        """
        steps = min(len(own), len(other)) if self.version == 4 else 1
        own, other = own[:steps].float(), other[:steps].float()
        if self.normalise:
            own, other = (maps / maps.sum((-2, -1), keepdim=True) for maps in (own, other))
        weights = torch.arange(1, steps + 1.0)
        ratio = torch.einsum("t,tlrc->rc", weights, own / (other + 1e-8))
        return F.interpolate(ratio[None, None], size[::-1], mode="bilinear", align_corners=False)[0, 0]

    def mask(self, saliency: np.ndarray) -> np.ndarray:
        """Bool `[height, width]`: the regions of the highest pixels that stay."""
        high = saliency >= np.quantile(saliency, 1 - self.top)
        numbers, count = regions(high)
        areas = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
        if self.version == 1:
            stay = areas >= 0.001 * high.sum()
        else:
            sums = np.bincount(numbers.ravel(), saliency.ravel(), minlength=count + 1)[1:]
            order = np.argsort(-(areas if self.version == 2 else sums), kind="stable")
            stay = np.isin(np.arange(count), order[: max(3, int(self.components * count))])
        return np.concatenate([[False], stay])[numbers]


def cut_out(picture: Any, mask: np.ndarray) -> Any:
    """A PIL picture, black outside of a mask, cropped to it and enlarged until it covers its old size.

    >>> from PIL import Image
    >>> mask = np.zeros((20, 40), dtype=bool)
    >>> mask[5:10, 10:15] = True
    >>> cut_out(Image.new("RGB", (40, 20), "red"), mask).size
    (40, 40)
    """
    from PIL import Image

    pixels = np.where(mask[..., None], np.asarray(picture.convert("RGB")), 0).astype(np.uint8)
    (top, bottom), (left, right) = ((where.min(), where.max() + 1) for where in mask.nonzero())
    small = Image.fromarray(pixels[top:bottom, left:right])
    scale = max(picture.width / small.width, picture.height / small.height)
    return small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.LANCZOS)


def _generate(model: Any, inputs: dict[str, Any], steps: int) -> torch.Tensor:
    """The ids that a prompt of one row is answered with, greedily."""
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[0]
    prompt = inputs["input_ids"].shape[1]
    return ids[prompt:] if torch.equal(ids[:prompt], inputs["input_ids"][0].to(ids)) else ids
