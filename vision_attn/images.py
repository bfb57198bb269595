"""Images from users: whatever the file holds, eight-bit RGB as it should be looked at, or one clear error."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

# First bytes of what is often handed over for a picture and is none, or none that Pillow reads.
_OTHERS = {
    b"": "it is empty",
    b"version https://git-lfs": "it is a Git LFS pointer, fetch the real file",
    b"<svg": "it is an SVG drawing, save it as PNG",
    b"<?xml": "it is XML (an SVG drawing perhaps, save it as PNG)",
    b"<!doctype html": "it is a web page",
    b"<html": "it is a web page",
    b"%pdf": "it is a PDF, save the page as PNG",
    b"pk\x03\x04": "it is a zip archive or an office document",
}


def read_image(path: str | Path, largest: int | None = None) -> np.ndarray:
    """The picture in a file, uint8 `[height, width, 3]`, RGB, turned upright.

    Grey and palette images become RGB, transparent parts white, 16-bit values are scaled to 8 bits, 32-bit values are
    stretched from the least to the greatest. Of an animation or a file of several pages the first is taken.

    Args:
        path: a file in any format that Pillow reads, up to 178 megapixels.
        largest: shrink so that no side is longer, in pixels; a large JPEG is then decoded small, which saves time.

    Raises:
        ValueError: the file is no picture, is broken or cut off, or is too large; the message says which.
        OSError: the file is not there or cannot be read.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("LA", (6, 4), (9, 255)).save(f"{folder}/grey.png")
    ...     read_image(f"{folder}/grey.png").shape
    (4, 6, 3)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if largest is not None and (type(largest) is not int or largest < 1):
        raise ValueError(f"largest: got {largest!r}; allowed: a number of pixels, at least 1, or None")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name one picture in it")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; it raises for worse
            image = Image.open(file)
            sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
            if largest is not None:
                image.draft(None, (largest, largest))
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:  # metadata that cannot be read says nothing about which side is up
                pass
            image = _rgb(image, (0, 65535) if sixteen else None)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture: {_what(path)}; allowed: PNG, JPEG, WebP, TIFF, ...") from error
    except Image.DecompressionBombError as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise ValueError(f"{path} has more than {limit}; make it smaller first") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on bytes they do not expect
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the picture
            raise
        raise ValueError(f"{path} is broken or cut off ({error}); save or download it again") from error
    if largest is not None:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return np.array(image)


def _rgb(image: Image.Image, levels: tuple[int, int] | None) -> Image.Image:
    """Eight-bit RGB; `levels` are black and white of an image with more than 8 bits, None for its own extremes."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # convert() would cut everything above 255 off
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        low, high = levels or (values.min(), values.max())
        image = Image.fromarray(np.rint((values - low) / max(high - low, 1e-30) * 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _what(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(64).lstrip().lower()
    found = [text for start, text in _OTHERS.items() if start and first.startswith(start)]
    if found or not first:
        return found[0] if found else _OTHERS[b""]
    if first[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheif"):
        return "it is HEIC, which phones write; save it as JPEG"
    if first[4:8] == b"ftyp":
        return "it is a video or a format that this Pillow does not read"
    return "its first bytes are of no known format"


def model_input(image: np.ndarray, model: Any) -> tuple[torch.Tensor, np.ndarray]:
    """What a timm model sees of a picture: normalised `[1, 3, height, width]`, and the same as uint8 RGB to draw on.

    Resized, cropped in the middle and normalised as the model's pretrained configuration says.

    Args:
        image: uint8 `[height, width, 3]`, from `read_image`.
        model: a timm model; its device and dtype are taken.

    Raises:
        ValueError: the picture is of another shape or dtype, or the model does not take three channels.

    >>> import timm
    >>> x, seen = model_input(np.zeros((40, 60, 3), np.uint8), timm.create_model("vit_tiny_patch16_224"))
    >>> x.shape, seen.shape
    (torch.Size([1, 3, 224, 224]), (224, 224, 3))
    """
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: got {image.dtype} {list(image.shape)}; allowed: uint8 [height, width, 3]")
    config = resolve_data_config({}, model=model)
    first = getattr(model, "pretrained_cfg", {}).get("first_conv")
    channels = getattr(model.get_submodule(first), "in_channels", 3) if isinstance(first, str) else 3
    if channels != 3:
        raise ValueError(f"{type(model).__name__} takes {channels} channels; a picture has 3")
    x = create_transform(**config)(Image.fromarray(image))
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = (x * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    weight = next(model.parameters())
    return x[None].to(weight.device, weight.dtype), seen.permute(1, 2, 0).contiguous().numpy()
