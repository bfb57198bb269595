"""Pruning and steering of vision-language models. Importing this needs torch only; each name loads on first use."""

from importlib import import_module

# Public name -> the module of this folder that defines it.
_PUBLIC = {
    "attach": "attachment",
    "FAMILIES": "families",
    "FasterVLM": "methods.fastervlm",
    "FastV": "methods.fastv",
    "KVPrune": "methods.kvprune",
    "RandomPrune": "methods.baselines",
    "UniformPrune": "methods.baselines",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
