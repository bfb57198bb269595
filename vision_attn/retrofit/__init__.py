"""Patterns and token merging in the vision models of timm and open_clip, and out of them again."""

from vision_attn.retrofit.attachment import attach

__all__ = ["attach"]
