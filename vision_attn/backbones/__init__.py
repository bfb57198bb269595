"""Backbones that timm finds by name: importing this package registers them with `timm.create_model`."""

# One name per family; the import registers its models.
from vision_attn.backbones import biformer, moh, nala, nat, overlock, ravlt, swin_vsa, vitae  # noqa: F401
from vision_attn.backbones.skeleton import Backbone

__all__ = ["Backbone"]
