"""The benchmark: check every peer, then time those that are right, in rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..problem import Problem
from .check import sample
from .peers import Forward, Peer
from .problems import GROWTH, describe
from .timing import interleave, machine, peak_bytes, spread

FLEX = "flex-rows"  # the second baseline
COLUMNS = (
    "date", "problem", "peer", "status", "ms", "ms_min", "ms_max", "cpu_ms", "rounds",
    "baseline", "speedup", "speedup_min", "speedup_max", "speedup_cpu",
    "over_flex", "over_flex_min", "over_flex_max", "over_flex_cpu",
    "peak_mb", "error", "allowed", "what", "tokens", "density", "threads", "device", "device_name",
    "python", "torch", "triton", "natten", "commit", "note",
)  # fmt: skip
Row = dict[str, Any]


def run(
    problems: dict[str, Problem],
    peers: dict[str, Peer],
    device: str,
    *,
    rounds: int = 7,
    baseline: str = "sdpa",
    tell: Callable[[str, bool], None] = lambda text, important: None,
    step: Callable[[], None] = lambda: None,
) -> Iterator[list[Row]]:
    """Check and time every peer on every problem; yields the rows of one problem at a time, one row per peer.

    A row has status "ok", "wrong" (no time is taken), "cannot" or "failed", with `note` saying why. Times are medians
    over the rounds with smallest and largest; a speed-up is the median of the ratios within the rounds, which what else
    goes on in the machine disturbs least. `peak_mb` (MiB) is memory beyond inputs and outputs.

    Args:
        problems, peers: by name, as from `pick` and `peers`.
        device: "cpu" or "cuda".
        rounds: how often each peer is measured.
        baseline: the peer that `speedup` is over; `over_flex` is over flex-rows.
        tell: is called with what is going on, and whether it takes long.
        step: is called after every check and round, `len(peers) + rounds` times per problem.
    """
    for name, problem in problems.items():
        rows, calls = [], {}
        inputs = _inputs(problem, device)
        common = {"problem": name, "what": describe(problem), "tokens": problem.tokens, "device": device}
        common |= {"density": round(problem.pattern.density(problem.grid), 6), **machine(device)}
        samples: dict[bool, Any] = {}
        for peer_name, peer in peers.items():
            row = dict.fromkeys(COLUMNS, "") | common | {"peer": peer_name}
            rows.append(row)
            try:
                if peer.compiles and name in GROWTH:
                    reasons = ["not compiled for every size"]
                else:
                    reasons = peer.limits(problem)
                if reasons:
                    row |= {"status": "cannot", "note": "; ".join(reasons)}
                else:
                    tell(f"{name}: {'compiling' if peer.compiles else 'checking'} {peer_name}", peer.compiles)
                    call = _call(peer.make(problem, torch.device(device)), problem, inputs)
                    _check(row, call(), samples, problem, inputs, peer.dense)
                    if row["status"] == "ok":
                        peak = peak_bytes(call, device)
                        row["peak_mb"] = "" if peak is None else round(peak / 2**20, 1)
                        calls[peer_name] = call
            except Exception as error:  # any peer may lack a package, a compiler or memory; the others go on
                text = str(error).strip() or "no message"
                row |= {"status": "failed", "note": f"{type(error).__name__}: {text.splitlines()[0]}"}
            step()
        taken = []
        for index, times in enumerate(interleave(calls, device, rounds)):
            tell(f"{name}: round {index + 1} of {rounds}", False)
            taken.append(times)
            step()
        for row in rows:
            if row["status"] == "ok":
                row |= _numbers(row["peer"], taken, baseline)
        yield rows


def _inputs(problem: Problem, device: str) -> list[torch.Tensor]:
    """q, k, v, and the gradient of the output for problems with a backward."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (problem.batch, *problem.grid)
    sizes = [(problem.heads, problem.head_dim), (problem.kv_heads, problem.head_dim)]
    sizes += [(problem.kv_heads, problem.value_dim)] + [(problem.heads, problem.value_dim)] * problem.needs_grad
    tensors = [torch.randn(*shape, *s, generator=generator, device=device, dtype=problem.dtype) for s in sizes]
    return [t.requires_grad_(problem.needs_grad and i < 3) for i, t in enumerate(tensors)]


def _call(forward: Forward, problem: Problem, inputs: list[torch.Tensor]) -> Callable[[], list[torch.Tensor | None]]:
    """A call without arguments that returns out, lse or None, and gradients when they are asked for."""

    def call():
        with torch.set_grad_enabled(problem.needs_grad):
            out, lse = forward(*inputs[:3])
            grads = torch.autograd.grad(out, inputs[:3], inputs[3]) if problem.needs_grad else ()
        return [out.detach(), lse if lse is None else lse.detach(), *grads]

    return call


def _check(row: Row, outputs: list, samples: dict, problem: Problem, inputs: list[torch.Tensor], dense: bool) -> None:
    with torch.no_grad():
        if dense not in samples:
            grad = inputs[3] if problem.needs_grad else None
            samples[dense] = sample(problem, *inputs[:3], grad, dense)
        off, allowed = samples[dense].compare(outputs)
    row |= {"error": f"{off:.3g}", "allowed": f"{allowed:.3g}", "status": "ok" if off <= allowed else "wrong"}
    if row["status"] == "wrong":
        row["note"] = f"off by {off:.3g}, allowed {allowed:.3g}: not timed"
    elif problem.return_lse and outputs[1] is None:
        row["note"] = "without lse"


def _numbers(peer: str, taken: list[dict[str, tuple[float, float | None]]], baseline: str) -> Row:
    wall = [times[peer][0] for times in taken]
    middle, low, high = (round(value * 1e3, 4) for value in spread(wall))
    row: Row = {"ms": middle, "ms_min": low, "ms_max": high, "rounds": len(taken), "baseline": baseline}
    on_cpu = taken[0][peer][1] is not None
    if on_cpu:
        row["cpu_ms"] = round(statistics.median(times[peer][1] for times in taken) * 1e3, 4)
    for key, other in (("speedup", baseline), ("over_flex", FLEX)):
        if other in taken[0]:
            ratios = spread([times[other][0] / times[peer][0] for times in taken])
            row |= {key + end: round(r, 3) for end, r in zip(("", "_min", "_max"), ratios, strict=True)}
            if on_cpu:
                row[key + "_cpu"] = round(statistics.median(t[other][1] / t[peer][1] for t in taken), 3)
    return row
