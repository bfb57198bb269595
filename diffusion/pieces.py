"""Long and large videos in bounded memory: the VAE works tile by tile, feed-forward layers on some tokens at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

TOKENS = 4096  # enough for a matrix product to be as fast as with more


def decode(pipe: Any, latents: torch.Tensor, tiling: bool = True) -> np.ndarray:
    """The video of what a Wan pipeline returns with `output_type="latent"`: `[batch, frames, height, width, 3]`, from 0
    to 1. It is put together on the CPU, so the device holds one tile of it.

    Args:
        latents: `[batch, channels, frames, height, width]`, as the denoiser knows them.
        tiling: in tiles as large and as far apart as the VAE's `tile_sample_*` say, blended where they overlap; False:
            each video in one piece.
    """
    vae, ratio = pipe.vae, pipe.vae.spatial_compression_ratio
    mean, std = _statistics(vae, latents.device)
    latents = latents.to(vae.dtype) / (1 / std).to(vae.dtype) + mean.to(vae.dtype)
    videos = []
    for clip in latents.split(1):
        rows, columns = _tiles(vae, clip.shape[-2:], tiling)
        frames = (clip.shape[2] - 1) * pipe.vae_scale_factor_temporal + 1
        video = torch.zeros(frames, clip.shape[-2] * ratio, clip.shape[-1] * ratio, 3)
        for y in rows:
            for x in columns:
                tile = vae.decode(clip[..., slice(*y), slice(*x)], return_dict=False)[0][0].permute(1, 2, 3, 0)
                (top, down), (left, right) = ([n * ratio for n in place] for place in (y, x))
                shares = _shares(rows, y, ratio)[:, None, None] * _shares(columns, x, ratio)[:, None]
                video[:, top:down, left:right].addcmul_(tile.float().cpu(), shares)
        videos.append(video.mul_(0.5).add_(0.5).clamp_(0, 1).numpy())
    pipe.maybe_free_model_hooks()  # the pipeline did so before, and an offloaded VAE is back on the device since
    return np.stack(videos) if len(videos) > 1 else videos[0][None]


def encode(pipe: Any, video: np.ndarray, height: int, width: int, tiling: bool = True) -> torch.Tensor:
    """Latents of a video enlarged to `height` x `width`, normalised as the denoiser knows them; the VAE's most likely
    ones. A tile of the large video exists at a time.

    Args:
        video: `[batch, frames, h, w, 3]`, from 0 to 1.
        tiling: as in `decode`.
    """
    vae, device, ratio = pipe.vae, pipe._execution_device, pipe.vae.spatial_compression_ratio
    rows, columns = _tiles(vae, (height // ratio, width // ratio), tiling)
    latents = []
    for clip in video:
        small, found = torch.from_numpy(clip).permute(3, 0, 1, 2), None
        for y in rows:
            for x in columns:
                large = _enlarged(_enlarged(small, 2, height, [n * ratio for n in y]), 3, width, [n * ratio for n in x])
                large = large.mul_(2).sub_(1)[None].to(device, vae.dtype)
                tile = vae.encode(large).latent_dist.mode().float()
                if found is None:
                    found = tile.new_zeros(*tile.shape[:3], height // ratio, width // ratio)
                shares = _shares(rows, y)[:, None] * _shares(columns, x)
                found[..., slice(*y), slice(*x)].addcmul_(tile, shares.to(device))
        latents.append(found)
    mean, std = _statistics(vae, device)
    return (torch.cat(latents) - mean) / std


@contextlib.contextmanager
def feed_forward_in_pieces(denoiser: torch.nn.Module, tokens: int = TOKENS) -> Iterator[None]:
    """Meanwhile the feed-forward layers of a denoiser, several times as wide as its tokens, take some tokens at a time.

    Without gradients only; their results are the same to rounding.
    """
    from diffusers.models.attention import FeedForward

    layers = [layer for layer in denoiser.modules() if isinstance(layer, FeedForward)]
    before = [vars(layer).get("forward") for layer in layers]  # a hook's, where there is one
    for layer in layers:
        layer.forward = _in_pieces(layer.forward, tokens)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _in_pieces(forward: Callable, tokens: int) -> Callable:
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.ndim != 3 or x.shape[1] <= tokens or torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        out = None
        for start in range(0, x.shape[1], tokens):
            part = forward(x[:, start : start + tokens], *args, **kwargs)
            if out is None:
                out = part.new_empty(len(part), x.shape[1], part.shape[2])
            out[:, start : start + tokens] = part
        return out

    return run


def _statistics(vae: Any, device: torch.device) -> list[torch.Tensor]:
    values = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(each, device=device).view(1, -1, 1, 1, 1).float() for each in values]


def _tiles(vae: Any, size: tuple[int, int], tiling: bool) -> list[list[tuple[int, int]]]:
    """First latent and one past the last of every tile, along rows and along columns."""
    found = []
    for side, name in zip(size, ("height", "width"), strict=True):
        pixels = (getattr(vae, f"tile_sample_{what}_{name}") for what in ("min", "stride"))
        tile, stride = (max(n // vae.spatial_compression_ratio, 1) for n in pixels)
        if not tiling or tile >= side:
            tile = stride = side
        starts = range(0, max(side - tile + stride, 1), stride)
        found.append([(start, min(start + tile, side)) for start in starts])
    return found


def _shares(tiles: list[tuple[int, int]], tile: tuple[int, int], ratio: int = 1) -> torch.Tensor:
    """How much of each place along an axis is this tile's: all of it, or a ramp where it overlaps others."""
    overlap = max((a[1] - b[0] for a, b in zip(tiles, tiles[1:], strict=False)), default=0) * ratio
    place = torch.arange(tile[0] * ratio, tile[1] * ratio) + 0.5
    ramps = [
        torch.minimum(place - first * ratio, last * ratio - place).clamp(0, max(overlap, 1)) for first, last in tiles
    ]
    return ramps[tiles.index(tile)] / torch.stack(ramps).sum(0)


def _enlarged(video: torch.Tensor, dim: int, size: int, wanted: tuple[int, int] | list[int]) -> torch.Tensor:
    """Rows `wanted` along a dimension of a video that is enlarged there, linearly, to `size`."""
    weights = F.interpolate(torch.eye(video.shape[dim])[None], size, mode="linear", align_corners=False)[0]
    weights = weights[:, slice(*wanted)]
    used = weights.any(1).nonzero()
    first, count = int(used[0]), int(used[-1] - used[0]) + 1
    weights = weights[first : first + count]
    return (video.narrow(dim, first, count).transpose(dim, -1) @ weights).transpose(dim, -1)
