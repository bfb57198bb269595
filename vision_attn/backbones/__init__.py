"""Backbones that timm finds by name: importing this package registers them with `timm.create_model`."""

# One name per family; the import registers its models.
from vision_attn.backbones import (  # noqa: F401
    biformer,
    care,
    flowformer,
    illama,
    inline,
    l2vit,
    medvit,
    moh,
    nala,
    nat,
    overlock,
    ravlt,
    shapes_world,
    slab,
    spectformer,
    spectformer_h,
    swin_vsa,
    vig,
    vitae,
)
from vision_attn.backbones.skeleton import Backbone

__all__ = ["Backbone"]
