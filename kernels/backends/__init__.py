"""Backends: ways to compute the same thing. Adding one is one file here and one line in the table below.

A backend is a module with
- `limits(problem) -> list[str]`: every reason, from the problem alone, why it cannot do it;
- `missing(device) -> list[str]`: what this machine lacks to run it on a device type such as "cuda";
- `by_name_only(problem) -> str | None`: why it is not picked on its own;
- `run(problem, q, k, v, scale, extra_kv, extra_mask, bias) -> (out, lse)`, lse None unless `problem.return_lse`;
- `backward(problem, q, k, v, scale, extra_kv, extra_mask, bias, out, lse, grad_out, grad_lse)`, optional: gradients of
  q, k, v, the extra keys and values, and the bias (None where there is no such input) without autograd, which lets it
  train inside compiled graphs. `lse` is None unless the problem returns it;
- `load() -> bool`, optional: have it ready to run, which may take a while; False when that failed, and `missing` says
  why.

Backends do not import each other and never change the result.
"""

from types import ModuleType

from ..problem import Problem
from . import cpu, flex, masked, natten, reference, tiled, triton

# In the order of preference: the first that can do a problem, and does not wait to be asked by name, is used.
BACKENDS: dict[str, ModuleType] = {
    "natten": natten,
    "triton": triton,
    "flex": flex,
    "cpu": cpu,
    "masked": masked,
    "tiled": tiled,
    "reference": reference,
}


def refuse(name: str, problem: Problem) -> list[str]:
    """Every reason why backend `name` cannot do `problem` here; empty when it can."""
    module = BACKENDS[name]
    reasons = module.missing(problem.device) + module.limits(problem)
    if problem.in_graph and problem.needs_grad and not hasattr(module, "backward"):
        reasons.append("no gradients inside a graph of torch.compile")
    return reasons


def choose(problem: Problem, backend: str | None = None) -> str:
    """The backend that `attend` uses: the named one, or the first that can and is not left to be asked for."""
    if backend is None:
        return next(n for n, m in BACKENDS.items() if not m.by_name_only(problem) and not refuse(n, problem))
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}, or None to let attend pick")
    reasons = refuse(backend, problem)
    if reasons:
        able = [name for name in BACKENDS if not refuse(name, problem)]
        raise ValueError(f"backend {backend!r} cannot do this: {'; '.join(reasons)}. These can: {', '.join(able)}")
    return backend


def ready(problem: Problem, backend: str | None = None) -> str:
    """`choose`, loaded: where loading fails, the next backend that can, or the reason why the named one cannot."""
    name = choose(problem, backend)
    load = getattr(BACKENDS[name], "load", None)
    return name if load is None or load() else choose(problem, backend)
