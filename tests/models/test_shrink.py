"""Shrinking photographs: what is preserved, what is removed, and which images are unchanged."""

import hashlib
import os
import uuid
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.decode import BadImage, decode
from models.shrink import shrink
from producer import publish as publish_files
from producer.message import HEADER_ORIGINAL_BYTES, HEADER_ORIGINAL_SHA256
from streaming.platform.broker import bootstrap_servers
from streaming.settings import Settings
from tests.producer.topics import create_topic, messages

ORIENTATION, GPS_IFD = 0x0112, 0x8825


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def halves(size: tuple[int, int] = (800, 400)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image


def pixels(data: bytes) -> Any:
    shown = decode(data, (20, 20))
    assert not isinstance(shown, BadImage), shown
    return shown.astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_larger_image_keeps_its_aspect_ratio_and_appearance(kind: str) -> None:
    data = encoded(halves(), kind)
    small = shrink(data, 100)
    assert (opened(small).size, opened(small).format) == ((100, 50), "JPEG")
    assert np.abs(pixels(small) - pixels(data))[:, [0, 5, 14, 19]].max() < 12


@pytest.mark.parametrize("data", [encoded(halves((100, 60)), "JPEG"), encoded(halves((3, 100)), "PNG"), b"", b"text"])
def test_small_or_invalid_image_is_unchanged(data: bytes) -> None:
    assert shrink(data, 100) is data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_location_removed(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif.get_ifd(GPS_IFD)[1] = "N"
    data = encoded(halves(), kind, exif=exif)
    small = shrink(data, 200)
    assert opened(small).size == ((200, 100) if orientation < 5 else (100, 200))
    assert not opened(small).getexif()
    assert np.abs(pixels(small) - pixels(data))[[0, 5, 14, 19]][:, [0, 5, 14, 19]].max() < 12


def test_transparency_is_preserved() -> None:
    image = halves()
    image.putalpha(0)
    for kind in ("PNG", "WEBP", "TIFF"):
        small = opened(shrink(encoded(image, kind), 100))
        assert (small.format, small.mode, small.getextrema()[3]) == ("PNG", "RGBA", (0, 0))
    palette = image.convert("RGB").quantize(8)
    palette.info["transparency"] = 0
    assert opened(shrink(encoded(palette, "GIF", transparency=0), 100)).mode == "RGBA"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
def test_every_image_mode_keeps_its_appearance(mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (200, 1))
    if mode == "I;16":
        data = encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG")
    else:
        data = encoded(Image.fromarray(ramp).convert(mode), "TIFF" if mode in ("CMYK", "LA") else "PNG")
    small = shrink(data, 200)
    assert opened(small).size == (200, 100)
    assert np.abs(pixels(small) - pixels(data)).mean() < (40 if mode == "1" else 6)


def test_colour_profile_is_preserved() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG"):
        assert opened(shrink(encoded(halves(), kind, icc_profile=profile), 100)).info["icc_profile"] == profile


@given(cut=st.integers(0, 2000), change=st.binary(max_size=8), kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF"]))
def test_damaged_image_never_raises_and_respects_the_limit(cut: int, change: bytes, kind: str) -> None:
    data = encoded(halves((300, 200)), kind)
    damaged = data[:cut] + change + data[cut + len(change) :]
    for one in (damaged, data[:cut]):
        small = shrink(one, 64)
        assert small is one or max(opened(small).size) <= 64


def test_published_shrunk_image_carries_the_hash_and_size_of_the_original(broker: Settings, tmp_path: Path) -> None:
    servers, topic = bootstrap_servers(broker), f"shrink-{uuid.uuid4().hex[:8]}"
    create_topic(servers, topic, max_message_bytes=50_000)
    noise = Image.fromarray(np.frombuffer(os.urandom(600 * 400 * 3), np.uint8).reshape(400, 600, 3))
    large, small = encoded(noise, "PNG"), encoded(halves((60, 40)), "PNG")
    (tmp_path / "large.png").write_bytes(large)
    (tmp_path / "small.png").write_bytes(small)
    summary = publish_files([tmp_path], bootstrap_servers=servers, topic=topic, shrink_to=100)
    assert (summary.complete, summary.sent) == (True, 2)
    shrunk, untouched = sorted(messages(servers, topic), key=lambda message: message.value == small)
    assert untouched.value == small
    assert HEADER_ORIGINAL_SHA256 not in dict(untouched.headers)
    headers = {name: value.decode() for name, value in shrunk.headers}
    assert shrunk.key.decode() == hashlib.sha256(shrunk.value).hexdigest()
    assert headers[HEADER_ORIGINAL_SHA256] == hashlib.sha256(large).hexdigest()
    assert headers[HEADER_ORIGINAL_BYTES] == str(len(large))
    assert headers["content-type"] == "image/jpeg"
    assert opened(shrunk.value).size == (100, 67)
