"""Names that timm knows, from a table of variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import register_model
from torch import nn

from vision_attn.backbones.skeleton import create

__all__ = ["register_variants"]


def register_variants(
    namespace: dict[str, Any],
    cls: type[nn.Module],
    variants: Mapping[str, Mapping],
    filter_fn: Callable,
    build: Callable = create,
) -> None:
    """Register one timm model per variant, as functions of the module whose `globals()` is `namespace`.

    `variants` maps names to options of `cls`; the module's `default_cfgs` must be there already. `build` takes
    the place of `create`.
    """

    def register(name: str, options: Mapping) -> None:
        def entry(pretrained: bool = False, **kwargs) -> nn.Module:
            return build(cls, name, pretrained, filter_fn, **{**options, **kwargs})

        entry.__name__ = entry.__qualname__ = name
        entry.__module__ = namespace["__name__"]
        entry.__doc__ = f"`{cls.__name__}` with the options of the published {name}."
        namespace[name] = register_model(entry)

    for name, options in variants.items():
        register(name, options)
