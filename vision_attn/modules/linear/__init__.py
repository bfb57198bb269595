"""Linear attention: twelve kinds behind one layer and one function."""

from vision_attn.modules.linear.formulas import linear_attention
from vision_attn.modules.linear.layer import KINDS, LinearAttention2d

__all__ = ["KINDS", "LinearAttention2d", "linear_attention"]
