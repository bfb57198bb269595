"""Protect a picture from being edited: a small change that makes a VAE's latents of it useless."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


def protect_image(
    vae: Any,
    image: Any,
    *,
    eps: float = 16 / 255,
    step: float = 2 / 255,
    iterations: int = 40,
    variance: float | None = 1e-8,
    away: bool = False,
    progress: bool = False,
) -> Any:
    """Change a picture a little so that editing it with a latent diffusion model goes wrong.

    The purpose: somebody who publishes a picture makes it a worse starting point for image-to-image editing by others.
    Projected gradient steps pull what the VAE's encoder says about the picture towards N(0, variance), "posterior
    collapse"; the denoiser and the prompt need not be known. Nothing else is promised. It works against models
    with this VAE, and others only so far as theirs is alike; scaling, JPEG, blur or noise undo part of it; whoever
    wants to remove it on purpose can; and up to `eps` the change can be seen, most in even areas.

    Args:
        vae: a VAE of diffusers whose encoder gives mean and variance (AutoencoderKL and its video kin), or a pipeline
            that has one. Its weights are not changed.
        image: `[batch, 3, height, width]` or `[3, height, width]` in 0..1, a PIL image, or a uint8 array `[height,
            width, 3]`; sides that the VAE can encode. What comes back is of the same kind; gray or transparent PIL
            images come back as RGB.
        eps: largest change of a pixel, above 0, at most 1.
        step: change per iteration, above 0.
        iterations: at least 1.
        variance: of the target, above 0; None takes what the encoder says of the clean picture.
        away: push the latents away from N(0, 1) instead, "diffusion collapse"; `variance` then has to stay as it is.
        progress: show a bar.

    Raises:
        TypeError, ValueError: an argument of another form or out of range; a VAE without mean and variance.

    >>> from vision_attn.diffusion.loading import load
    >>> picture = torch.rand(3, 48, 48)
    >>> protected = protect_image(load().pipe, picture, iterations=2)
    >>> protected.shape, bool((protected - picture).abs().max() <= 16 / 255 + 1e-6)
    (torch.Size([3, 48, 48]), True)

    Paper: A Gray-box Attack against Latent Diffusion Model-based Image Editing by Posterior Collapse.
    """
    for name, value, most in (("eps", eps, 1.0), ("step", step, 1.0), ("variance", variance, math.inf)):
        if name == "variance" and value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= most:
            raise ValueError(f"{name} must be a number above 0{'' if most > 1 else ' and at most 1'}; got {value!r}")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be an int of at least 1; got {iterations!r}")
    if away and variance != 1e-8:
        raise ValueError(f"away pushes from N(0, 1), so variance does not apply; got variance={variance!r}")
    vae = getattr(vae, "vae", vae)
    if not isinstance(vae, torch.nn.Module) or not hasattr(vae, "encode"):
        raise TypeError(f"vae must be a VAE of diffusers, or a pipeline with one; got {type(vae).__name__}")
    clean = _pixels(image)
    if not isinstance(image, torch.Tensor) and eps < 1 / 255:
        raise ValueError(f"eps={eps!r} is less than one level of 8-bit pictures, 1/255; give a tensor or a larger eps")
    _check_size(vae, clean)
    own = clean.to(device=next(vae.encoder.parameters()).device, dtype=torch.float32)
    trained = [p for p in vae.parameters() if p.requires_grad]
    vae.requires_grad_(False)
    try:
        changed = _attack(vae, own, eps, step, iterations, variance, away, progress)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return _like(image, clean, (changed - own).to(clean), eps)


def collapse_score(mean: torch.Tensor, logvar: torch.Tensor, variance: float | torch.Tensor) -> torch.Tensor:
    """Minus the divergence of N(mean, exp(logvar)) from N(0, variance), up to a constant; 1 number, summed.

    >>> float(collapse_score(torch.zeros(1), torch.zeros(1), 1.0))
    0.0
    """
    return 0.5 * (1 + logvar - (mean.square() + logvar.exp()) / variance).sum()


def _attack(
    vae: Any,
    clean: torch.Tensor,
    eps: float,
    step: float,
    iterations: int,
    variance: float | None,
    away: bool,
    progress: bool,
) -> torch.Tensor:
    target: Any = 1.0 if away else variance
    if target is None:
        with torch.no_grad():
            target = posterior(vae, clean)[1].exp()
    changed = clean.clone()
    for _ in tqdm(range(iterations), desc="protect", disable=not progress):
        with torch.enable_grad():
            changed.requires_grad_(True)
            score = collapse_score(*posterior(vae, changed), target)
            (gradient,) = torch.autograd.grad(-score if away else score, changed)
        if not gradient.isfinite().all():
            raise ValueError(f"{type(vae).__name__} overflows in this dtype; load it in float32")
        with torch.no_grad():
            changed = changed + step * gradient.sign()
            changed = torch.minimum(torch.maximum(changed, clean - eps), clean + eps).clamp(0, 1)
    return changed.detach()


def posterior(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance that a VAE's encoder gives pictures `[batch, 3, height, width]` in 0..1.

    Raises:
        ValueError: an autoencoder without them.
    """
    pixels = (2 * pixels - 1).to(next(vae.encoder.parameters()).dtype)
    if _video(vae):
        pixels = pixels[:, :, None]
    latents = getattr(vae.encode(pixels), "latent_dist", None)
    if not hasattr(latents, "mean") or not hasattr(latents, "logvar"):
        raise ValueError(f"{type(vae).__name__} gives no mean and variance, so there is no posterior to collapse")
    return latents.mean.float(), latents.logvar.float()


def _video(vae: Any) -> bool:
    return any(parameter.ndim == 5 for parameter in vae.encoder.parameters())


def _check_size(vae: Any, pixels: torch.Tensor) -> None:
    factor = getattr(vae, "spatial_compression_ratio", None) or 2 ** (
        len(getattr(vae.config, "block_out_channels", (0,))) - 1
    )
    height, width = pixels.shape[-2:]
    if height % factor or width % factor or not height * width:
        raise ValueError(
            f"a picture of {height} x {width} pixels; {type(vae).__name__} needs multiples of {factor}; crop or resize "
            f"it first, for example to {max(1, height // factor) * factor} x {max(1, width // factor) * factor}"
        )


def _pixels(image: Any) -> torch.Tensor:
    """`[batch, 3, height, width]` in 0..1."""
    if isinstance(image, torch.Tensor):
        pixels = image.detach()
        if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or not pixels.is_floating_point():
            raise ValueError(
                "a tensor must be [batch, 3, height, width] or [3, height, width] of floats in 0..1; got "
                f"{list(pixels.shape)} of {str(pixels.dtype).removeprefix('torch.')}"
            )
        if pixels.numel() and not (0 <= float(pixels.min()) and float(pixels.max()) <= 1):
            raise ValueError(f"pixels must be in 0..1; got {float(pixels.min()):.3g} to {float(pixels.max()):.3g}")
        return pixels if pixels.ndim == 4 else pixels[None]
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a tensor, a PIL image or a uint8 array; got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an array must be uint8 [height, width, 3]; got {image.dtype} {list(image.shape)}")
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def _like(image: Any, clean: torch.Tensor, change: torch.Tensor, eps: float) -> Any:
    """The changed picture in the form of the original; whole numbers stay within eps too."""
    if isinstance(image, torch.Tensor):
        pixels = (clean + change).clamp(0, 1)
        return pixels if image.ndim == 4 else pixels[0]
    most = math.floor(255 * eps + 1e-6)
    levels = (255 * change).round().clamp(-most, most) + (255 * clean).round()
    array = levels[0].permute(1, 2, 0).clamp(0, 255).cpu().numpy().astype(np.uint8)
    if isinstance(image, np.ndarray):
        return array
    from PIL import Image

    return Image.fromarray(array)
