"""Compile every shipped configuration for Hopper, on any machine, and write down what the compiler says.

`python -m vision_attn.kernels.gpu.compile` writes `resources.csv` beside this file: registers per thread, bytes of
stack per thread (what did not fit into registers), bytes of shared memory per program. The problem is the one that
needs most: a grid of three axes, two query heads to a KV head, extra tokens with a mask, a gradient for lse.
"""

from __future__ import annotations

import csv
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..patterns import Neighborhood
from ..problem import Problem
from . import launch
from .launch import CONFIGS, Call, Inputs

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that one program may have on that GPU
TABLE = pathlib.Path(__file__).with_name("resources.csv")
DTYPES = {"16": torch.bfloat16, "32": torch.float32}


class _Device:
    """Stands where Triton expects a GPU, and names the target."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def compiled(call: Call) -> Any:
    """Compile a call as its launch would; its tensors may be on the device "meta"."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Device())
    try:
        return call.kernel.warmup(*call.arguments, grid=(call.programs,), **call.options)
    finally:
        driver._active = before


class Shipped(NamedTuple):
    """One configuration and one way to load boxes: "descriptor" or "pointer"."""

    kernel: str
    bits: str
    head_dim: str
    own: int
    seen: int
    warps: int
    stages: int
    loads: str


def shipped() -> Iterator[Shipped]:
    for kernel, by_bits in CONFIGS.items():
        for bits, by_dim in by_bits.items():
            for head_dim, configs in by_dim.items():
                for config in configs:
                    for loads in ("pointer",) if kernel == "grad_extra" else ("descriptor", "pointer"):
                        yield Shipped(kernel, bits, head_dim, *config, loads)


def example(config: Shipped) -> Call:
    """A call that uses this configuration."""
    dim = int(config.head_dim)
    sizes = dict(batch=2, heads=8, kv_heads=4, head_dim=dim, value_dim=dim, dtype=DTYPES[config.bits])
    asked = dict(extra=77, extra_mask=True, return_lse=True)
    problem = Problem(Neighborhood((8, 32, 32)), (16, 64, 64), device="cuda", **sizes, **asked)
    only = [config.own, config.seen, config.warps, config.stages]
    return calls(problem, config.loads == "descriptor", only)[config.kernel]()


def calls(problem: Problem, boxed: bool, only: list[int] | None = None) -> dict[str, Callable[[], Call]]:
    """The calls of a forward and backward of a problem, on tensors without data."""

    def tensor(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(problem.batch, *shape, dtype=dtype, device="meta")

    q, k = (tensor(*problem.grid, heads, problem.head_dim) for heads in (problem.heads, problem.kv_heads))
    out, v = (tensor(*problem.grid, heads, problem.value_dim) for heads in (problem.heads, problem.kv_heads))
    extra = [tensor(problem.extra, problem.kv_heads, dim) for dim in (problem.head_dim, problem.value_dim)]
    mask = tensor(problem.extra, dtype=torch.bool) if problem.extra_mask else None
    call = Inputs(problem, q, k, v, 0.1, tuple(extra) if problem.extra else None, mask, boxed)
    lse = launch.empty_lse(problem, q)
    grad_lse = lse if problem.return_lse else None
    found = {
        "forward": lambda: launch.forward(call, out, lse, only),
        "grad_query": lambda: launch.grad_query(call, out, lse, out, grad_lse, lse, q, only),
        "grad_key": lambda: launch.grad_key(call, lse, out, lse, k, v, only),
    }
    return found | ({"grad_extra": lambda: launch.grad_extra(call, lse, out, lse, only)[0]} if problem.extra else {})


def resources(kernel: Any) -> dict[str, int]:
    """Registers and stack per thread, and shared memory, of a compiled kernel."""
    dump = pathlib.Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}


def write(table: pathlib.Path, configs: Iterator[NamedTuple], example: Callable[[Any], Call]) -> None:
    """Compile every configuration and write what the compiler says of it."""
    rows = []
    for config in configs:
        found = resources(compiled(example(config)))
        rows.append(config._asdict() | found | {"triton": triton.__version__})
        print(",".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    write(TABLE, shipped(), example)
