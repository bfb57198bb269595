"""Any file a user may hand over: the right pixels, or one clear error."""

import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.images import model_input, read_image

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)  # 4 high, 6 wide
COLOUR = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 40)], -1)


def png(array: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG, written by hand: Pillow cannot write colour of 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_ordinary_and_grey_and_palette(tmp_path):
    grey = np.repeat(RAMP[..., None], 3, -1)
    for mode, wanted in (("RGB", COLOUR), ("L", grey), ("P", grey), ("LA", grey), ("RGBA", COLOUR)):
        source = COLOUR if mode.startswith("RGB") else RAMP
        Image.fromarray(source).convert(mode).save(tmp_path / f"{mode}.png")
        read = read_image(tmp_path / f"{mode}.png")
        assert read.dtype == np.uint8 and read.flags.writeable
        np.testing.assert_array_equal(read, wanted)
    Image.fromarray(RAMP > 100).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png")[..., 0], (RAMP > 100) * 255)
    Image.fromarray(COLOUR.repeat(8, 0).repeat(8, 1)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[4::8, 4::8].astype(int) - COLOUR).max() < 25


def test_transparency_shows_white(tmp_path):
    alpha = np.where(RAMP > 100, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "a.png")
    wanted = np.where(alpha[..., None] > 0, COLOUR, 255)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), wanted)
    half = np.dstack([COLOUR, np.full_like(RAMP, 128)])
    Image.fromarray(half).save(tmp_path / "half.png")
    blended = COLOUR * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read_image(tmp_path / "half.png") - blended).max() <= 1
    Image.fromarray(RAMP).save(tmp_path / "key.png", transparency=50)  # one grey value declared transparent
    np.testing.assert_array_equal(read_image(tmp_path / "key.png")[..., 0], np.where(RAMP == 50, 255, RAMP))
    palette = Image.fromarray(RAMP).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes([0] * 256))
    assert (read_image(tmp_path / "palette.png") == 255).all()


@pytest.mark.parametrize("colour, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_sixteen_bits(colour, channels, tmp_path):
    wide = np.linspace(0, 65535, 24).round().astype(np.uint16).reshape(4, 6, 1)
    array = wide if channels == 1 else wide.repeat(channels, -1)
    if channels in (2, 4):
        array[..., -1] = 65535
    (tmp_path / "x.png").write_bytes(png(array, colour))
    read = read_image(tmp_path / "x.png")
    assert read.shape == (4, 6, 3) and np.abs(read - wide / 257).max() <= 1
    dark = array.copy()
    dark[..., : min(channels, 3) if channels != 2 else 1] //= 100  # stays dark: no stretching of 16 bits
    (tmp_path / "dark.png").write_bytes(png(dark, colour))
    assert read_image(tmp_path / "dark.png").max() <= 3


def test_tiff_of_16_and_32_bits(tmp_path):
    values = np.linspace(0, 60000, 24).reshape(4, 6)
    for dtype in ("<u2", ">u2"):
        Image.fromarray(values.astype(dtype)).save(tmp_path / "16.tif")
        assert np.abs(read_image(tmp_path / "16.tif")[..., 1] - values / 257).max() <= 1
    stretched = values / 60000 * 255
    for array in (values.astype(np.int32) - 5000, (values / 7 - 3).astype(np.float32)):
        Image.fromarray(array).save(tmp_path / "32.tif")
        assert np.abs(read_image(tmp_path / "32.tif")[..., 1] - stretched).max() <= 1
    Image.fromarray(np.full((4, 6), 7.0, np.float32)).save(tmp_path / "flat.tif")
    assert (read_image(tmp_path / "flat.tif") == 0).all()
    Image.fromarray(np.full((4, 6), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="not finite"):
        read_image(tmp_path / "nan.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation, tmp_path):
    turn = [None, *(getattr(Image.Transpose, name) for name in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270",
    ))]  # what a camera did to the upright picture, by orientation - 1  # fmt: skip
    image = Image.fromarray(COLOUR)
    stored = image if orientation == 1 else image.transpose(turn[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), COLOUR)


def test_broken_metadata_does_not_hide_a_good_picture(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.png", exif=b"Exif\0\0 nonsense")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), COLOUR)


def test_animation_gives_its_first_frame(tmp_path):
    first, second = Image.new("L", (6, 4), 0), Image.new("L", (6, 4), 255)
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    assert read_image(tmp_path / "x.gif").max() == 0


@pytest.mark.parametrize("largest", [None, 64])
def test_fifty_megapixels(largest, tmp_path):
    Image.new("RGB", (8660, 5774), (200, 30, 90)).save(tmp_path / "large.jpg")
    start = time.perf_counter()
    read = read_image(tmp_path / "large.jpg", largest)
    assert time.perf_counter() - start < 30
    assert read.shape == ((5774, 8660, 3) if largest is None else (43, 64, 3))
    assert np.abs(read.astype(int) - (200, 30, 90)).max() <= 4


def test_largest_keeps_the_shape_and_never_enlarges(tmp_path):
    Image.fromarray(COLOUR.repeat(20, 0).repeat(20, 1)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 30).shape == (20, 30, 3)
    assert read_image(tmp_path / "x.png", 500).shape == (80, 120, 3)
    for wrong in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            read_image(tmp_path / "x.png", wrong)


def test_more_than_pillow_opens(tmp_path, monkeypatch):
    Image.fromarray(COLOUR).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)  # the error comes at twice as many; the picture has 24
    with pytest.raises(ValueError, match="megapixels; make it smaller first"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "data, part",
    [
        (b"", "empty"),
        (b"hello", "no known format"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"<!DOCTYPE html><p>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_no_picture(data, part, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match="is not a picture") as caught:
        read_image(tmp_path / "x.png")
    assert part in str(caught.value) and "x.png" in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_cut_off(kind, kept, tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(generator.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match="broken or cut off|not a picture"):
        read_image(path)


def test_flipped_bytes_never_give_another_error(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "x.png"
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP"):
        Image.fromarray(COLOUR.repeat(4, 0)).save(path, format=kind)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            wrong = data.copy()
            wrong[generator.integers(0, len(wrong), 4)] = generator.integers(0, 256, 4)
            path.write_bytes(wrong.tobytes())
            try:
                assert read_image(path).ndim == 3
            except ValueError as error:
                assert "x.png" in str(error)


def test_no_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a folder"):
        read_image(tmp_path)


def test_model_input_is_what_timm_feeds():
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model("resnet18").to(torch.float64)
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (300, 400, 3), dtype=np.uint8)
    x, seen = model_input(image, model)
    expected = create_transform(**resolve_data_config({}, model=model))(Image.fromarray(image))
    assert x.dtype == torch.float64 and x.shape == (1, 3, 224, 224) and seen.shape == (224, 224, 3)
    torch.testing.assert_close(x[0].float(), expected, atol=1e-6, rtol=0)
    plain = create_transform(**resolve_data_config({}, model=model) | {"mean": (0, 0, 0), "std": (1, 1, 1)})
    np.testing.assert_allclose(seen, plain(Image.fromarray(image)).permute(1, 2, 0) * 255, atol=0.51)


def test_model_input_refuses_what_does_not_fit():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", in_chans=1)
    with pytest.raises(ValueError, match="takes 1 channels"):
        model_input(np.zeros((30, 30, 3), np.uint8), model)
    for wrong in (np.zeros((30, 30), np.uint8), np.zeros((30, 30, 3), np.float32)):
        with pytest.raises(ValueError, match=r"uint8 \[height, width, 3\]"):
            model_input(wrong, model)
