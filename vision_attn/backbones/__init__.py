"""Backbones that timm finds by name: importing this package registers them with `timm.create_model`."""

import sys

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

__all__ = ["Backbone", "backbones_table"]


def backbones_table() -> str:
    """Markdown table of the families: file, what it is, names."""
    from timm import list_models

    lines = ["| file | what | names |", "|---|---|---|"]
    for name in sorted(sys.modules):
        family = name.removeprefix(f"{__name__}.")
        if family != name and (models := list_models(module=family)):
            what = sys.modules[name].__doc__.splitlines()[0].rstrip(".")
            lines.append(f"| `{family}.py` | {what} | {', '.join(f'`{model}`' for model in models)} |")
    return "\n".join(lines)
