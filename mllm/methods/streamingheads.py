"""StreamingHeads: few heads keep the whole image in the cache, the others its ends."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from vision_attn.mllm.image import Layer
from vision_attn.mllm.method import CachePrune
from vision_attn.mllm.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class StreamingHeads(CachePrune):
    """Retrieval heads keep all cached tokens; streaming heads lose the visual ones between the first and the last.

    The prompt is read dense, so the first token is the same. Text is never dropped, and the last tokens are those of
    the prompt: both differ from the papers, whose streaming heads also lose text, more of it as the answer grows, and
    in DuoAttention read the prompt that way too. Heads of different length are stored apart, so the cache is really
    smaller.

    Args:
        table: a number per layer and KV head; large for heads that need everything, such as the gates that DuoAttention
            publishes. `StreamingHeads.identify(model)` makes one.
        streaming: share of all KV heads that stream, 0 to 1: those with the smallest numbers.
        sink: first tokens of a prompt that stay, text included.
        recent: last ones, text included.
        recent_share: these are at least such a share of the prompt, 0 to 1.
        compensate: what a head loses stays as one token, its mean, which counts as often as tokens were lost.

    Papers: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads; RazorAttention:
    Efficient KV Cache Compression Through Retrieval Heads.

    >>> StreamingHeads(table=((0.9, 0.1), (0.2, 0.7)), streaming=0.25).streams().tolist()
    [[False, True], [False, False]]
    """

    table: tuple[tuple[float, ...], ...] = ()
    streaming: float = 0.5
    sink: int = 64
    recent: int = 256
    recent_share: float = 0.0
    compensate: bool = False
    name: ClassVar[str] = "streaming-heads"

    def __post_init__(self) -> None:
        table = tuple(tuple(float(x) for x in row) for row in self.table)
        object.__setattr__(self, "table", table)
        if not table or len({len(row) for row in table}) != 1:
            raise ValueError(
                "StreamingHeads(table=...) needs a number for every KV head of every layer, one row per layer; "
                "StreamingHeads.identify(model) finds them"
            )
        if not torch.tensor(table).isfinite().all():
            raise ValueError("StreamingHeads(table=...) must be finite numbers")
        for name in ("streaming", "recent_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"StreamingHeads({name}={getattr(self, name)!r}): a share from 0 to 1")
        check_ends(self)

    @staticmethod
    def identify(model: Any, echo: float = 0.01, induction: float = 0.14, **options: Any) -> StreamingHeads:
        """RazorAttention: heads that look for repetitions keep everything, the others a part and the mean of the rest.

        A random text of `head_scores` is read once. The best `echo` of all query heads, and the best `induction`, by
        how much they attend to earlier copies of a token and to what followed these, are chosen; a KV head with one of
        them keeps everything.

        Args:
            model: a model of `vision_attn.mllm.FAMILIES`.
            echo, induction: shares of the query heads, 0 to 1.
            options: other fields. As in the paper, 4 sinks, 4000 recent tokens, or a fifth of the prompt if that is
                more, and a compensation token, where they do not say otherwise.
        """
        for name, share in (("echo", echo), ("induction", induction)):
            if not 0 <= share <= 1:
                raise ValueError(f"StreamingHeads.identify({name}={share!r}): a share of the heads from 0 to 1")
        chosen = torch.zeros(())
        for share, scores in zip((echo, induction), head_scores(model), strict=True):
            count = round(share * scores.numel())
            best = torch.zeros(scores.numel())
            best[scores.flatten().argsort(descending=True, stable=True)[:count]] = 1
            chosen = torch.maximum(chosen, best.view(scores.shape))
        kv_heads = model.config.get_text_config().num_key_value_heads
        table = chosen.unflatten(1, (kv_heads, -1)).amax(-1)
        fields = dict(sink=4, recent=4000, recent_share=0.2, compensate=True) | options
        streaming = 1 - table.mean().item()
        return StreamingHeads(table=tuple(map(tuple, table.tolist())), streaming=streaming, **fields)

    def streams(self) -> torch.Tensor:
        """Bool `[layers, kv_heads]`: the streaming heads. Of equal ones those of later layers stream first."""
        gates = torch.tensor(self.table)
        order = gates.flatten().flip(0).argsort(stable=True)
        chosen = torch.zeros(gates.numel(), dtype=torch.bool)
        chosen[order[: round(self.streaming * gates.numel())]] = True
        return chosen.flip(0).view(gates.shape)

    def check(self, model: Any, family: Any) -> None:
        config = model.config.get_text_config()
        wanted = config.num_hidden_layers, config.num_key_value_heads
        if (len(self.table), len(self.table[0])) != wanted:
            raise ValueError(
                f"StreamingHeads(table=...) has {len(self.table)} layers of {len(self.table[0])} KV heads, and "
                f"{type(model).__name__} has {wanted[0]} of {wanted[1]}; StreamingHeads.identify(model) finds them"
            )

    def select(self, layer: Layer) -> torch.Tensor:
        streams = self.streams()[layer.number].to(layer.hidden.device)
        kept = ends(layer.tokens, self.sink, self.recent, self.recent_share)
        return ~streams[:, None] | kept[:, None]

    def store(self, layer: Layer, keep: torch.Tensor) -> tuple[Any, Tokens]:
        if not self.compensate or bool((keep == layer.tokens.valid[:, None]).all()):
            return super().store(layer, keep)
        from vision_attn.mllm.caches import RaggedLayer

        return RaggedLayer.of(*layer.cached, keep, layer.tokens, means=True)


def check_ends(method: Any, *more: str) -> None:
    """Raise unless `sink`, `recent` and `more` fields of a method are counts."""
    for name in ("sink", "recent", *more):
        value = getattr(method, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{type(method).__name__}({name}={value!r}): a count of tokens, at least 0")


def ends(tokens: Tokens, sink: int, recent: int, share: float = 0.0) -> torch.Tensor:
    """Bool `[batch, n]`: the first `sink` tokens of each row, and the last `recent`, or `share` of all if that is more.

    >>> tokens = Tokens.of_prompt(torch.tensor([[False, True, True, True, True]]), torch.zeros(1, 5, dtype=torch.bool))
    >>> ends(tokens, 1, 2).tolist()
    [[False, True, False, True, True]]
    """
    count = tokens.valid.sum(1, keepdim=True)
    last = (share * count).long().clamp(min=recent)
    rank = tokens.valid.long().cumsum(1) - 1
    return tokens.valid & ((rank < sink) | (rank >= count - last))


def head_scores(model: Any, length: int = 64, repeats: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each head attends to earlier copies of a token, and to the tokens that followed these.

    The text is `length` random tokens, `repeats` times. Attention is summed over all earlier copies, and averaged over
    the rows from the second time on.

    Returns:
        Echo and induction scores, float32 `[layers, heads]` each.
    """
    from vision_attn.mllm.interface import listen, switch
    from vision_attn.mllm.rows import row_weights

    if length < 2 or repeats < 2:
        raise ValueError(f"length={length}, repeats={repeats}: at least 2 tokens, at least twice")
    text = model.get_decoder()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (length,), generator=generator).repeat(repeats)
    place = torch.arange(len(ids))
    again = (place[:, None] - place) % length == 0
    echo, follows = again & (place < place[:, None]), torch.zeros_like(again)
    follows[:, 1:] = echo[:, :-1]
    found: list[torch.Tensor] = []

    def look(module, q, k, v, mask, scale, compute):
        sums = torch.zeros(2, q.shape[1])
        for start in range(length, len(ids), 256):
            rows = slice(start, start + 256)
            weights = row_weights(q, k, mask, scale, rows)[0].cpu()
            sums += torch.stack([(weights * marks[rows]).sum((1, 2)) for marks in (echo, follows)])
        found.append(sums / (len(ids) - length))
        return compute(q, k, v, mask)

    undo = [switch(text.config), *(listen(layer.self_attn, look) for layer in text.layers)]
    try:
        with torch.no_grad():
            text(input_ids=ids[None].to(text.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for step in reversed(undo):
            step()
    return tuple(torch.stack(found, 1))
