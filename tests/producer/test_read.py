"""Reading files into messages, including files whose size is misreported."""

import hashlib
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from producer.message import Message
from producer.read import ReadOptions, Skipped, SkipReason, read
from producer.sender import message_bytes
from producer.sources import SourceFile

ROOM = 1024**2
UNSIZED = Path("/proc/filesystems")  # its stat size is 0, and it is read in several parts


@pytest.mark.skipif(not UNSIZED.exists(), reason="only Linux has such a file")
def test_file_that_is_larger_than_its_stat_size_is_read_to_the_end() -> None:
    message = read(SourceFile(str(UNSIZED), None), ReadOptions(), ROOM)
    assert isinstance(message, Message)
    assert message.value == UNSIZED.read_bytes() != b""


@pytest.mark.skipif(not UNSIZED.exists(), reason="only Linux has such a file")
def test_reading_stops_at_the_size_limit() -> None:
    skipped = read(SourceFile(str(UNSIZED), None), ReadOptions(max_bytes=10), ROOM)
    assert skipped == Skipped(str(UNSIZED), SkipReason.TOO_LARGE, "11 bytes, the limit is 10")


def test_headers_count_towards_the_message_size(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(b"\xff\xd8\xff" + bytes(10_000))
    label = "l" * 1000
    skipped = read(SourceFile(str(path), label), ReadOptions(), 10_500)
    assert isinstance(skipped, Skipped)
    assert skipped.reason is SkipReason.TOO_LARGE
    assert "with headers, the topic's limit is 10,500" in skipped.detail
    assert isinstance(read(SourceFile(str(path), label), ReadOptions(), 12_000), Message)


@pytest.fixture
def photograph(tmp_path: Path) -> SourceFile:
    """A JPEG of 400×300 pixels."""
    path = tmp_path / "photograph.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    return SourceFile(str(path), "cat")


def sparse(path: Path, size: int) -> SourceFile:
    """A sparse file of this many zero bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return SourceFile(str(path), None)


def test_message_has_the_bytes_name_and_label_of_the_file(photograph: SourceFile) -> None:
    message = read(photograph, ReadOptions(), ROOM)
    assert isinstance(message, Message)
    assert message.value == Path(photograph.name).read_bytes()
    headers = dict(message.headers)
    assert (headers["ce_source"], headers["label"]) == (photograph.name.encode(), b"cat")
    assert not any(name.startswith("imagestream-original") for name in headers)


def test_size_limit_of_images_is_inclusive(photograph: SourceFile) -> None:
    size = Path(photograph.name).stat().st_size
    assert isinstance(read(photograph, ReadOptions(max_bytes=size), ROOM), Message)
    detail = f"{size:,} bytes, the limit is {size - 1:,}"
    skipped = Skipped(photograph.name, SkipReason.TOO_LARGE, detail)
    assert read(photograph, ReadOptions(max_bytes=size - 1), ROOM) == skipped
    wanted = read(photograph, ReadOptions(max_bytes=size - 1, skip_too_large=True), ROOM)
    assert wanted == replace(skipped, wanted=True)


def test_size_limit_of_messages_is_inclusive(photograph: SourceFile) -> None:
    message = read(photograph, ReadOptions(), ROOM)
    assert isinstance(message, Message)
    size = message_bytes(message)
    assert isinstance(read(photograph, ReadOptions(), size), Message)
    detail = f"{size:,} bytes with headers, the topic's limit is {size - 1:,}"
    assert read(photograph, ReadOptions(), size - 1) == Skipped(photograph.name, SkipReason.TOO_LARGE, detail)


def test_default_limit_is_20_mebibytes(tmp_path: Path) -> None:
    limit = 20 * 1024**2
    assert isinstance(read(sparse(tmp_path / "limit", limit), ReadOptions(), 2 * limit), Message)
    skipped = read(sparse(tmp_path / "above", limit + 1), ReadOptions(), 2 * limit)
    assert skipped == Skipped(
        str(tmp_path / "above"), SkipReason.TOO_LARGE, "20,971,521 bytes, the limit is 20,971,520"
    )


def test_shrunk_image_carries_the_hash_and_size_of_the_original(photograph: SourceFile) -> None:
    original = Path(photograph.name).read_bytes()
    message = read(photograph, ReadOptions(shrink_to=100, max_bytes=len(original) - 1), ROOM)
    assert isinstance(message, Message), "the limit applies to the shrunk image"
    with Image.open(BytesIO(message.value)) as image:
        assert image.size == (100, 75)
    headers = dict(message.headers)
    assert headers["imagestream-original-sha256"] == hashlib.sha256(original).hexdigest().encode()
    assert headers["imagestream-original-bytes"] == str(len(original)).encode()
    limit = len(message.value)
    again = read(photograph, ReadOptions(shrink_to=100, max_bytes=limit), ROOM)
    assert isinstance(again, Message)
    assert again.value == message.value
    skipped = read(photograph, ReadOptions(shrink_to=100, max_bytes=limit - 1), ROOM)
    assert skipped == Skipped(photograph.name, SkipReason.TOO_LARGE, f"{limit:,} bytes, the limit is {limit - 1:,}")


def test_originals_of_up_to_256_mebibytes_are_shrunk(tmp_path: Path) -> None:
    limit, options = 256 * 1024**2, ReadOptions(shrink_to=100, max_bytes=1000)
    skipped = read(sparse(tmp_path / "above", limit + 1), options, ROOM)
    assert skipped == Skipped(
        str(tmp_path / "above"), SkipReason.TOO_LARGE, "268,435,457 bytes, the limit is 268,435,456"
    )
    skipped = read(sparse(tmp_path / "limit", limit), options, ROOM)
    assert isinstance(skipped, Skipped)
    assert skipped.detail == "268,435,456 bytes, the limit is 1,000", "it was read and could not be shrunk"


def test_files_that_are_not_images_are_skipped_only_with_the_option(tmp_path: Path, photograph: SourceFile) -> None:
    text = SourceFile(str(tmp_path / "notes.jpg"), None)
    Path(text.name).write_text("notes about photographs")
    assert isinstance(read(text, ReadOptions(), ROOM), Message)
    skipped = Skipped(text.name, SkipReason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    assert read(text, ReadOptions(only_images=True), ROOM) == skipped
    assert isinstance(read(photograph, ReadOptions(only_images=True), ROOM), Message)
    assert read(text, ReadOptions(only_images=True, max_bytes=5), ROOM) == skipped, "regardless of its size"


def test_unreadable_files_are_skipped_with_the_system_error(tmp_path: Path) -> None:
    def read_file(name: str) -> Message | Skipped:
        return read(SourceFile(name, None), ReadOptions(), ROOM)

    absent, pipe = str(tmp_path / "absent.jpg"), str(tmp_path / "pipe")
    os.mkfifo(pipe)
    assert read_file(absent) == Skipped(absent, SkipReason.UNREADABLE, "No such file or directory")
    assert read_file("null\0.jpg") == Skipped("null\0.jpg", SkipReason.UNREADABLE, "embedded null byte")
    assert read_file(str(tmp_path)) == Skipped(str(tmp_path), SkipReason.UNREADABLE, "not a regular file")
    assert read_file(pipe) == Skipped(pipe, SkipReason.UNREADABLE, "not a regular file")


def test_first_bytes_identify_an_image_of_every_format(tmp_path: Path) -> None:
    for image_format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        path = tmp_path / image_format
        Image.new("RGB", (64, 64), "teal").save(path, image_format)
        skipped = read(SourceFile(str(path), None), ReadOptions(only_images=True, max_bytes=20), ROOM)
        assert isinstance(skipped, Skipped)
        assert skipped.reason is SkipReason.TOO_LARGE, f"{image_format} was not recognised"


# Objects of a store

JPEG = b"\xff\xd8\xff" + bytes(997)
OBJECTS = {"s3://photos/cat.jpg": JPEG, "s3://photos/notes.jpg": b"notes about photographs"}


def fetch(uri: str, n: int) -> bytes:
    if uri not in OBJECTS:
        raise OSError(f"{uri} does not exist") if uri.endswith("absent.jpg") else PermissionError(13, "no permission")
    return OBJECTS[uri][:n]


def read_object(name: str, **options: Any) -> Message | Skipped:
    return read(SourceFile(name, None), ReadOptions(fetch=fetch, **options), ROOM)


def test_object_is_fetched_by_its_uri_and_a_file_read_by_its_name(photograph: SourceFile) -> None:
    for message in (read_object("s3://photos/cat.jpg"), read_object("s3://photos/cat.jpg", only_images=True)):
        assert isinstance(message, Message)
        assert message.value == JPEG
    assert isinstance(read_object(photograph.name), Message)


def test_at_most_one_byte_above_the_limit_is_fetched() -> None:
    name = "s3://photos/cat.jpg"
    assert isinstance(read_object(name, max_bytes=1000), Message)
    assert read_object(name, max_bytes=999) == Skipped(name, SkipReason.TOO_LARGE, "more than the limit of 999 bytes")
    wanted = Skipped(name, SkipReason.TOO_LARGE, "more than the limit of 999 bytes", wanted=True)
    assert read_object(name, max_bytes=999, skip_too_large=True) == wanted
    asked = []
    options = ReadOptions(fetch=lambda uri, n: asked.append(n) or fetch(uri, n), max_bytes=999)
    read(SourceFile(name, None), options, ROOM)
    assert asked == [1000]


def test_objects_are_skipped_for_the_same_reasons_as_files() -> None:
    name = "s3://photos/notes.jpg"
    assert isinstance(read_object(name), Message)
    skipped = Skipped(name, SkipReason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    assert read_object(name, only_images=True) == skipped
    absent, denied = "s3://photos/absent.jpg", "s3://photos/denied.jpg"
    assert read_object(absent) == Skipped(absent, SkipReason.UNREADABLE, f"{absent} does not exist")
    assert read_object(denied) == Skipped(denied, SkipReason.UNREADABLE, "no permission")
