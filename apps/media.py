"""Frames to files: video, picture, contact sheet. Frames are uint8 `[frames, height, width, 3]`."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.apps.files import atomic

SMALL = (
    128  # pixels; clips below this are enlarged, because players show a stamp and yuv420p halves the colour resolution
)
LARGE = 192
PER_ROW = 9  # frames of a contact sheet


def enlargement(height: int, width: int) -> int:
    """Whole factor by which a small video is enlarged in its file; 1 for videos of ordinary size."""
    short = min(height, width)
    return -(-LARGE // short) if short < SMALL else 1


def write_video(path: Path, frames: np.ndarray, fps: float, settings: dict[str, Any]) -> None:
    """H.264 in mp4, the settings as JSON in the container's comment; small clips are enlarged pixel by pixel."""
    import av

    factor = enlargement(*frames.shape[1:3])
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = frames.shape[1:3]
    with atomic(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(settings, ensure_ascii=False)
        container.metadata["title"] = settings["prompt"]
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.width, stream.height = width, height
        stream.codec_context.thread_count = 4  # the bytes depend on it; otherwise they would on the number of cores
        stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"  # the first needs even sizes
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, image: np.ndarray, settings: dict[str, Any]) -> None:
    """PNG with two text chunks: `vision-attn`, the settings as JSON, and `parameters`, which image tools read."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("vision-attn", json.dumps(settings, ensure_ascii=False))
    text.add_itxt("parameters", _parameters(settings))
    with atomic(path) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=text)


def write_sheet(path: Path, rows: dict[str, np.ndarray], title: str) -> None:
    """Evenly spaced frames side by side, one labelled row per clip, under a title."""
    from PIL import Image, ImageDraw, ImageFont

    count, height, width = next(iter(rows.values())).shape[:3]
    shown = sorted({round(i * (count - 1) / max(1, min(count, PER_ROW) - 1)) for i in range(min(count, PER_ROW))})
    longest = max(height, width)
    side, limit = (LARGE, 480) if count == 1 else (LARGE // 2, 240)
    scale = min(-(-side // min(height, width)), 8) if longest < limit else limit / longest
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap = 8
    sheet_width = max(gap + len(shown) * (size[0] + gap), 420)
    zoom = min(max(1.0, sheet_width / 1200), 2.0)  # a wide sheet is looked at from further away
    font, small, line = ImageFont.load_default(15 * zoom), ImageFont.load_default(12 * zoom), round(22 * zoom)
    wrapped = _wrap(title, font, sheet_width - 2 * gap)
    top = gap + line * len(wrapped)
    row_height = line + size[1] + line
    sheet = Image.new("RGB", (sheet_width, top + len(rows) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(wrapped):
        draw.text((gap, gap + number * line), text, fill="black", font=font)
    for number, (label, frames) in enumerate(rows.items()):
        y = top + number * row_height
        draw.text((gap, y + 4), label, fill="#404040", font=small)
        for column, index in enumerate(shown):
            x = gap + column * (size[0] + gap)
            picture = Image.fromarray(frames[index])
            sampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(size, sampling), (x, y + line))
            if count > 1:
                draw.text(
                    (x + size[0] / 2, y + line + size[1] + 3), str(index), fill="#808080", font=small, anchor="ma"
                )
    with atomic(path) as partial:
        sheet.save(partial, format="PNG")


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in at most three lines that fit `width` pixels."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == 3:
            return [*lines[:2], lines[2] + " ..."]
        else:
            lines.append(word)
    return lines


def _parameters(settings: dict[str, Any]) -> str:
    fields = {
        "Steps": settings["steps"],
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "Attention": settings["attention"]["pattern"],
    }
    negative = f"\nNegative prompt: {settings['negative']}" if settings["negative"] else ""
    return f"{settings['prompt']}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in fields.items())
