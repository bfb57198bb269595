"""Compile the shipped configurations of the block-list kernels for Hopper, on any machine, as `compile` does for boxes.

`python -m vision_attn.kernels.gpu.compile_lists` writes `resources_lists.csv` beside this file. Every problem has two
query heads to a KV head, extra tokens with a mask, a gradient for lse, and a last block that is short.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..patterns import Blocked, BlockList, LengthDecay, Neighborhood, PowerStep, Radial
from ..problem import Problem
from . import lists
from .compile import DTYPES, write
from .launch import Call, Inputs, empty_lse

TABLE = pathlib.Path(__file__).with_name("resources_lists.csv")
GRID = (19, 60, 61)  # so many tokens that Radial has blocks of 128 keys
BLOCKS = -(-math.prod(GRID) // 128)
# What a partial block is tested by, or a score changed by, and a pattern that needs it.
RULES: dict[str, Callable[[], Blocked]] = {
    "blocks": lambda: _list(),
    "bias": lambda: _list(),
    "intervals": lambda: _list(Neighborhood(5)),
    "radial": lambda: Radial(decay=0.2, block=64),
    "masks": lambda: PowerStep(block=128, window=100),
    "decay": lambda: LengthDecay(3, period=3, gamma=0.5, first_frame=True),
}


def _list(within: Neighborhood | None = None) -> BlockList:
    return BlockList.from_mask(torch.ones(2, 8, BLOCKS, BLOCKS, dtype=torch.bool), 128, within)


class Shipped(NamedTuple):
    """One configuration, one of RULES, and one way to load blocks: "descriptor" or "pointer"."""

    kernel: str
    bits: str
    head_dim: str
    own: int
    seen: int
    warps: int
    stages: int
    rule: str
    loads: str


def shipped(every: bool = False) -> Iterator[Shipped]:
    """Every configuration, without a test and blocks loaded by pointer, and with the test of Radial and blocks loaded
    by descriptor; at head dim 128 of 16 bits, or if asked for everywhere, with every other rule too."""
    for kernel, by_bits in lists.CONFIGS.items():
        for bits, by_dim in by_bits.items():
            for head_dim, configs in by_dim.items():
                for config in configs:
                    yield Shipped(kernel, bits, head_dim, *config, "blocks", "pointer")
                    for rule in RULES if every or (bits, head_dim) == ("16", "128") else ("radial",):
                        yield Shipped(kernel, bits, head_dim, *config, rule, "descriptor")


def example(config: Shipped) -> Call:
    """A call that uses this configuration; its large tensors are on the device "meta"."""
    dim, pattern = int(config.head_dim), RULES[config.rule]()
    options = dict(batch=2, heads=8, kv_heads=4, head_dim=dim, value_dim=dim, dtype=DTYPES[config.bits], extra=77)
    problem = Problem(pattern, GRID, device="cuda", extra_mask=True, return_lse=True, **options)

    def tensor(heads: int, *middle: int) -> torch.Tensor:
        return torch.empty(2, *(middle or GRID), heads, dim, dtype=problem.dtype, device="meta")

    q, k, extra = tensor(8), tensor(4), tensor(4, 77)
    mask, lse = torch.empty(2, 77, dtype=torch.bool, device="meta"), empty_lse(problem, q)
    bias = torch.empty_like(pattern.index, dtype=problem.dtype) if config.rule == "bias" else None
    inputs = Inputs(problem, q, k, k, 0.1, (extra, extra), mask, config.loads == "descriptor")
    steps, only = lists.plan(problem, torch.device("cpu")), [config.own, config.seen, config.warps, config.stages]
    return {
        "forward": lambda: lists.forward(inputs, steps, bias, q, lse, only),
        "grad_query": lambda: lists.grad_query(inputs, steps, bias, q, lse, q, lse, lse, q, lse, only),
        "grad_key": lambda: lists.grad_key(inputs, steps, bias, lse, q, lse, k, k, only),
    }[config.kernel]()


if __name__ == "__main__":
    write(TABLE, shipped(), example)
