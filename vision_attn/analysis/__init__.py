"""Looking into attention: maps, statistics, importance of heads, saliency, probing."""

from importlib import import_module

# Public name -> the file that defines it.
_PUBLIC = {
    "Attention": "layer",
    "CollapseAlarm": "statistics",
    "Profile": "statistics",
    "EfficientProbing": "probing",
    "attention_entropy": "calls",
    "entropy_bound": "statistics",
    "fit_probe": "probing",
    "frozen_tokens": "probing",
    "head_importance": "heads",
    "head_mask": "heads",
    "merge_sigma": "sigma",
    "profile": "statistics",
    "record": "recording",
    "rollout": "rollout",
    "saliency": "saliency",
    "to_sigma": "sigma",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'vision_attn.analysis' has no attribute {name!r}; it has {', '.join(sorted(__all__))}"
        )
    value = getattr(import_module(f"vision_attn.analysis.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
