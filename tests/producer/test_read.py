"""What is read of a file, whatever its file system says of it."""

import hashlib
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from producer.message import Message
from producer.read import Reading, Reason, Skipped, read
from producer.sender import message_bytes
from producer.sources import SourceFile

ROOM = 1024**2
UNSIZED = Path("/proc/filesystems")  # said to be empty, and given in pieces


@pytest.mark.skipif(not UNSIZED.exists(), reason="only Linux has such a file")
def test_a_file_that_is_longer_than_it_says_is_read_to_its_end() -> None:
    message = read(SourceFile(str(UNSIZED), None), Reading(), ROOM)
    assert isinstance(message, Message)
    assert message.value == UNSIZED.read_bytes() != b""


@pytest.mark.skipif(not UNSIZED.exists(), reason="only Linux has such a file")
def test_no_more_of_it_is_read_than_may_be_sent() -> None:
    skipped = read(SourceFile(str(UNSIZED), None), Reading(max_bytes=10), ROOM)
    assert skipped == Skipped(str(UNSIZED), Reason.TOO_LARGE, "11 bytes, at most 10 are taken")


def test_headers_count_where_only_they_make_a_message_too_large(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(b"\xff\xd8\xff" + bytes(10_000))
    label = "l" * 1000
    skipped = read(SourceFile(str(path), label), Reading(), 10_500)
    assert isinstance(skipped, Skipped)
    assert skipped.reason is Reason.TOO_LARGE
    assert "with its headers, the topic takes 10,500" in skipped.detail
    assert isinstance(read(SourceFile(str(path), label), Reading(), 12_000), Message)


# Limits


@pytest.fixture
def photograph(tmp_path: Path) -> SourceFile:
    """A JPEG of 400×300 pixels."""
    path = tmp_path / "photograph.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    return SourceFile(str(path), "cat")


def sparse(path: Path, size: int) -> SourceFile:
    """A file of this many zero bytes, which takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    return SourceFile(str(path), None)


def test_a_file_becomes_a_message_with_its_bytes_its_name_and_its_label(photograph: SourceFile) -> None:
    message = read(photograph, Reading(), ROOM)
    assert isinstance(message, Message)
    assert message.value == Path(photograph.name).read_bytes()
    headers = dict(message.headers)
    assert (headers["ce_source"], headers["label"]) == (photograph.name.encode(), b"cat")
    assert not any(name.startswith("imagestream-original") for name in headers)


def test_an_image_as_large_as_allowed_is_sent_and_one_byte_more_is_not(photograph: SourceFile) -> None:
    size = Path(photograph.name).stat().st_size
    assert isinstance(read(photograph, Reading(max_bytes=size), ROOM), Message)
    detail = f"{size:,} bytes, at most {size - 1:,} are taken"
    skipped = Skipped(photograph.name, Reason.TOO_LARGE, detail)
    assert read(photograph, Reading(max_bytes=size - 1), ROOM) == skipped
    wanted = read(photograph, Reading(max_bytes=size - 1, skip_too_large=True), ROOM)
    assert wanted == replace(skipped, wanted=True)


def test_a_message_as_large_as_the_topic_takes_is_sent_and_one_byte_more_is_not(photograph: SourceFile) -> None:
    message = read(photograph, Reading(), ROOM)
    assert isinstance(message, Message)
    size = message_bytes(message)
    assert isinstance(read(photograph, Reading(), size), Message)
    detail = f"{size:,} bytes with its headers, the topic takes {size - 1:,}"
    assert read(photograph, Reading(), size - 1) == Skipped(photograph.name, Reason.TOO_LARGE, detail)


def test_without_options_twenty_mebibytes_are_sent(tmp_path: Path) -> None:
    most = 20 * 1024**2
    assert isinstance(read(sparse(tmp_path / "most", most), Reading(), 2 * most), Message)
    skipped = read(sparse(tmp_path / "more", most + 1), Reading(), 2 * most)
    assert skipped == Skipped(
        str(tmp_path / "more"), Reason.TOO_LARGE, "20,971,521 bytes, at most 20,971,520 are taken"
    )


def test_an_image_that_is_made_smaller_is_sent_with_what_it_was_made_from(photograph: SourceFile) -> None:
    original = Path(photograph.name).read_bytes()
    message = read(photograph, Reading(shrink_to=100, max_bytes=len(original) - 1), ROOM)
    assert isinstance(message, Message), "only what is sent must be small enough"
    with Image.open(BytesIO(message.value)) as image:
        assert image.size == (100, 75)
    headers = dict(message.headers)
    assert headers["imagestream-original-sha256"] == hashlib.sha256(original).hexdigest().encode()
    assert headers["imagestream-original-bytes"] == str(len(original)).encode()
    limit = len(message.value)
    again = read(photograph, Reading(shrink_to=100, max_bytes=limit), ROOM)
    assert isinstance(again, Message)
    assert again.value == message.value
    skipped = read(photograph, Reading(shrink_to=100, max_bytes=limit - 1), ROOM)
    assert skipped == Skipped(photograph.name, Reason.TOO_LARGE, f"{limit:,} bytes, at most {limit - 1:,} are taken")


def test_of_what_is_made_smaller_256_mebibytes_are_read(tmp_path: Path) -> None:
    most, reading = 256 * 1024**2, Reading(shrink_to=100, max_bytes=1000)
    skipped = read(sparse(tmp_path / "more", most + 1), reading, ROOM)
    assert skipped == Skipped(
        str(tmp_path / "more"), Reason.TOO_LARGE, "268,435,457 bytes, at most 268,435,456 are taken"
    )
    skipped = read(sparse(tmp_path / "most", most), reading, ROOM)
    assert isinstance(skipped, Skipped)
    assert skipped.detail == "268,435,456 bytes, at most 1,000 are taken", "it was read, and could not be made smaller"


def test_what_is_not_an_image_by_its_first_bytes_is_left_out_only_where_that_is_asked_for(
    tmp_path: Path, photograph: SourceFile
) -> None:
    text = SourceFile(str(tmp_path / "notes.jpg"), None)
    Path(text.name).write_text("notes about photographs")
    assert isinstance(read(text, Reading(), ROOM), Message)
    skipped = Skipped(text.name, Reason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    assert read(text, Reading(only_images=True), ROOM) == skipped
    assert isinstance(read(photograph, Reading(only_images=True), ROOM), Message)
    assert read(text, Reading(only_images=True, max_bytes=5), ROOM) == skipped, "however large it is"


def test_what_cannot_be_read_is_left_out_with_the_systems_reason(tmp_path: Path) -> None:
    def left_out(name: str) -> Message | Skipped:
        return read(SourceFile(name, None), Reading(), ROOM)

    absent, pipe = str(tmp_path / "absent.jpg"), str(tmp_path / "pipe")
    os.mkfifo(pipe)
    assert left_out(absent) == Skipped(absent, Reason.UNREADABLE, "No such file or directory")
    assert left_out("null\0.jpg") == Skipped("null\0.jpg", Reason.UNREADABLE, "embedded null byte")
    assert left_out(str(tmp_path)) == Skipped(str(tmp_path), Reason.UNREADABLE, "no regular file")
    assert left_out(pipe) == Skipped(pipe, Reason.UNREADABLE, "no regular file")


def test_the_first_bytes_are_enough_to_know_an_image_of_every_format(tmp_path: Path) -> None:
    for image_format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        path = tmp_path / image_format
        Image.new("RGB", (64, 64), "teal").save(path, image_format)
        skipped = read(SourceFile(str(path), None), Reading(only_images=True, max_bytes=20), ROOM)
        assert isinstance(skipped, Skipped)
        assert skipped.reason is Reason.TOO_LARGE, f"{image_format}, of which no more is read than shows what it is"
