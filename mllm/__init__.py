"""Pruning and steering of vision-language models. Importing this needs torch only; each name loads on first use."""

from vision_attn._lazy import lazily

# Public name -> the module of this folder that defines it.
_PUBLIC = {
    "attach": "attachment",
    "prefill_flops": "report",
    "kv_bytes": "report",
    "FAMILIES": "families",
    "FasterVLM": "methods.fastervlm",
    "FastV": "methods.fastv",
    "KVPrune": "methods.kvprune",
    "RandomPrune": "methods.baselines",
    "UniformPrune": "methods.baselines",
}

__all__ = list(_PUBLIC)


__getattr__ = lazily(__name__, _PUBLIC)
