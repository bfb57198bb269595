"""The built-in video model: real diffusers and transformers classes, small enough for a CPU.

`pipeline()` builds it with random weights, `vision_attn.diffusion.train` trains it, and
`vision_attn.diffusion.loading.load()` opens the trained one that ships.
"""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from vision_attn.shapes.words import tokenizer

TEXT_DIM = 96
LATENTS = 16
# What `defaults.json` of the trained folder says; the pattern options suit 5 x 6 x 6 tokens.
DEFAULTS = {
    "height": 48,
    "width": 48,
    "frames": 17,
    "fps": 8,
    "steps": 20,
    "guidance": 3.0,
    "max_sequence_length": 16,
    "attention": {
        "radial": {"decay": 0.5, "block": 4, "thin": 8},
        "neighborhood": {"window": [3, 5, 5]},
        "sliding-tile": {"tile": [1, 2, 2], "window": [3, 3, 3]},
    },
}


def vae() -> AutoencoderKLWan:
    """8x in space (2x of it by unshuffling pixels), 4x in time: 17 x 48 x 48 pixels become 5 x 6 x 6 latents."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENTS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def denoiser() -> WanTransformer3DModel:
    """A Wan video transformer whose tokens are single latents: 5 x 6 x 6 = 180 tokens for a clip."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENTS,
        out_channels=LATENTS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def text_encoder() -> UMT5EncoderModel:
    """A one-layer T5 encoder, trained together with the denoiser."""
    config = UMT5Config(
        vocab_size=len(tokenizer()), d_model=TEXT_DIM, d_kv=32, d_ff=192, num_layers=1, num_heads=3, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def pipeline(seed: int = 0) -> WanPipeline:
    """A `WanPipeline` of these parts with random weights.

    Example:
        >>> from vision_attn.diffusion.tiny import pipeline
        >>> pipe = pipeline()
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe("a red circle", height=48, width=48, num_frames=5, num_inference_steps=1).frames.shape
        (1, 5, 48, 48, 3)
    """
    torch.manual_seed(seed)
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae().eval(),
        transformer=denoiser().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
