"""Small image towers with random weights, one row per kind of attention layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models import vision_transformer as vit

from vision_attn import Neighborhood

TINY = dict(embed_dim=24, depth=2, num_heads=2, num_classes=5)


@dataclasses.dataclass
class Model:
    """A tower, the grid of its test image, and the tokens before it."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    grid: tuple[int, int] = (5, 5)
    prefix: int = 1
    patch: int = 16
    biased: bool = False  # adds a position bias to the scores, which attention gets as a mask
    calls: int = 2
    make: Callable[[], torch.nn.Module] | None = None
    pattern: Any = Neighborhood(window=3)

    def __repr__(self) -> str:
        return self.name

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        size = tuple(n * self.patch for n in self.grid)
        model = self.make() if self.make else timm.create_model(self.name, img_size=size, **self.options)
        for name, p in model.named_parameters():  # weights that start near zero would hide what attention does
            if name.endswith("weight") and p.ndim > 1:
                torch.nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
            else:
                p.data += 0.3 * torch.randn_like(p)
        return model.eval()

    def images(self, batch: int = 2) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randn(batch, 3, *(n * self.patch for n in self.grid))

    def run(self, net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        out = net.encode_image(images) if hasattr(net, "encode_image") else net(images)
        return getattr(out, "last_hidden_state", out)


def blocks_of(cls: type) -> Callable[[], torch.nn.Module]:
    return partial(vit.VisionTransformer, img_size=80, block_fn=cls, **TINY)


def clip(**vision: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import open_clip

        text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=24, heads=2, layers=2)
        return open_clip.CLIP(16, vision, text)

    return make


def hugging(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import transformers

        small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        config = getattr(transformers, f"{name}Config")(**small, image_size=80, patch_size=16, **options)
        return getattr(transformers, f"{name}Model")(config)

    return make


_TOWER = dict(layers=2, width=24, head_width=12, patch_size=16, image_size=80)
ROPE = {**TINY, "embed_dim": 32}

SEQUENCES = [
    Model("vit_tiny_patch16_224", TINY),
    Model("vit_small_patch16_18x2_224", TINY, calls=4),
    Model("vit_base_patch16_siglip_gap_224", TINY, prefix=0),
    Model("vit_base_patch16_siglip_224", TINY, prefix=0),
    Model(
        "vit_tiny_patch16_224 4x7",
        {},
        grid=(4, 7),
        make=lambda: timm.create_model("vit_tiny_patch16_224", img_size=(64, 112), **TINY),
    ),
    Model("deit_tiny_distilled_patch16_224", TINY, prefix=2),
    Model("deit3_small_patch16_224", TINY),
    Model("vit_small_patch14_dinov2", TINY, patch=14),
    Model("vit_small_patch14_reg4_dinov2", TINY, prefix=5, patch=14),
    Model("vit_tiny_r_s16_p8_224", TINY, patch=32, grid=(3, 4)),
    Model("vit_relpos_small_patch16_224", TINY, prefix=0, biased=True),
    Model("beit_base_patch16_224", TINY, biased=True),
    Model("eva02_tiny_patch14_224", ROPE, patch=14),
    Model("vit_small_patch16_dinov3", ROPE, prefix=5),
    Model("vit_pe_core_tiny_patch16_384", ROPE),
    Model("parallel scaling block", make=blocks_of(vit.ParallelScalingBlock)),
    Model("parallel things block", make=blocks_of(vit.ParallelThingsBlock), calls=4),
    Model("differential block", make=blocks_of(vit.DiffParallelScalingBlock), calls=4),
    Model("residual post norm", make=blocks_of(vit.ResPostBlock)),
    Model("open_clip ViT", make=clip(**_TOWER)),
    Model("open_clip ViT qk norm", make=clip(**_TOWER, qk_norm=True)),
    Model(
        "open_clip timm tower",
        grid=(10, 10),
        calls=6,
        make=clip(timm_model_name="test_vit", timm_pool="", timm_proj="linear", image_size=160),
    ),
    Model("transformers ViT", make=hugging("ViT")),
    Model("transformers DeiT", make=hugging("DeiT"), prefix=2),
    Model("transformers DINOv2", make=hugging("Dinov2"), grid=(4, 7)),
    Model("transformers DINOv2 with registers", make=hugging("Dinov2WithRegisters", num_register_tokens=3), prefix=4),
    Model("transformers DINOv3", make=hugging("DINOv3ViT", num_register_tokens=4), grid=(4, 7), prefix=5),
    Model("transformers CLIP", make=hugging("CLIPVision")),
    Model("transformers SigLIP", make=hugging("SiglipVision"), prefix=0),
]
_SWIN = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5)
SWINS = [
    Model("swin_tiny_patch4_window7_224", {**_SWIN, "window_size": 4}, grid=(16, 16), patch=4, prefix=0),
    Model("swinv2_tiny_window8_256", {**_SWIN, "window_size": 4}, grid=(16, 16), patch=4, prefix=0),
]
TOWERS = SEQUENCES + SWINS
