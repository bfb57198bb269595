"""Tiny random models of the real denoiser classes, with inputs for one call. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import diffusers
import torch


@dataclasses.dataclass(frozen=True)
class Model:
    """How to build a class and call it. `inputs(batch)` gives the arguments; sample 0 is the same for every batch size.

    Args:
        grid: token grid of that call.
        window: a local window that fits it.
        text: text tokens in the attention sequence, negative when they come first.
        calls: attention calls that an attached forward of batch 1 intercepts.
        padded: the call can hide text tokens, by arguments that `inputs(batch, pad=True)` gives.
    """

    cls: str
    config: dict[str, Any]
    inputs: Callable[..., dict[str, Any]]
    grid: tuple[int, ...]
    window: tuple[int, ...]
    text: int
    calls: int
    padded: bool = False
    output: Callable[[Any], torch.Tensor] = lambda out: out.sample

    def build(self, **config: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.cls)(**{**self.config, **config}).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # zero-initialised gates and projections would hide the attention
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def noise(batch: int, *shape: int, seed: int = 0) -> torch.Tensor:
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(batch)]
    return torch.stack(rows)


def steps(batch: int) -> torch.Tensor:
    return torch.full((batch,), 500)


def visible(batch: int, tokens: int, pad: bool) -> torch.Tensor:
    """Text mask, 1 where a token is real: sample `i` hides its last `i + 2` tokens."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    for i in range(batch if pad else 0):
        mask[i, tokens - 2 - i :] = 0
    return mask


def _flux(batch: int, pad: bool = False) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    return {
        "hidden_states": noise(batch, 48, 16),
        "encoder_hidden_states": noise(batch, 6, 32, seed=1),
        "pooled_projections": noise(batch, 32, seed=2),
        "timestep": steps(batch) / 1000,
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
    }


def _sd3(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, 5, 32, seed=1),
        "pooled_projections": noise(batch, 64, seed=2),
        "timestep": steps(batch),
    }


def _pixart(batch: int, pad: bool = False) -> dict[str, Any]:
    conditions = {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, 5, 8, seed=1),
        "timestep": steps(batch),
        "added_cond_kwargs": conditions,
        "encoder_attention_mask": visible(batch, 5, pad),
    }


def _qwen(batch: int, pad: bool = False) -> dict[str, Any]:
    mask = {"encoder_hidden_states_mask": visible(batch, 7, True)} if pad else {}
    return {
        "hidden_states": noise(batch, 48, 16),
        "encoder_hidden_states": noise(batch, 7, 16, seed=1),
        "timestep": steps(batch) / 1000,
        "img_shapes": [[(1, 6, 8)]] * batch,
        **mask,
    }


def _wan(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 3, 8, 10),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "timestep": steps(batch),
    }


def _hunyuan(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 3, 8, 10),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "encoder_attention_mask": visible(batch, 6, pad),
        "pooled_projections": noise(batch, 8, seed=2),
        "timestep": steps(batch),
        "guidance": torch.full((batch,), 1000.0),
    }


def _cogvideox(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 3, 4, 8, 10),
        "encoder_hidden_states": noise(batch, 7, 8, seed=1),
        "timestep": steps(batch),
    }


def _ltx(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 60, 4),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "encoder_attention_mask": visible(batch, 5, pad),
        "timestep": steps(batch),
        "num_frames": 3,
        "height": 4,
        "width": 5,
    }


def _mochi(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 3, 8, 10),
        "encoder_hidden_states": noise(batch, 6, 16, seed=1),
        "encoder_attention_mask": visible(batch, 6, pad).bool(),
        "timestep": steps(batch),
    }


def _cosmos(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 3, 8, 10),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "timestep": steps(batch),
        "fps": 16,
        "padding_mask": torch.zeros(1, 1, 8, 10),
    }


def _unet(batch: int, pad: bool = False) -> dict[str, Any]:
    return {
        "sample": noise(batch, 4, 10, 14),
        "encoder_hidden_states": noise(batch, 5, 16, seed=1),
        "timestep": steps(batch),
        "added_cond_kwargs": {"text_embeds": noise(batch, 8, seed=2), "time_ids": torch.ones(batch, 6)},
    }


VIDEO_GRID, VIDEO_WINDOW = (3, 4, 5), (2, 3, 3)

MODELS = {
    model.cls: model
    for model in (
        Model(
            "FluxTransformer2DModel",
            dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
            _flux, (6, 8), (3, 5), text=-6, calls=2,
        ),
        Model(
            "SD3Transformer2DModel",
            dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                 num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
                 pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm"),
            _sd3, (6, 8), (3, 5), text=5, calls=3,
        ),
        Model(
            "PixArtTransformer2DModel",
            dict(sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=4,
                 num_attention_heads=2, cross_attention_dim=8, caption_channels=8, num_embeds_ada_norm=8,
                 norm_type="ada_norm_single", use_additional_conditions=False),
            _pixart, (6, 8), (3, 5), text=0, calls=2,
        ),
        Model(
            "QwenImageTransformer2DModel",
            dict(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                 num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4)),
            _qwen, (6, 8), (3, 5), text=-7, calls=2, padded=True,
        ),
        Model(
            "WanTransformer3DModel",
            dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                 text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2),
            _wan, VIDEO_GRID, VIDEO_WINDOW, text=0, calls=2,
        ),
        Model(
            "HunyuanVideoTransformer3DModel",
            dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
                 num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
                 pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
            _hunyuan, VIDEO_GRID, VIDEO_WINDOW, text=6, calls=2, padded=True,
        ),
        Model(
            "CogVideoXTransformer3DModel",
            dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
                 text_embed_dim=8, num_layers=2, sample_width=10, sample_height=8, sample_frames=9, patch_size=2,
                 temporal_compression_ratio=4, max_text_seq_length=7),
            _cogvideox, VIDEO_GRID, VIDEO_WINDOW, text=-7, calls=2,
        ),
        Model(
            "LTXVideoTransformer3DModel",
            dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
                 num_layers=2, caption_channels=16),
            _ltx, VIDEO_GRID, VIDEO_WINDOW, text=0, calls=2,
        ),
        Model(
            "MochiTransformer3DModel",
            dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
                 in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=6),
            _mochi, VIDEO_GRID, VIDEO_WINDOW, text=6, calls=2, padded=True,
        ),
        Model(
            "CosmosTransformer3DModel",
            dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
                 text_embed_dim=16, max_size=(4, 32, 32), rope_scale=(2.0, 1.0, 1.0), adaln_lora_dim=4,
                 extra_pos_embed_type="learnable"),
            _cosmos, VIDEO_GRID, VIDEO_WINDOW, text=0, calls=2,
        ),
        Model(
            "UNet2DConditionModel",
            dict(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1,
                 norm_num_groups=2, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(2, 4),
                 cross_attention_dim=16,
                 addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
                 use_linear_projection=True),
            _unet, (10, 14), (3, 5), text=0, calls=7,
        ),
    )
}  # fmt: skip


def sana() -> torch.nn.Module:
    return diffusers.SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8,
    )  # fmt: skip
