"""VisualBlockPattern: frames see the frames next to them, and the words, through block lists."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.kernels.attend import attend
from vision_attn.kernels.patterns import BlockList, Neighborhood
from vision_attn.kernels.patterns.blocks import lists_from_map
from vision_attn.mllm.around import Around, Call, check_layers
from vision_attn.mllm.grids import Grid


@dataclasses.dataclass(frozen=True)
class VisualBlockPattern(Around):
    """While a long prompt is read, visual tokens see the words before them and the last few frames only.

    Pictures, and the views of a picture in tiles, count as frames. Words see all that is before them. The pattern is
    rounded out to whole blocks: of two blocks in which any pair of tokens is allowed, all pairs are that stand in
    order. A prompt with one view is read as before. The kernels skip what is left out, which pays for long prompts
    only: at 9 264 tokens it took 0.54 of the time, at 609 twice as long (a text model of two layers and width 256, one
    CPU core). The cache and what follows the prompt do not change.

    Args:
        frame_window: frames before its own that a visual token sees, at least 0.
        sinks: tokens at the start of the prompt that all see, at least 0.
        block: tokens on a side of a block, at least 1.
        layers: of the text model; None is all.
        backend: of the kernels, a name from `vision_attn.explain`; None picks.

    Raises:
        ValueError: values out of range, or a model in which tokens see those after them or only a window of those
            before.

    A pattern of this package, from the frames alone; for attention that is sparse in blocks see MInference:
    Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention.
    """

    frame_window: int = 1
    sinks: int = 4
    block: int = 64
    layers: tuple[int, ...] | None = None
    backend: str | None = None
    name: ClassVar[str] = "visual-blocks"
    text: ClassVar[bool] = False
    anew: ClassVar[bool] = True
    grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.frame_window < 0 or self.sinks < 0 or self.block < 1:
            raise ValueError(
                f"VisualBlockPattern(frame_window={self.frame_window}, sinks={self.sinks}, block={self.block}): "
                "frame_window and sinks at least 0, block at least 1"
            )

    def check(self, model: Any, family: Any) -> None:
        config = model.config.get_text_config()
        check_layers(type(self).__name__, self.layers, config.num_hidden_layers)
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if sliding or family.name.startswith(("Gemma3", "PaliGemma")):
            raise ValueError(
                f"VisualBlockPattern is for text models in which every token sees all before it and none after it; "
                f"{type(model).__name__} has {'layers with a window' if sliding else 'pictures that see ahead'}"
            )

    def where(self, layers: int) -> tuple[int, ...]:
        return check_layers(type(self).__name__, self.layers, layers)

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not call.reading or not call.views:
            return call.compute(q, k, v, call.mask)
        tokens, columns = q.shape[2], call.columns[:, 0]
        out = q.new_zeros(len(q), tokens, q.shape[1], v.shape[-1])
        for row, first in enumerate((columns[:, :tokens] < 0).sum(1).tolist()):
            places = columns[row, first:tokens]
            key = "pattern", row, places.shape[0]
            if key not in call.notes or call.notes[key][0] is not call.prompt.tokens[call.layer]:
                frames = frame_numbers([view for view in call.views if view.row == row], places)
                call.notes[key] = call.prompt.tokens[call.layer], self.pattern(frames)
            pattern = call.notes[key][1]
            part = [x[row : row + 1, :, first:tokens].transpose(1, 2) for x in (q, k, v)]
            out[row, first:] = attend(*part, pattern, scale=call.scale, backend=self.backend)[0]
        return out

    def pattern(self, frames: torch.Tensor) -> BlockList:
        """The block lists of a prompt: long `[n]`, number of the frame of each token, -1 for words.

        >>> words, first, second = [-1] * 2, [0] * 2, [1] * 2
        >>> method = VisualBlockPattern(frame_window=0, sinks=0, block=2)
        >>> method.pattern(torch.tensor([*words, *first, *second, *words])).mask((8,)).int()[4].tolist()
        [1, 1, 0, 0, 1, 0, 0, 0]
        """
        n, size, device = len(frames), self.block, frames.device
        count, block, words = -(-n // size), torch.arange(n, device=device) // size, frames < 0
        seen_by_all = words | (torch.arange(n, device=device) < self.sinks)
        queries, keys = (torch.zeros(count, dtype=torch.bool, device=device) for _ in range(2))
        queries[block[words]] = True
        keys[block[seen_by_all]] = True
        has = torch.zeros(count, max(int(frames.max()), 0) + 1, device=device)  # which frames are in which block
        has[block[~words], frames[~words]] = 1
        reach = torch.nn.functional.pad(has, (self.frame_window, 0)).unfold(1, self.frame_window + 1, 1).amax(-1)
        order = torch.arange(count, device=device)
        visited = (queries[:, None] | keys | (has @ reach.T > 0)) & (order <= order[:, None])
        lists = lists_from_map((size, size), visited, order < order[:, None])
        causal = Neighborhood(window=n, causal=True)
        return BlockList(size, lists.index, lists.count, lists.full_count, causal)


def frame_numbers(views: list[Grid], columns: torch.Tensor) -> torch.Tensor:
    """Number of the view that shows each token, long `[n]`, from their columns; -1 for those on none."""
    number = columns.new_full((int(columns.max()) + 1,), -1)
    for which, view in enumerate(views):
        inside = view.columns.flatten().to(columns.device)
        number[inside[inside < len(number)]] = which
    return number[columns]
