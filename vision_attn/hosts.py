"""The one verb for every host: look up who serves a model, and let them attach."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Top-level package of the model's class -> the module whose attach() serves it; a name, so that nothing is imported
# early. Image towers of any package, and patterns on those of transformers, go to the retrofit.
HOSTS = {"diffusers": "vision_attn.diffusion.attachment", "transformers": "vision_attn.mllm.attachment"}
RETROFIT = "vision_attn.retrofit"


class AttachError(ValueError):
    """An attached model was called in a way that the attachment cannot serve; the message says what to do."""


def attach(target: Any, *what: Any, **options: Any) -> Any:
    """Put a pattern or a method into a model, until detached.

    Args:
        target: a diffusers pipeline, or a denoiser such as `pipe.transformer`; an image model of timm, open_clip or
            transformers, VGGT, or with `grid=` any other torch module; a vision-language model of transformers.
        what: who sees whom on the token grid, for example `Radial(decay=0.2)`, or a method of `vision_attn.diffusion`;
            for image models a pattern or `TokenMerge()`, for VGGT `TokenMerge("vggt")`; for vision-language models one
            or more methods of `vision_attn.mllm`.
        **options: of the host, such as `dense_layers`; see `vision_attn.diffusion.attach` for diffusers,
            `vision_attn.retrofit.attach` for image models, `vision_attn.mllm.attach` for vision-language models.

    Returns:
        A run: context manager, `run.detach()`, and `run.report` but for vision-language models.

    Raises:
        TypeError: no host serves the target.
        ValueError: the host cannot attach to it, or an option is out of range.

    >>> import timm
    >>> from vision_attn import Neighborhood
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> with attach(model, Neighborhood(window=7), dense_layers=1) as run:
    ...     run.report.towers[0].modules
    ['blocks.1.attn']

    >>> from diffusers import PixArtTransformer2DModel
    >>> small = dict(num_layers=2, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=8)
    >>> model = PixArtTransformer2DModel(**small)
    >>> with attach(model, Neighborhood(window=7)) as run:
    ...     run.report.denoisers[0].modules
    ['transformer_blocks.0.attn1', 'transformer_blocks.1.attn1']
    """
    cls = type(plain(target))
    packages = [base.__module__.partition(".")[0] for base in cls.__mro__]
    host = next((HOSTS[package] for package in packages if package in HOSTS), None)
    if host is None and "torch" not in packages:
        raise TypeError(
            f"cannot attach to {cls.__name__}; allowed: pipelines of diffusers, and torch modules, such as the "
            "models of diffusers, timm, open_clip and transformers"
        )
    if host is None or (host == HOSTS["transformers"] and what and _is_of_images(what[0])):
        host = RETROFIT
    return import_module(host).attach(target, *what, **options)


def plain(model: Any) -> Any:
    """The module itself rather than the wrapper of torch.compile."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def _is_of_images(what: Any) -> bool:
    from vision_attn.kernels.patterns.base import Pattern
    from vision_attn.merging import TokenMerge

    return isinstance(what, Pattern | TokenMerge)
