"""Backbones that timm finds by name: importing this package registers them with `timm.create_model`."""

from vision_attn.backbones.skeleton import Backbone

# One line per family; the import registers its names.

__all__ = ["Backbone"]
