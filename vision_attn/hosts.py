"""The one verb for every host: look up who serves a model, and let them attach."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Top-level package of the model's class -> the module whose attach() serves it; a name, so that nothing is imported
# early.
HOSTS = {
    "diffusers": "vision_attn.diffusion.attachment",
    "timm": "vision_attn.retrofit",
    "open_clip": "vision_attn.retrofit",
    "transformers": "vision_attn.mllm.attachment",
    "vggt": "vision_attn.retrofit",
}


class AttachError(ValueError):
    """An attached model was called in a way that the attachment cannot serve; the message says what to do."""


def attach(target: Any, *what: Any, **options: Any) -> Any:
    """Put a pattern or a method into a model, until detached.

    Args:
        target: a diffusers pipeline, or a denoiser such as `pipe.transformer`; a timm model, or an open_clip model; a
            vision-language model of transformers; VGGT.
        what: who sees whom on the token grid, for example `Radial(decay=0.2)`, or a method of `vision_attn.diffusion`;
            for timm and open_clip a pattern or `TokenMerge()`, for VGGT `TokenMerge("vggt")`; for vision-language
            models one or more methods of `vision_attn.mllm`.
        **options: of the host, such as `dense_layers`; see `vision_attn.diffusion.attach` for diffusers,
            `vision_attn.retrofit.attach` for timm and open_clip, `vision_attn.mllm.attach` for transformers.

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
    plain = target
    while hasattr(plain, "_orig_mod"):  # torch.compile
        plain = plain._orig_mod
    for cls in type(plain).__mro__:
        host = HOSTS.get(cls.__module__.partition(".")[0])
        if host is not None:
            return import_module(host).attach(target, *what, **options)
    raise TypeError(f"cannot attach to {type(plain).__name__}; allowed: models and pipelines of {', '.join(HOSTS)}")
