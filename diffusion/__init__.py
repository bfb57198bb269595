"""Sparse attention in diffusers pipelines. Importing this needs torch only; each name loads on first use."""

from vision_attn._lazy import lazily

# Public name -> the module of this folder that defines it.
_PUBLIC = {
    "attach": "attachment",
    "Method": "method",
    "Preset": "method",
    "FAMILIES": "families",
    "calibrate": "calibration",
    "Calibration": "calibration",
    "preset": "published",
    "presets": "published",
    "fit_preset": "published",
    "add_lora": "lora",
    "save_lora": "lora",
    "load_lora": "lora",
    "FreeSwim": "methods.freeswim",
    "upscale_video": "upscale",
    "CLEAR": "methods.clear",
    "IRDiffusion": "methods.isolation",
    "consistent_images": "consistent",
    "protect_image": "protect",
    "AdaptiveBlock": "modules",
    "LaMambaBlock": "modules",
    "MoHDiTBlock": "modules",
    "extend_video": "extend",
    "no_repeat": "repeats",
    "UltraViCo": "methods.ultravico",
    "RIFLEx": "methods.rope",
    "PI": "methods.rope",
    "NTK": "methods.rope",
    "YaRN": "methods.rope",
    "TASR": "methods.rope",
    "LinFusion": "methods.linfusion",
    "upscale_image": "image_stages",
}

__all__ = list(_PUBLIC)


__getattr__ = lazily(__name__, _PUBLIC)
