"""The message contract between publishers of images and the stream that reads them.

Key: the image id, by default the SHA-256 of the bytes in hex. Value: the encoded image, unchanged. Headers:
CloudEvents 1.0 in binary mode (github.com/cloudevents/spec, bindings/kafka-protocol-binding.md), `label`, the W3C
`traceparent`, and the hash and size of the original if the image was shrunk before sending. Labels are normalised when
written and when read. Only the standard library is imported, because Spark workers import this module.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from producer.class_names import class_name

DEFAULT_TOPIC = "images"
MAX_MESSAGE_BYTES = 20 * 1024 * 1024  # the largest image; see HEADER_MARGIN_BYTES for the broker's limit
HEADER_MARGIN_BYTES = 64 * 1024  # a broker that takes every image takes MAX_MESSAGE_BYTES + this per message
MAX_HEADER_CHARS = 1024  # a longer header value is truncated when it is read

# For topics that imagestream creates: the broker then decompresses batches and rejects those that exceed its limit.
TOPIC_CONFIGURATION = {"compression.type": "uncompressed"}

SPEC_VERSION = "1.0"
EVENT_TYPE = "imagestream.image.published"
UNKNOWN_CONTENT = "application/octet-stream"
SNIFF_BYTES = 18  # number of first bytes that `content_type` reads
MAGIC = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
    b"II+\x00": "image/tiff",  # BigTIFF
    b"MM\x00+": "image/tiff",
}
BRANDS = {  # of image files in the ISO base media file format
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"mif1": "image/heic",
}
BMP_HEADER_SIZES = {bytes([size]) for size in (12, 16, 40, 52, 56, 64, 108, 124)}

HEADER_ID = "ce_id"
HEADER_TYPE = "ce_type"
HEADER_SOURCE = "ce_source"
HEADER_TIME = "ce_time"
HEADER_SPEC_VERSION = "ce_specversion"
HEADER_CONTENT_TYPE = "content-type"
HEADER_LABEL = "label"
HEADER_TRACEPARENT = "traceparent"
HEADER_ORIGINAL_SHA256 = "imagestream-original-sha256"  # in hex
HEADER_ORIGINAL_BYTES = "imagestream-original-bytes"  # in decimal
HEADER_REPLAY_OF = "imagestream-replay-of"  # topic/partition/offset of the message that is replayed
HEADER_TIMESTAMP = "imagestream-timestamp"  # of that message, if the replay cannot carry it as its own


@dataclass(frozen=True, slots=True)
class Message:
    """A message to send."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """The position of an acknowledged message."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class MessageHeaders:
    """The headers of a message; None for a header that is missing or empty."""

    id: str | None = None
    type: str | None = None
    source: str | None = None
    time: str | None = None
    content_type: str | None = None
    label: str | None = None
    traceparent: str | None = None


def content_type(data: bytes) -> str:
    """The media type of an encoded image from its first `SNIFF_BYTES`; `application/octet-stream` for anything else."""
    for magic, media_type in MAGIC.items():
        if data.startswith(magic):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] in BRANDS:
        return BRANDS[data[8:12]]
    # "BM" alone also starts texts; a bitmap's second header has one of a few sizes.
    if data[:2] == b"BM" and data[14:15] in BMP_HEADER_SIZES and data[15:18] == b"\x00" * 3:
        return "image/bmp"
    return UNKNOWN_CONTENT


def build_message(
    data: bytes,
    source: str,
    *,
    label: str | None = None,
    image_id: str | None = None,
    time: datetime | None = None,
    traceparent: str | None = None,
    original: bytes | None = None,
) -> Message:
    """Build the message for one encoded image.

    Args:
        data: the encoded image, which becomes the value unchanged.
        source: the origin of the image, for a file its name as given; it becomes the column `source`.
        label: the true class, if known.
        image_id: the key; default: the SHA-256 of `data` in hex.
        time: the time of publication, with a time zone; default: now.
        traceparent: the W3C trace context to propagate.
        original: the image that `data` was shrunk from, if any; its hash and size become headers.
    """
    key = image_id or hashlib.sha256(data).hexdigest()
    at = (time or datetime.now(UTC)).astimezone(UTC)
    headers = {
        HEADER_SPEC_VERSION: SPEC_VERSION,
        HEADER_TYPE: EVENT_TYPE,
        HEADER_ID: key,
        HEADER_SOURCE: source,
        HEADER_TIME: at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        HEADER_CONTENT_TYPE: content_type(data),
        HEADER_LABEL: class_name(label),
        HEADER_TRACEPARENT: traceparent,
        HEADER_ORIGINAL_SHA256: hashlib.sha256(original).hexdigest() if original else None,
        HEADER_ORIGINAL_BYTES: str(len(original)) if original else None,
    }
    return Message(_encoded(key), data, [(name, _encoded(text)) for name, text in headers.items() if text])


def read_headers(headers: Iterable[tuple[str, bytes | None] | Mapping[str, Any]] | None) -> MessageHeaders:
    """Parse the headers of any message, including hostile ones; never raises for their contents.

    Invalid UTF-8 becomes U+FFFD, values are truncated to MAX_HEADER_CHARS characters, and of several headers with one
    name the last wins.

    Args:
        headers: (name, value) pairs, or `{"key": name, "value": value}` as Spark's Kafka source provides them.
    """
    texts: dict[str, str | None] = {}
    for header in headers or ():
        name, value = (header.get("key"), header.get("value")) if isinstance(header, Mapping) else header
        if name is not None:
            texts[name] = _decoded(value)
    return MessageHeaders(
        id=texts.get(HEADER_ID),
        type=texts.get(HEADER_TYPE),
        source=texts.get(HEADER_SOURCE),
        time=texts.get(HEADER_TIME),
        content_type=texts.get(HEADER_CONTENT_TYPE),
        label=class_name(texts.get(HEADER_LABEL)),
        traceparent=texts.get(HEADER_TRACEPARENT),
    )


def _encoded(text: str) -> bytes:
    # A file name need not be UTF-8: Python represents such bytes as surrogates, which this restores.
    return text.encode("utf-8", "surrogateescape")


def _decoded(value: bytes | None) -> str | None:
    # A character takes at most four bytes: no more is decoded than can be kept.
    return bytes(value[: 4 * MAX_HEADER_CHARS]).decode("utf-8", "replace")[:MAX_HEADER_CHARS] or None if value else None
