"""VAR: attention that is lost on sinks goes to the rest of the image."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from vision_attn.mllm.around import check_layers
from vision_attn.mllm.method import check_numbers
from vision_attn.mllm.steering import RowEdit, Rows, by_column

# Base language model -> dimensions of its residual stream in which sinks have massive values, as published.
SINK_DIMS = {
    "llama-2-7b": (1415, 2533),
    "llama-2-13b": (2100, 4743),
    "qwen2-7b": (458, 2570),
    "internvl2-8b": (3584,),
}
SURE = 2.0**120  # sums of weights times this are above 1 where they are above 1e-36


@dataclasses.dataclass(frozen=True)
class VAR(RowEdit):
    """Take `1 - p` of the attention on sinks, and give it to the visual tokens that are none, in proportion.

    A sink is a token of the prompt whose residual stream, as it enters the layer, has a value above `tau` times its
    root mean square in one of a few dimensions. Edited are the rows of the words after the last image and of all that
    follows, in heads that look at the image (at least `floor` of their attention) and there at other things than sinks
    (a share of at least `rho`). A layer without a visual sink stays as it is. Where the paper and its code differ, this
    is the paper: the share that is not on sinks is at least `rho`, and the last layer stays as it is. The threshold is
    the code's: above, not at `tau`.

    Args:
        dims: the dimensions; None where the base model is known, see `SINK_DIMS`: LLaVA-1.5 and LLaVA-NeXT on Vicuna,
            and Qwen2-VL-7B. For others `find_sinks` looks for them.
        p: what sinks keep, 0 to 1; 1 changes nothing.
        rho: 0 to 1; as published 0.8 for general tasks, 0.5 against hallucination, 0.9 where seeing is all.
        floor: 0 to 1.
        tau: above 0.
        layers: of the text model, from 0; None for all but the first two and the last.

    Raises:
        ValueError: the base model is unknown and there are no `dims`; a number outside of its range.

    >>> VAR(dims=SINK_DIMS["llama-2-7b"], p=0.5).p
    0.5

    Paper: See What You Are Told: Visual Attention Sink in Large Multimodal Models (ICLR 2025).
    """

    dims: tuple[int, ...] | None = None
    p: float = 0.6
    rho: float = 0.5
    floor: float = 0.2
    tau: float = 20.0
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "var"

    def __post_init__(self) -> None:
        check_numbers(self, p=(0, 1), rho=(0, 1), floor=(0, 1), tau=(0, math.inf))
        if self.tau == 0:
            raise ValueError("VAR(tau=0): tau is above 0")

    def check(self, model: Any, family: Any) -> None:
        self.where(len(model.get_decoder().layers))
        config = model.config.get_text_config()
        dims = known_dims(config) if self.dims is None else tuple(self.dims)
        if dims is None:
            raise ValueError(
                f"VAR: the dimensions of sinks are not known for a {config.model_type} text model of width "
                f"{config.hidden_size}; give dims=, which find_sinks(model, prompts) looks for"
            )
        bad = [dim for dim in dims if not isinstance(dim, int) or not 0 <= dim < config.hidden_size]
        if bad or not dims:
            raise ValueError(f"VAR(dims={dims}): dimensions of the residual stream, 0 to {config.hidden_size - 1}")

    def where(self, layers: int) -> tuple[int, ...]:
        return tuple(range(2, layers - 1)) if self.layers is None else check_layers("VAR", self.layers, layers)

    def whole(self, layer: int, layers: int) -> bool:
        return True

    def install(self, engine: Any, undo: list[Callable[[], None]]) -> None:
        layers = engine.model.get_decoder().layers
        dims = known_dims(engine.config) if self.dims is None else self.dims
        for number in self.where(len(layers)):
            engine.before(layers[number], functools.partial(self._look, engine, number, list(dims)))

    def _look(
        self, engine: Any, number: int, dims: list[int], module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Find the sinks among what enters a layer while the prompt is read."""
        prompt = engine.current
        if prompt is None or not engine.reading or engine.branching:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens, notes = prompt.tokens[number], prompt.notes.setdefault(id(self), {})
        sink = (relative(hidden)[..., dims].amax(-1) > self.tau) & tokens.valid
        sink &= (sink & tokens.visual).any(1, keepdim=True)  # without a visual one, none is robbed
        notes[number] = None
        if sink.any():
            total, left, robbed = tokens.visual.float(), (tokens.visual & ~sink).float(), sink.float()
            few = (1 - self.rho) * total - total * robbed  # not below 0 where few of the image's weights are on sinks
            looks = [SURE * part for part in (total, few, left, left, robbed)]
            changes = [robbed * 0] * 3 + [-(1 - self.p) * robbed, (1 - self.p) * left]
            notes[number] = [
                torch.stack([by_column(part, tokens, prompt.length) for part in parts], 1) for parts in (looks, changes)
            ]
        if "least" not in notes:
            least = hidden.new_tensor([-self.floor * SURE, 0, 1, 0, 0], dtype=torch.float32).repeat(len(hidden), 1, 1)
            least[..., 1] = 1e-6 * (1 - self.rho) * SURE * prompt.asked.sum(1)[:, None]
            least[..., :2] += 1  # as much as that is enough
            notes["least"] = least

    def acts(self, layer: int, layers: int, notes: dict[Any, Any]) -> bool:
        return notes[layer] is not None

    def weights(self, rows: Rows, w: torch.Tensor) -> torch.Tensor:
        if rows.notes[rows.layer] is None:
            return w
        looks, changes = rows.notes[rows.layer]
        part, least = rows.of_prompt(w), rows.notes["least"]
        if len(least) < len(part):
            least = least.repeat_interleave(len(part) // len(least), 0)
        sums = torch.baddbmm(least, part, rows.at_prompt(looks, flip=True))
        chosen = sums.amin(-1, keepdim=True).clamp_(0, 1)  # times `SURE` they are 0 and less, or 1 and more
        sums.mul_(chosen.div_(sums.narrow(-1, 2, 1)))  # the last two: 1, and budget / left
        part.addcmul_(part, torch.bmm(sums, rows.at_prompt(changes)))
        return w


def relative(hidden: torch.Tensor) -> torch.Tensor:
    """Absolute values over the root mean square, float32, of `[..., width]`."""
    x = hidden.float()
    return x.abs() * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def known_dims(config: Any) -> tuple[int, ...] | None:
    """The dimensions of sinks of a text model by its configuration, or None."""
    kind, size = config.model_type, (config.hidden_size, config.num_hidden_layers)
    if kind == "llama" and 32000 <= config.vocab_size < 33000:  # Llama 3 has the same sizes, and more words
        return {(4096, 32): SINK_DIMS["llama-2-7b"], (5120, 40): SINK_DIMS["llama-2-13b"]}.get(size)
    return SINK_DIMS["qwen2-7b"] if kind == "qwen2_vl_text" and size == (3584, 28) else None


@torch.no_grad()
def find_sinks(model: Any, prompts: Iterable[dict[str, Any]], tau: float = 20.0) -> tuple[int, ...]:
    """The dimensions of the residual stream in which the sinks of a model have massive values, for `VAR(dims=...)`.

    In each prompt and layer the token with the largest value over its root mean square is taken; a dimension counts
    where the median over prompts of that token's value is above `tau`, in at least half of the layers from 2 to the
    last but one. This detector is ours. Models that are not large may have no such dimension: then it is empty.

    Args:
        prompts: inputs of the model, each a batch; 8 to 32 rows in all are enough.
        tau: above 0.

    Raises:
        ValueError: no prompts.

    >>> from vision_attn.mllm import tiny
    >>> find_sinks(tiny.model().eval(), [{"input_ids": torch.tensor([[1, 7, 8]])}])
    ()

    Paper: the threshold is that of See What You Are Told: Visual Attention Sink in Large Multimodal Models (ICLR 2025).
    """
    layers = model.get_decoder().layers
    middle = range(2, len(layers) - 1)
    found: dict[int, list[torch.Tensor]] = {number: [] for number in middle}
    mask: list[Any] = [None]

    def look(number: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        x = relative(args[0] if args else kwargs["hidden_states"])
        most = x.amax(-1) if mask[0] is None else x.amax(-1).masked_fill(mask[0] == 0, -1)
        found[number].append(x[torch.arange(len(x)), most.argmax(1)])

    handles = [
        layers[number].register_forward_pre_hook(functools.partial(look, number), with_kwargs=True) for number in middle
    ]
    try:
        for prompt in prompts:
            mask[0] = prompt.get("attention_mask")
            model(**{**prompt, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    if not any(found.values()):
        raise ValueError("find_sinks needs prompts, 8 to 32 of them, and a text model of at least 4 layers")
    massive = torch.stack([torch.cat(rows).median(0).values > tau for rows in found.values()])
    return tuple((massive.float().mean(0) >= 0.5).nonzero()[:, 0].tolist())
