"""The message contract: writing messages, and reading headers, including hostile ones."""

import hashlib
import io
import subprocess
import sys
import unicodedata
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from producer.message import MAX_HEADER_CHARS, MessageHeaders, build_message, content_type, read_headers

NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)
MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "WEBP": "image/webp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
}


def encoded(image_format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(stream, image_format)
    return stream.getvalue()


def test_message_has_the_unchanged_bytes_and_their_sha256_as_key() -> None:
    data = encoded("PNG")
    message = build_message(data, "photos/a.png")
    assert message.value == data
    assert message.key == hashlib.sha256(data).hexdigest().encode()


def test_headers_are_cloudevents_in_binary_mode() -> None:
    at = datetime(2024, 5, 6, 14, 8, 9, 123456, tzinfo=timezone(timedelta(hours=2)))
    message = build_message(
        encoded("JPEG"), "a.jpg", label="cat", image_id="id-1", time=at, traceparent="00-4bf92f35-00f067aa-01"
    )
    assert message.key == b"id-1"
    assert dict(message.headers) == {
        "ce_specversion": b"1.0",
        "ce_type": b"imagestream.image.published",
        "ce_id": b"id-1",
        "ce_source": b"a.jpg",
        "ce_time": b"2024-05-06T12:08:09.123Z",
        "content-type": b"image/jpeg",
        "label": b"cat",
        "traceparent": b"00-4bf92f35-00f067aa-01",
    }


def test_default_time_is_now_and_default_label_is_none() -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    headers = read_headers(build_message(b"x", "x").headers)
    assert headers.label is None
    assert headers.traceparent is None
    assert headers.time is not None
    assert before < datetime.fromisoformat(headers.time) < datetime.now(UTC) + timedelta(seconds=1)


@pytest.mark.parametrize("image_format", MEDIA_TYPES)
def test_content_type_comes_from_the_first_bytes(image_format: str) -> None:
    assert content_type(encoded(image_format)) == MEDIA_TYPES[image_format]


@pytest.mark.parametrize(
    "data", [b"", b"BM", b"BMW is a maker of cars, not a bitmap", b"RIFF\x00\x00\x00\x00WAVE", b"%PDF-1.7", b"GIF88a"]
)
def test_content_type_of_unknown_bytes_is_octet_stream(data: bytes) -> None:
    assert content_type(data) == "application/octet-stream"


@given(source=st.text(min_size=1, max_size=200), label=st.text(min_size=1, max_size=200))
def test_source_and_label_round_trip(source: str, label: str) -> None:
    headers = read_headers(build_message(b"x", source, label=label).headers)
    assert headers.source == source
    assert headers.label == (" ".join(unicodedata.normalize("NFC", label).split()) or None)


def test_labels_are_normalised() -> None:
    for written in ("Pe\u0302che", "P\u00eache", " P\u00eache ", "Pe\u0302che\n"):
        assert read_headers([("label", written.encode())]).label == "P\u00eache"
        assert dict(build_message(b"x", "a", label=written).headers)["label"] == "P\u00eache".encode()
    for text in ("NA", "None", "nan", "007", "7.0", "<b>7</b>", "[red]"):
        assert read_headers([("label", text.encode())]).label == text


def test_source_that_is_not_utf8_keeps_its_bytes() -> None:
    name = b"caf\xe9.jpg"  # Latin-1: file names may be arbitrary bytes
    message = build_message(b"x", name.decode("utf-8", "surrogateescape"))
    assert dict(message.headers)["ce_source"] == name
    assert read_headers(message.headers).source == "caf�.jpg"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["label", "ce_source", "ce_time", "ce_id", "x", ""]), st.none() | st.binary(max_size=9000)
        )
    )
)
def test_hostile_headers_raise_no_error(headers: list[tuple[str, bytes | None]]) -> None:
    rows = [{"key": name, "value": value} for name, value in headers]
    read = read_headers(headers)
    assert read == read_headers(rows)
    for text in (read.label, read.source, read.time, read.id):
        assert text is None or 0 < len(text) <= MAX_HEADER_CHARS


def test_last_of_duplicate_headers_wins_and_long_ones_are_truncated() -> None:
    read = read_headers([("label", b"first"), ("label", b"last"), ("ce_source", "é".encode() * 5000)])
    assert read.label == "last"
    assert read.source == "é" * MAX_HEADER_CHARS


def test_missing_and_empty_headers_are_none() -> None:
    assert (
        read_headers(None) == read_headers([]) == read_headers([("label", b""), ("label2", b"x")]) == MessageHeaders()
    )


def test_importing_the_message_module_does_not_load_kafka() -> None:
    script = "import sys, producer.message; sys.exit('kafka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"GIF87a", "image/gif"),
        (b"GIF89a", "image/gif"),
        (b"II*\0", "image/tiff"),
        (b"MM\0*", "image/tiff"),
        (b"II+\0", "image/tiff"),
        (b"MM\0+", "image/tiff"),
        (b"RIFF\x1a\0\0\0WEBP", "image/webp"),
        (b"\0\0\0\x1cftypheic", "image/heic"),
        *((b"BM" + bytes(12) + bytes([size, 0, 0, 0]), "image/bmp") for size in (12, 16, 40, 52, 56, 64, 108, 124)),
    ],
)
def test_complete_signature_is_sufficient(data: bytes, media_type: str) -> None:
    unknown = "application/octet-stream"
    assert content_type(data) == content_type(data + b"more") == media_type
    assert content_type(data[:-1]) == unknown
    assert content_type(b" " + data) == unknown


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF\x1a\0\0\0WAVE",
        b"RIFX\x1a\0\0\0WEBP",
        b"RIFF\x1a\0\0\0 WEBP",
        *(b"BM" + bytes(12) + header for header in (b"\x28\0\0\x01", b"\x28\x01\0\0", b"\x29\0\0\0", b"\0\0\0\0")),
        b"BN" + bytes(12) + b"\x28\0\0\0",
        b"BM" + bytes(11) + b"\x28\0\0\0\0",
        b"BM" + bytes(13) + b"\x28\0\0\0",
    ],
)
def test_incomplete_or_altered_signature_is_not_recognised(data: bytes) -> None:
    assert content_type(data) == "application/octet-stream"


def test_hash_and_size_of_the_original_become_headers() -> None:
    headers = dict(build_message(b"small", "a.jpg", original=b"original").headers)
    assert headers["imagestream-original-sha256"] == hashlib.sha256(b"original").hexdigest().encode()
    assert headers["imagestream-original-bytes"] == b"8"
    assert not [name for name, _ in build_message(b"small", "a.jpg").headers if name.startswith("imagestream")]


def test_every_header_is_read_back() -> None:
    sent = build_message(encoded("PNG"), "a.png", label="cat", image_id="id-1", time=NOON, traceparent="00-4b-00-01")
    expected = MessageHeaders(
        id="id-1",
        type="imagestream.image.published",
        source="a.png",
        time="2024-05-06T12:00:00.000Z",
        content_type="image/png",
        label="cat",
        traceparent="00-4b-00-01",
    )
    assert read_headers(sent.headers) == expected
    assert read_headers([{"key": name, "value": value} for name, value in sent.headers]) == expected


@pytest.mark.parametrize("character", ["a", "é", "€", "𝄞"], ids=["1 byte", "2 bytes", "3 bytes", "4 bytes"])
def test_headers_are_truncated_after_1024_characters(character: str) -> None:
    for count in (1023, 1024, 1025):
        value = (character * count).encode()
        assert read_headers([("label", value)]).label == character * min(count, 1024)


def test_header_without_a_name_or_value_does_not_hide_others() -> None:
    headers = [{"value": b"x"}, {"key": None, "value": b"x"}, {"key": "ce_source"}, {"key": "label", "value": b"cat"}]
    assert read_headers(headers) == MessageHeaders(label="cat")
    assert read_headers([("label", b"cat"), ("label", None)]).label is None, "the last header wins"
