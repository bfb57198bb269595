"""Two image models small enough to be trained and distilled on a CPU: real diffusers classes, 48 x 48 pixels.

`python -m vision_attn.diffusion.distill teacher` trains them on still images of the shapes world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vision_attn.shapes.words import tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, FluxPipeline, StableDiffusionPipeline
    from transformers import CLIPTextModel

TEXT_DIM = 64
WORDS = 16  # tokens of a prompt
LATENTS = 8


def vae() -> AutoencoderTiny:
    """Four times smaller in each direction, eight channels: 48 x 48 pixels become 12 x 12 latents."""
    from diffusers import AutoencoderTiny

    channels, blocks = (16, 16, 16), (1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, num_encoder_blocks=blocks,
        num_decoder_blocks=blocks, latent_channels=LATENTS,
    )  # fmt: skip


def flux(seed: int = 0) -> FluxPipeline:
    """A `FluxPipeline` with random weights: two double and five single blocks, 6 x 6 tokens for an image.

    >>> pipe = flux()
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe("a red circle", height=48, width=48, num_inference_steps=1, max_sequence_length=16).images[0].size
    (48, 48)
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = _tokenizer()
    config = T5Config(
        vocab_size=len(words), d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENTS, num_layers=2, num_single_layers=5, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae().eval(),
        text_encoder=_clip(len(words)),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(config).eval(),
        tokenizer_2=_tokenizer(),
    )


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with random weights: a U-Net with self-attention over 12 x 12 and 6 x 6 tokens.

    >>> pipe = stable_diffusion()
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe("a red circle", height=48, width=48, num_inference_steps=1).images[0].size
    (48, 48)
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    words = _tokenizer()
    unet = UNet2DConditionModel(
        sample_size=12, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(2, 4), cross_attention_dim=TEXT_DIM, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        unet=unet.eval(), scheduler=scheduler, vae=vae().eval(), text_encoder=_clip(len(words)), tokenizer=words,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _tokenizer():
    words = tokenizer()
    words.model_max_length = WORDS
    return words


def _clip(vocabulary: int) -> CLIPTextModel:
    """A text encoder with random weights, never trained: it tells words apart, which is all that is needed."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=TEXT_DIM, intermediate_size=128, projection_dim=TEXT_DIM,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=WORDS, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()
