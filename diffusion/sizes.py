"""How the sizes of a picture in pixels become its grid of tokens, per family of denoisers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What the pipelines around one denoiser class have in common.

    Args:
        name: the family in words.
        token: `(vae config, denoiser config) -> (frames per latent frame, latent frames per token, height, width)`,
            the last two in pixels per token.
        multiple: what the pipeline itself asks height and width to be a multiple of, besides whole tokens.
        fps: frames per second the model was trained for; 0 for image models.
        attention: pattern name -> options published for this family, used where nothing else is asked for.
    """

    name: str
    token: Callable[[dict, dict], tuple[int, int, int, int]]
    multiple: int
    fps: int = 0
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)


def _levels(vae: dict) -> int:
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _wan(vae: dict, net: dict) -> tuple[int, int, int, int]:
    t, h, w = net.get("patch_size", (1, 2, 2))
    scale = vae.get("scale_factor_spatial", 8)
    return vae.get("scale_factor_temporal", 4), t, h * scale, w * scale


def _cosmos(vae: dict, net: dict) -> tuple[int, int, int, int]:
    t, h, w = net.get("patch_size", (1, 2, 2))
    scale = vae.get("spatial_compression_ratio", 8)
    return vae.get("temporal_compression_ratio", 8), t, h * scale, w * scale


def _hunyuan(vae: dict, net: dict) -> tuple[int, int, int, int]:
    side = vae.get("spatial_compression_ratio", 8) * net.get("patch_size", 2)
    return vae.get("temporal_compression_ratio", 4), net.get("patch_size_t", 1), side, side


def _cogvideox(vae: dict, net: dict) -> tuple[int, int, int, int]:
    side = _levels(vae) * net.get("patch_size", 2)
    return int(vae.get("temporal_compression_ratio", 4)), net.get("patch_size_t") or 1, side, side


def _ltx(vae: dict, net: dict) -> tuple[int, int, int, int]:
    doubled = 2 ** sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    side = (vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * doubled) * net.get("patch_size", 1)
    frames = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * doubled
    return frames, net.get("patch_size_t", 1), side, side


def _mochi(vae: dict, net: dict) -> tuple[int, int, int, int]:
    return 6, 1, 16, 16  # fixed numbers in the pipeline


def _square(pixels: Callable[[dict, dict], int]) -> Callable[[dict, dict], tuple[int, int, int, int]]:
    return lambda vae, net: (1, 1, pixels(vae, net), pixels(vae, net))


# Denoiser class in model_index.json -> its family. Radial options: those of the paper's scripts.
FAMILIES = {
    "WanTransformer3DModel": Family("Wan", _wan, 16, 16, {"radial": {"decay": 0.2}}),
    "HunyuanVideoTransformer3DModel": Family(
        "HunyuanVideo", _hunyuan, 16, 24, {"radial": {"decay": 0.95, "sink": False}}
    ),
    "CogVideoXTransformer3DModel": Family("CogVideoX", _cogvideox, 8, 8),
    "LTXVideoTransformer3DModel": Family("LTX-Video", _ltx, 32, 25),
    "MochiTransformer3DModel": Family("Mochi", _mochi, 8, 30),
    "CosmosTransformer3DModel": Family("Cosmos", _cosmos, 16, 30),
    "FluxTransformer2DModel": Family("Flux", _square(lambda vae, net: _levels(vae) * 2), 1),
    "SD3Transformer2DModel": Family(
        "Stable Diffusion 3", _square(lambda vae, net: _levels(vae) * net["patch_size"]), 1
    ),
    "PixArtTransformer2DModel": Family("PixArt", _square(lambda vae, net: _levels(vae) * net["patch_size"]), 8),
    "QwenImageTransformer2DModel": Family(
        "Qwen-Image", _square(lambda vae, net: 2 ** (len(vae.get("temperal_downsample", (0, 1, 1))) + 1)), 1
    ),
    # Sizes in tokens of the first of several levels.
    "UNet2DConditionModel": Family("Stable Diffusion UNet", _square(lambda vae, net: _levels(vae)), 8),
}
