"""Thumbnails: a table may contain any path, but only the image that was scored is shown."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streaming.reports.thumbnails import SIZE, thumbnail


@pytest.fixture
def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_thumbnail_comes_from_the_first_path_that_still_has_the_image(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "changed.png").write_bytes(image + b"\0")
    (tmp_path / "kept.png").write_bytes(image)
    places = [None, "", str(tmp_path / "gone.png"), str(tmp_path / "changed.png"), str(tmp_path / "kept.png")]
    found = thumbnail(places, sha256(image))
    assert found is not None
    assert found.shape == (*SIZE, 3)
    np.testing.assert_array_equal(found[0, 0], (10, 200, 30))
    assert thumbnail(places[:-1], sha256(image)) is None


def test_special_files_directories_and_oversized_files_are_not_read(tmp_path: Path, image: bytes) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would block forever
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(1 << 40)
    for place in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path / "huge"), str(tmp_path), "a\0b"):
        assert thumbnail([place], sha256(image)) is None


def test_matching_file_that_is_not_an_image_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"not an image")
    assert thumbnail([str(tmp_path / "secret")], sha256(b"not an image")) is None
