import io
import struct
import sys
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from sklearn.datasets import load_sample_images

from models.decode import BadImage, Limits, Reason, Stage, decode

SIZE = (48, 64)
PHOTOGRAPH = Image.fromarray(load_sample_images().images[0]).resize((200, 150))
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def png(width: int, height: int, bit_depth: int, color_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG assembled by hand, for what Pillow cannot write; each of the `rows` begins with its filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    text = chunk(b"zTXt", extra) if extra else b""
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + text + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(data: bytes, size: tuple[int, int] = SIZE, **options: Any) -> np.ndarray:
    got = decode(data, size, **options)
    assert isinstance(got, np.ndarray), got
    assert got.dtype == np.uint8
    assert got.shape == (*size, 3)
    return got


def refusal(data: bytes | None, **options: Any) -> BadImage:
    got = decode(data, SIZE, **options)
    assert isinstance(got, BadImage)
    return got


def plain(color: tuple[int, ...] | int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (80, 60), color)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_allowed_format_decodes_to_the_same_picture(image_format: str) -> None:
    expected = np.asarray(PHOTOGRAPH.resize((64, 48), Image.Resampling.BILINEAR), float)
    assert np.abs(pixels(encode(PHOTOGRAPH, image_format)) - expected).mean() < 8


@pytest.mark.parametrize("shape", [(640, 480), (1000, 700), (97, 211), (3, 5)])
def test_reduced_jpeg_decoding_matches_full_decoding(shape: tuple[int, int]) -> None:
    data = encode(PHOTOGRAPH.resize(shape), "JPEG", quality=92)
    whole = Image.open(io.BytesIO(data)).resize((64, 48), Image.Resampling.BILINEAR)
    assert np.abs(pixels(data) - np.asarray(whole, float)).mean() < 2.5


@pytest.mark.parametrize("quarter", [1, 2, 3])
@pytest.mark.parametrize("image_format", FORMATS)
def test_cut_off_file_is_reported_as_truncated(image_format: str, quarter: int) -> None:
    data = encode(PHOTOGRAPH, image_format)
    bad = refusal(data[: len(data) * quarter // 4])
    assert (bad.stage, bad.reason) == (Stage.DECODE, Reason.TRUNCATED)


@pytest.mark.parametrize("image_format", ["PPM", "ICO", "TGA", "JPEG2000", "PCX", "DDS", "SGI"])
def test_unsupported_image_format_is_named(image_format: str) -> None:
    bad = refusal(encode(PHOTOGRAPH, image_format))
    assert bad.reason is Reason.FORMAT_NOT_ALLOWED
    assert image_format in bad.detail


def test_formats_can_be_restricted() -> None:
    bad = refusal(encode(PHOTOGRAPH, "GIF"), limits=Limits(formats=("JPEG", "PNG")))
    assert bad.reason is Reason.FORMAT_NOT_ALLOWED
    assert "JPEG, PNG" in bad.detail


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(range(200)),
        b"BMW and other words that start like a bitmap",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        np.random.default_rng(0).bytes(4096),
        bytes(64),
        b"\xff",
    ],
    ids=["html", "zip", "text", "wav", "noise", "zeros", "one byte"],
)
def test_bytes_that_are_not_an_image_are_identified(data: bytes) -> None:
    assert refusal(data).reason is Reason.NOT_AN_IMAGE


def test_missing_empty_and_oversized_values_are_rejected_before_decoding() -> None:
    assert (refusal(None).stage, refusal(None).reason) == (Stage.READ, Reason.MISSING)
    assert (refusal(b"").stage, refusal(b"").reason) == (Stage.READ, Reason.EMPTY)
    data = encode(PHOTOGRAPH, "PNG")
    assert refusal(data, limits=Limits(max_bytes=len(data) - 1)).reason is Reason.TOO_LARGE
    pixels(data, limits=Limits(max_bytes=len(data)))


def test_decompression_bomb_is_detected_from_the_header() -> None:
    huge = png(50_000, 50_000, 8, 2, b"")
    large = png(16_001, 4_000, 8, 2, b"")
    assert len(huge) < 100
    assert refusal(huge).reason is Reason.DECOMPRESSION_BOMB
    assert refusal(large).reason is Reason.DECOMPRESSION_BOMB
    assert "64004000 pixels" in refusal(large).detail


def test_text_chunk_and_scan_bombs_are_detected() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(50_000_000))
    assert refusal(png(1, 1, 8, 0, b"\0\0", extra=text)).reason is Reason.DECOMPRESSION_BOMB
    progressive = encode(PHOTOGRAPH, "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert refusal(progressive[:-2] + last_scan * 200 + b"\xff\xd9").reason is Reason.DECOMPRESSION_BOMB


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (1, 1)])
def test_extreme_aspect_ratios_are_stretched(shape: tuple[int, int]) -> None:
    assert (pixels(encode(Image.new("RGB", shape, (10, 200, 30)), "PNG")) == (10, 200, 30)).all()


def test_crop_takes_the_largest_centred_window() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert (pixels(encode(wide, "PNG"), (50, 50), resize="crop") == (0, 0, 255)).all()
    assert (pixels(encode(wide, "PNG"), (50, 50))[:, 0] == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(image_format: str, orientation: int) -> None:
    upright = np.zeros((60, 80, 3), np.uint8)
    upright[:30, :40], upright[:30, 40:], upright[30:, :40] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = pixels(encode(stored, image_format, exif=exif), (60, 80)).astype(int)
    corners = upright[[10, 10, 50, 50], [10, 70, 10, 70]]
    assert np.abs(got[[10, 10, 50, 50], [10, 70, 10, 70]] - corners).max() < 12


@pytest.mark.parametrize(
    "exif",
    [
        b"\xff\xff\xff\x7f",  # a directory beyond the end
        b"\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd",  # an orientation that is text
    ],
)
def test_unreadable_exif_is_ignored(exif: bytes) -> None:
    good = encode(PHOTOGRAPH, "JPEG")
    assert (pixels(encode(PHOTOGRAPH, "JPEG", exif=b"Exif\0\0II*\0" + exif)) == pixels(good)).all()


def test_cmyk_grayscale_bilevel_and_palette_become_rgb() -> None:
    assert np.abs(pixels(encode(plain((200, 40, 90)).convert("CMYK"), "JPEG")).astype(int) - (200, 40, 90)).max() < 8
    assert (pixels(encode(plain(77, "L"), "PNG")) == 77).all()
    assert (pixels(encode(plain(1, "1"), "PNG")) == 255).all()
    assert (pixels(encode(plain((10, 200, 30)).quantize(4), "PNG")) == (10, 200, 30)).all()


def test_sixteen_bit_values_are_scaled_not_clipped() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(1, 256)
    assert (pixels(encode(Image.fromarray(ramp), "PNG"), (1, 256))[0, :, 0] == np.arange(256)).all()
    assert (pixels(encode(Image.fromarray(ramp), "TIFF"), (1, 256))[0, :, 0] == np.arange(256)).all()
    rgb = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32896, 65535, 65535, 257, 514))
    assert pixels(rgb, (1, 2)).tolist() == [[[0, 128, 255], [255, 1, 2]]]


def test_transparency_is_composited_over_white() -> None:
    half = pixels(encode(plain((0, 0, 0, 128), "RGBA"), "PNG"))
    assert (half == 127).all()
    assert (pixels(encode(plain((0, 0), "LA"), "PNG")) == 255).all()
    palette = plain((9, 9, 9)).quantize(2)
    assert (pixels(encode(palette, "GIF", transparency=palette.getpixel((0, 0)))) == 255).all()


def test_first_frame_of_an_animation_is_used() -> None:
    frames = [plain("red"), plain("blue")]
    for image_format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all(), image_format


def test_pixels_without_a_defined_range_are_an_unsupported_mode() -> None:
    bad = refusal(encode(Image.new("F", (8, 8), 0.5), "TIFF"))
    assert (bad.stage, bad.reason) == (Stage.PREPROCESS, Reason.UNSUPPORTED_MODE)


def test_corrupted_body_of_full_length_is_reported_as_corrupt() -> None:
    data = bytearray(encode(PHOTOGRAPH, "PNG"))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    assert refusal(bytes(data)).reason is Reason.CORRUPT


def test_pillow_settings_and_warning_filters_are_unchanged() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = list(warnings.filters)
        # Pillow warns about this size.
        assert refusal(png(10_000, 10_000, 8, 0, b"")).reason is Reason.DECOMPRESSION_BOMB
        assert list(warnings.filters) == inside
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_decoding_does_not_import_tensorflow() -> None:
    import subprocess

    code = "import sys, models.decode, models.engine, models.backbone; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.binary(max_size=2000))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    assert isinstance(decode(data, SIZE), np.ndarray | BadImage)


@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_mutated_images_never_raise(image_format: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encode(PHOTOGRAPH.resize((40, 30)), image_format))
    for position, value in changes:
        data[int(position * (len(data) - 1))] = value
    got = decode(bytes(data), SIZE)
    assert isinstance(got, BadImage) or got.shape == (*SIZE, 3)
