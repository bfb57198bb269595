"""What an attached run did to the prompts it read: tokens, FLOPs of the prefill by formula, bytes of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch


def prefill_flops(config: Any, tokens: Sequence[int], convention: str = "exact") -> float:
    """Floating-point operations of reading a prompt of one row, vision tower excluded.

    Args:
        config: of the text model.
        tokens: how many each layer works on, one number per layer.
        convention: "exact" counts projections, both products of attention with every key, a gated MLP as such, and the
            output of the last token. "fastv" is the count of FastV and DivPrune, in multiply-adds:
            `4 n D^2 + 2 n^2 D + 2 n D m` per layer.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig()  # 32 layers, as LLaVA-1.5-7B
    >>> full = prefill_flops(config, [640] * 32)
    >>> f"{full / 1e12:.2f} TFLOP, {prefill_flops(config, [640] * 2 + [352] * 30) / full:.1%} with half from layer 2"
    '8.50 TFLOP, 57.2% with half from layer 2'
    """
    if convention not in ("exact", "fastv"):
        raise ValueError(f"convention must be 'exact' or 'fastv'; got {convention!r}")
    if len(tokens) != config.num_hidden_layers:
        raise ValueError(f"{len(tokens)} token counts for {config.num_hidden_layers} layers; give one per layer")
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    gated = hasattr(config, "intermediate_size")
    inner = config.intermediate_size if gated else config.ffn_dim
    total = 0.0
    for n in tokens:
        if convention == "fastv":
            total += 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * inner
        else:
            projections = n * width * 2 * (heads + kv_heads) * head_dim
            mlp = (3 if gated else 2) * n * width * inner
            total += 2 * (projections + 2 * n**2 * heads * head_dim + mlp)
    return total if convention == "fastv" else total + 2 * width * config.vocab_size


def kv_bytes(config: Any, tokens: int, dtype: torch.dtype = torch.float16) -> int:
    """Bytes of the keys and values that the stock model holds after a prompt of `tokens` in one row.

    >>> from transformers import LlamaConfig
    >>> kv_bytes(LlamaConfig(), 640) // 2**20  # MiB, LLaVA-1.5-7B
    320
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    held = [min(tokens, config.sliding_window - 1) if kind == "sliding_attention" else tokens for kind in kinds]
    return 2 * heads * head_dim * dtype.itemsize * sum(held)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, as they are; counters left out."""
    ours = (layer.nbytes for layer in cache.layers if hasattr(layer, "nbytes"))
    held = (value for layer in cache.layers for value in vars(layer).values() if torch.is_tensor(value))
    return sum(ours) + sum(tensor.nbytes for tensor in held if tensor.ndim > 1)


@dataclasses.dataclass(frozen=True)
class Read:
    """One prompt that was read.

    Args:
        rows: samples in the batch.
        visual: visual tokens of each row before anything was dropped.
        kept: those of each row that reach the last layer.
        tokens: width of every layer: the tokens of the longest row.
        length: columns of the prompt, padding included.
        padded: share of the last layer's columns that are padding.
        flops, stock_flops: of the text model for the whole batch by `prefill_flops`, padding included, with and without
            dropping.
        other_flops: of other passes over the prompt that methods ask for: second branches, the words alone, looking
            ahead.
        cache, stock_cache: bytes that the cache holds after the prompt, and what a dynamic one would without dropping.
        select_seconds: host time spent on choosing tokens.
    """

    rows: int
    visual: list[int]
    kept: list[int]
    tokens: list[int]
    length: int
    padded: float
    flops: float
    stock_flops: float
    other_flops: float
    cache: int
    stock_cache: int
    select_seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did. `str()` is for people, `to_dict()` for programs.

    Args:
        model: class of the model.
        methods: name and options of every attached method.
        positions: "original" or "compact".
        prompts: what was read, oldest first; the newest thousand are kept.
    """

    model: str
    methods: list[dict[str, Any]]
    positions: str
    prompts: list[Read]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        named = ", ".join(
            f"{m['method']}({', '.join(f'{k}={v!r}' for k, v in m.items() if k != 'method')})" for m in self.methods
        )
        lines = [f"{self.model}: {named}"]
        if not self.prompts:
            return "\n".join([*lines, "  no prompt with an image was read yet"])
        visual, kept = (sum(sum(getattr(p, name)) for p in self.prompts) for name in ("visual", "kept"))
        flops, stock = (sum(getattr(p, name) for p in self.prompts) for name in ("flops", "stock_flops"))
        other = sum(p.other_flops for p in self.prompts)
        cache, full = (sum(getattr(p, name) for p in self.prompts) for name in ("cache", "stock_cache"))
        last = self.prompts[-1]
        lines += [
            f"  prompts   {len(self.prompts)} read, positions {self.positions}",
            f"  visual    {kept} of {visual} tokens reach the last layer ({kept / max(visual, 1):.1%})",
            f"  layers    {_layers(last.tokens)} tokens of the last prompt, {last.length} long",
            f"  prefill   {flops / 1e9:.3g} of {stock / 1e9:.3g} GFLOP by formula ({flops / stock:.1%}), no tower",
        ]
        if other:
            both = f"{(flops + other) / stock:.1%} with the above"
            lines.append(f"  and more  {other / 1e9:.3g} GFLOP, for reading the prompt in other ways too ({both})")
        if cache:
            lines.append(f"  cache     {cache / 2**20:.3g} of {full / 2**20:.3g} MiB after the prompt")
        if last.padded:
            lines.append(f"  padding   {last.padded:.1%} of the last layer's columns in the last prompt")
        lines.append(f"  choosing  {1000 * sum(p.select_seconds for p in self.prompts):.1f} ms on the host")
        return "\n".join(lines)


def _layers(tokens: list[int]) -> str:
    """Runs of equal counts: '0-1: 640, 2-31: 352'."""
    starts = [i for i, n in enumerate(tokens) if i == 0 or tokens[i - 1] != n]
    ends = [*(start - 1 for start in starts[1:]), len(tokens) - 1]
    return ", ".join(
        f"{a}-{b}: {tokens[a]}" if b > a else f"{a}: {tokens[a]}" for a, b in zip(starts, ends, strict=True)
    )
