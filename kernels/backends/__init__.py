"""Backends: ways to compute the same thing. Adding one is one file here and one line in this table.

A backend is a module with `refuse(problem) -> list[str]`, every reason why it cannot do a problem; `by_name_only(problem)`, the reason
why it is not picked on its own, or None; and `run(problem, q, k, v, scale, extra_kv, extra_mask) -> (out, lse)`, where lse may be None
unless `problem.return_lse`. Backends do not import each other and never change the result.
"""

from types import ModuleType

from ..problem import Problem
from . import reference, tiled

BACKENDS: dict[str, ModuleType] = {"tiled": tiled, "reference": reference}  # fastest first


def refusals(problem: Problem) -> dict[str, list[str]]:
    """For every backend the reasons why it cannot do `problem`; an empty list means it can."""
    return {name: backend.refuse(problem) for name, backend in BACKENDS.items()}


def choose(problem: Problem, backend: str | None = None) -> str:
    """The backend that `attend` uses: the named one, or the first that can and is not left to be asked for."""
    if backend is None:
        for name, module in BACKENDS.items():
            if not module.refuse(problem) and module.by_name_only(problem) is None:
                return name
        reasons = [f"{name}: {'; '.join(why) or BACKENDS[name].by_name_only(problem)}" for name, why in refusals(problem).items()]
        raise ValueError("no backend does this on its own:\n  " + "\n  ".join(reasons))
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}, or None to let attend pick")
    reasons = BACKENDS[backend].refuse(problem)
    if reasons:
        able = [name for name, why in refusals(problem).items() if not why]
        raise ValueError(f"backend {backend!r} cannot do this: {'; '.join(reasons)}. Backends that can: {', '.join(able) or 'none'}")
    return backend
