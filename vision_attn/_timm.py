"""Our backbones under timm's names, without importing timm before somebody else does."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec


class _Then(Loader):
    """Runs the real loader, then registers our backbones."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            import_module("vision_attn.backbones")
        except Exception as error:  # timm itself is fine, and whoever imports it may not need us
            warnings.warn(f"timm works, but not the backbones of vision_attn: {error!r}", stacklevel=2)


class _OnImport(MetaPathFinder):
    """Waits for the first `import timm`, once."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def register() -> None:
    """Register the backbones now if timm is imported already, otherwise right after it is."""
    if "timm" in sys.modules:
        import_module("vision_attn.backbones")
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
