"""Damaged images that viewers still display: decoded and marked, or rejected in strict mode."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_decode import PHOTOGRAPH, SIZE, encode

from models.decode import DEFAULT_LIMITS, BadImage, Reason, decode_marked
from models.image_header import exif_orientation, sniff

STRICT = replace(DEFAULT_LIMITS, strict=True)
JPEG = encode(PHOTOGRAPH, "JPEG", quality=90)
PROGRESSIVE = encode(PHOTOGRAPH, "JPEG", progressive=True)
DAMAGED = {
    "no end marker": (JPEG[:-2], "its end marker is missing"),
    "half an end marker": (JPEG[:-1], "its end marker is missing"),
    "progressive, no end marker": (PROGRESSIVE[:-2], "its end marker is missing"),
    "last bytes missing": (JPEG[:-60], "rows are missing"),
    "progressive, last bytes missing": (PROGRESSIVE[:-40], "rows are missing"),
    "text before the image": (b"sent by camera 7\r\n" + JPEG, "18 bytes before the image"),
    "blank lines before a PNG": (b"\r\n\r\n" + encode(PHOTOGRAPH, "PNG"), "4 bytes before the image"),
    "trailer written by a phone": (JPEG + b"trailer", "7 bytes after the image"),
    "progressive, trailing bytes": (PROGRESSIVE + bytes(10), "10 bytes after the image"),
    "PNG, trailing byte": (encode(PHOTOGRAPH, "PNG") + b"\n", "1 bytes after the image"),
    "PNG without its IEND chunk": (encode(PHOTOGRAPH, "PNG")[:-12], "its end marker is missing"),
    "PNG without its last row": (encode(PHOTOGRAPH, "PNG")[:-300], "of 150 rows are missing"),
    "BMP without its last rows": (encode(PHOTOGRAPH, "BMP")[:-1000], "2 of 150 rows are missing"),
    "TIFF without its last rows": (encode(PHOTOGRAPH, "TIFF")[:-1000], "of 150 rows are missing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_image_is_decoded_and_marked(name: str) -> None:
    data, damage = DAMAGED[name]
    got = decode_marked(data, SIZE)
    assert not isinstance(got, BadImage), got
    assert damage in (got.damage or "")
    whole = decode_marked(JPEG, SIZE)
    assert not isinstance(whole, BadImage)
    rows = slice(6, -6)  # the others may be missing
    assert np.abs(got.pixels[rows].astype(int) - whole.pixels[rows]).mean() < 8


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_image_is_rejected_in_strict_mode(name: str) -> None:
    bad = decode_marked(DAMAGED[name][0], SIZE, STRICT)
    assert isinstance(bad, BadImage)
    assert bad.reason in (Reason.TRUNCATED, Reason.CORRUPT)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_intact_image_is_neither_marked_nor_rejected(image_format: str) -> None:
    got = decode_marked(encode(PHOTOGRAPH, image_format), SIZE, STRICT)
    assert not isinstance(got, BadImage), got
    assert got.damage is None


def test_extra_pictures_of_an_mpo_file_are_not_damage() -> None:
    got = decode_marked(encode(PHOTOGRAPH, "MPO", save_all=True, append_images=[PHOTOGRAPH]), SIZE, STRICT)
    assert not isinstance(got, BadImage), got


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_image_missing_more_than_a_few_rows_is_truncated(data: bytes, share: float) -> None:
    bad = decode_marked(data[: int(len(data) * share)], SIZE)
    assert isinstance(bad, BadImage)
    assert bad.reason is Reason.TRUNCATED


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_image_that_ends_within_a_code_of_two_bytes_is_truncated(share: float) -> None:
    """Its last byte, and the first one in place of the missing ones, would be a marker that ends the pixels."""
    bad = decode_marked(JPEG[: JPEG.index(b"\xff\0", int(len(JPEG) * share)) + 1], SIZE)
    assert isinstance(bad, BadImage)
    assert bad.reason is Reason.TRUNCATED


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b"<!-- made by hand -->\n<svg>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
    ],
)
def test_unsupported_format_is_named(start: bytes, named: str) -> None:
    bad = decode_marked(start + bytes(100), SIZE)
    assert isinstance(bad, BadImage)
    assert (bad.reason, bad.detail.split(",")[0]) == (Reason.FORMAT_NOT_ALLOWED, named)


@pytest.mark.parametrize(
    "container", [b"PK\x03\x04", b"ID3\x04", b"%PDF-1.7", b"RIFF\0\0\0\0WAVE", b"<html>", b"\x7fELF"]
)
def test_image_embedded_in_another_file_is_not_searched_for(container: bytes) -> None:
    found = sniff(container + bytes(20) + JPEG)
    assert found is None or found.start == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_in_both_byte_orders_and_from_xmp(orientation: int) -> None:
    entry = (
        b"\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0]),
        b"\x01\x12\0\x03\0\0\0\x01" + bytes([0, orientation, 0, 0]),
    )
    assert exif_orientation(b"II*\0\x08\0\0\0\x01\0" + entry[0]) == orientation
    assert exif_orientation(b"MM\0*\0\0\0\x08\0\x01" + entry[1]) == orientation
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + f'<x tiff:Orientation="{orientation}"/>'.encode()
    stored = JPEG[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2) + xmp + JPEG[2:]
    exif: Any = {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry[0]}
    one, other = decode_marked(stored, SIZE), decode_marked(encode(PHOTOGRAPH, "JPEG", quality=90, **exif), SIZE)
    assert not isinstance(one, BadImage)
    assert not isinstance(other, BadImage)
    assert (one.pixels == other.pixels).all()


def test_metadata_does_not_affect_pixels() -> None:
    profile = io.BytesIO(bytes(3_000_000)).getvalue()
    one, other = (
        decode_marked(encode(PHOTOGRAPH, "JPEG", quality=90, icc_profile=profile, comment=b"c"), SIZE),
        decode_marked(JPEG, SIZE),
    )
    assert not isinstance(one, BadImage)
    assert not isinstance(other, BadImage)
    assert (one.pixels == other.pixels).all()
