"""The shapes world: small procedural images and videos whose truth is known exactly."""

from vision_attn.shapes.captions import WORDS, caption, parse
from vision_attn.shapes.judge import Track, Verdict, judge, score
from vision_attn.shapes.render import render
from vision_attn.shapes.scene import COLORS, DIRECTIONS, SHAPES, SIZES, Scene, Thing, sample_scene

__all__ = [
    "COLORS",
    "DIRECTIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "Track",
    "Verdict",
    "WORDS",
    "caption",
    "judge",
    "parse",
    "render",
    "sample_scene",
    "score",
]
