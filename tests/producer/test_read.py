"""What is read of a file, whatever its file system says of it."""

from pathlib import Path

import pytest

from producer.message import Message
from producer.read import Reading, Reason, Skipped, read
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
