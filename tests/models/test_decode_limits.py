"""Decoding at its limits: the largest allowed sizes, pixels and scans, and files that lack only their end."""

import io
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from test_decode import PHOTOGRAPH, SIZE, encode, pixels, plain, png, refusal

from models.decode import BadImage, Limits, Reason, Stage, decode, read_limited
from models.pixels import centred_box, explain, is_cut_off

JPEG_SCAN = b"\xff\xda"


# Limits


def test_default_limit_is_20_mebibytes() -> None:
    most = 20 * 1024**2
    data = encode(plain((10, 200, 30)), "BMP")
    assert (pixels(data + bytes(most - len(data))) == (10, 200, 30)).all()
    bad = refusal(data + bytes(most + 1 - len(data)))
    assert (bad.stage, bad.reason) == (Stage.READ, Reason.TOO_LARGE)


def test_default_limit_is_64_million_pixels() -> None:
    assert refusal(png(8000, 8000, 8, 2, b"")).reason is not Reason.DECOMPRESSION_BOMB, "only its pixels are missing"
    bad = refusal(png(64_000_001, 1, 8, 2, b""))
    assert (bad.stage, bad.reason) == (Stage.DECODE, Reason.DECOMPRESSION_BOMB)
    assert "64000001 pixels, the limit is 64000000" in bad.detail


def test_image_at_the_pixel_limit_is_decoded() -> None:
    data = encode(plain("teal"), "PNG")
    pixels(data, limits=Limits(max_pixels=80 * 60))
    assert refusal(data, limits=Limits(max_pixels=80 * 60 - 1)).reason is Reason.DECOMPRESSION_BOMB


def test_jpeg_with_100_scans_is_decoded() -> None:
    progressive = encode(PHOTOGRAPH, "JPEG", progressive=True)
    last = progressive[progressive.rindex(JPEG_SCAN) : -2]
    missing = 100 - progressive.count(JPEG_SCAN)
    pixels(progressive[:-2] + last * missing + b"\xff\xd9")
    bad = refusal(progressive[:-2] + last * (missing + 1) + b"\xff\xd9")
    assert (bad.reason, bad.detail) == (Reason.DECOMPRESSION_BOMB, "JPEG: 101 scans, the limit is 100")
    png_with_such_bytes = encode(plain("teal"), "PNG") + JPEG_SCAN * 200
    pixels(png_with_such_bytes)


@pytest.mark.parametrize(("size", "read"), [(0, 0), (9, 9), (10, 10), (11, 11), (50, 11)])
def test_reading_stops_one_byte_after_the_limit(tmp_path: Path, size: int, read: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    assert len(read_limited(path, Limits(max_bytes=10))) == read


# Reasons


@pytest.mark.parametrize(
    ("image_format", "whole"),
    [
        ("JPEG", b"\xff\xd8\xff..\xff\xd9" + bytes(62)),  # cameras append data after the end
        ("PNG", b"\x89PNG..IEND12345678"),
        ("GIF", b"GIF89a..;"),
        ("GIF", b"GIF89a..;\0\0\0"),
        ("WEBP", b"RIFF" + struct.pack("<I", 6) + b"WEBP.."),
        ("WEBP", b"RIFF" + struct.pack("<I", 5) + b"WEBP.."),
        ("BMP", b"BM" + struct.pack("<I", 8) + b".."),
        ("BMP", b"BM" + struct.pack("<I", 7) + b".."),
        ("TIFF", b"II*\0" + struct.pack("<I", 8) + b".."),
        ("TIFF", b"MM\0*" + struct.pack(">I", 8) + b".."),
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x0dmdat....."),
        ("ICO", b""),  # a format without a known end
    ],
)
def test_file_with_the_end_that_its_format_requires_is_not_cut_off(image_format: str, whole: bytes) -> None:
    assert not is_cut_off(whole, image_format)


@pytest.mark.parametrize(
    ("image_format", "cut"),
    [
        ("JPEG", b"\xff\xd8\xff..\xff\xd9" + bytes(63)),
        ("JPEG", b"\xff\xd8\xff..\xff"),
        ("PNG", b"\x89PNG..IEND123456789"),
        ("PNG", b"\x89PNG..IEN"),
        ("GIF", b"GIF89a..;."),
        ("WEBP", b"RIFF" + struct.pack("<I", 7) + b"WEBP.."),
        ("BMP", b"BM" + struct.pack("<I", 9) + b".."),
        ("TIFF", b"II*\0" + struct.pack("<I", 9) + b".."),
        ("TIFF", b"MM\0*" + struct.pack(">I", 9) + b".."),
        ("AVIF", b"\0\0\0\x0aftyp..\0\0\0\x0emdat....."),
    ],
)
def test_file_without_the_end_that_its_format_requires_is_cut_off(image_format: str, cut: bytes) -> None:
    assert is_cut_off(cut, image_format)


def test_unreadable_header_error_contains_no_memory_address() -> None:
    bad = refusal(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert (bad.stage, bad.detail) == (Stage.DECODE, "PNG: its header cannot be read")
    assert "0x" not in explain(UnidentifiedImageError("<_io.BytesIO at 0x7f>"), Stage.DECODE, b"", "PNG").detail


def test_decoder_message_is_shortened_and_replaced_by_the_error_name_if_empty() -> None:
    detail = explain(ValueError("x" * 500), Stage.DECODE, b"", "TIFF").detail
    assert detail == "TIFF: " + "x" * 194
    assert explain(ValueError(), Stage.DECODE, b"", "AVIF") == BadImage(
        Stage.DECODE, Reason.CORRUPT, "AVIF: ValueError"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Image.DecompressionBombError("too many"), Reason.DECOMPRESSION_BOMB),
        (ValueError("Too much memory used in text chunks"), Reason.DECOMPRESSION_BOMB),
        (OSError("image file is truncated (3 bytes not processed)"), Reason.TRUNCATED),
        (OSError("Truncated_File_Read"), Reason.TRUNCATED),
        (OSError("broken data stream"), Reason.CORRUPT),
    ],
)
def test_reason_is_derived_from_the_decoder_error(error: Exception, reason: Reason) -> None:
    whole = encode(plain("teal"), "PNG")
    assert explain(error, Stage.DECODE, whole, "PNG").reason is reason


def test_unsupported_format_with_too_many_pixels_is_a_format_error() -> None:
    bad = refusal(b"P6 50000 50000 255\n")
    assert (bad.stage, bad.reason) == (Stage.DECODE, Reason.FORMAT_NOT_ALLOWED)
    assert "PPM" in bad.detail


# Pixels


def test_pixels_are_read_only_and_have_the_requested_size() -> None:
    for image in (plain("teal"), plain(77, "L"), PHOTOGRAPH):
        got = pixels(encode(image, "PNG"), (30, 50))
        assert not got.flags.writeable
        assert got.shape == (30, 50, 3)


def test_every_16_bit_value_is_rounded_to_8_bits() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = pixels(encode(Image.fromarray(values), "PNG"), (256, 256))
    assert (got == np.rint(values / 257)[..., np.newaxis]).all()


@pytest.mark.parametrize(
    ("image", "window", "box"),
    [
        ((300, 100), (50, 50), (100, 0, 200, 100)),
        ((100, 300), (50, 50), (0, 100, 100, 200)),
        ((100, 100), (50, 50), (0, 0, 100, 100)),
        ((101, 40), (20, 20), (30, 0, 70, 40)),
        ((40, 103), (20, 20), (0, 31, 40, 71)),
        ((200, 100), (40, 10), (0, 25, 200, 75)),
        ((1, 1000), (1000, 1), (0, 499, 1, 500)),
        ((1000, 1), (1, 1000), (499, 0, 500, 1)),
    ],
)
def test_crop_is_the_largest_centred_window_with_the_target_aspect_ratio(
    image: tuple[int, int], window: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert centred_box(*image, *window) == box


@pytest.mark.parametrize("orientation", [1, 6])
def test_crop_uses_the_aspect_ratio_after_orientation(orientation: int) -> None:
    stored = Image.new("RGB", (120, 60), "red")
    stored.paste("blue", (30, 0, 90, 60) if orientation == 1 else (45, 0, 75, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (40, 40) if orientation == 1 else (20, 40)
    assert (pixels(encode(stored, "PNG", exif=exif), size, resize="crop") == (0, 0, 255)).all()


@pytest.mark.parametrize("factors", [(1, 3), (3, 1), (3, 3)])
def test_fine_stripes_become_gray_when_downscaled(factors: tuple[int, int]) -> None:
    height, width = SIZE[0] * factors[0], SIZE[1] * factors[1]
    rows, columns = np.indices((height, width))
    stripes = (255 * ((rows // 2 if factors[0] > 1 else columns // 2) % 2)).astype(np.uint8)
    got = pixels(encode(Image.fromarray(stripes), "PNG")).astype(int)
    assert np.abs(got[4:-4, 4:-4] - 127).max() < 60
    assert abs(got.mean() - 127.5) < 2


def test_photograph_decodes_close_to_pillow() -> None:
    large = PHOTOGRAPH.resize((800, 600))
    expected = np.asarray(large.resize((64, 48), Image.Resampling.BILINEAR), float)
    assert np.abs(pixels(encode(large, "PNG")) - expected).mean() < 1
    assert np.abs(pixels(encode(large, "JPEG", quality=95)) - expected).mean() < 2


def test_opencv_uses_one_thread() -> None:
    assert cv2.getNumThreads() == 1


def test_transparent_gray_and_palette_colours_are_composited_over_white() -> None:
    clear = io.BytesIO()
    Image.new("L", (8, 8), 0).save(clear, "PNG", transparency=0)
    assert (pixels(clear.getvalue()) == 255).all()
    red = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(red, "PNG", transparency=(255, 0, 0))
    assert (pixels(red.getvalue()) == 255).all()


@pytest.mark.parametrize("data", [None, b"", b"x", bytes(30)])
def test_invalid_image_has_a_detail_message(data: Any) -> None:
    bad = decode(data, SIZE)
    assert isinstance(bad, BadImage)
    assert bad.detail
