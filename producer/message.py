"""The message on the topic: the one contract between whoever publishes images and the stream that reads them.

Key: the image id, by default the SHA-256 of the bytes in hex. Value: the encoded image, untouched. Headers:
CloudEvents 1.0 in binary mode (github.com/cloudevents/spec, bindings/kafka-protocol-binding.md), our own `label`, the
W3C `traceparent`, and two that describe the original where an image was made smaller before it was sent. A label is in
the common form of class names, whoever wrote it. Only the standard library is imported: Spark workers import this too.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from producer.class_names import class_name

DEFAULT_TOPIC = "images"
MAX_MESSAGE_BYTES = 20 * 1024 * 1024  # the largest image; see HEADER_MARGIN_BYTES for what the broker must take
HEADER_MARGIN_BYTES = 64 * 1024  # a broker that takes every image takes MAX_MESSAGE_BYTES + this per message
MAX_HEADER_CHARS = 1024  # a longer header value is cut when it is read

# Of the topics that we create: brokers unpack batches then, and refuse those that are larger than a batch may be.
TOPIC_CONFIGURATION = {"compression.type": "uncompressed"}

SPEC_VERSION = "1.0"
EVENT_TYPE = "imagestream.image.published"
UNKNOWN_CONTENT = "application/octet-stream"
SNIFF_BYTES = 18  # as many first bytes as `content_type` looks at
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
BRANDS = {  # of ISO base media files that hold an image
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
HEADER_REPLAY_OF = "imagestream-replay-of"  # topic/partition/offset of the message that is sent again
HEADER_TIMESTAMP = "imagestream-timestamp"  # of that message, where it cannot be sent again with it


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it goes to the broker."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where the broker put a message that it acknowledged."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class MessageHeaders:
    """What the headers of a message say; None where a header is missing or empty."""

    id: str | None = None
    type: str | None = None
    source: str | None = None
    time: str | None = None
    content_type: str | None = None
    label: str | None = None
    traceparent: str | None = None


def content_type(data: bytes) -> str:
    """The media type of an encoded image by its first bytes; `application/octet-stream` for anything else."""
    for magic, media_type in MAGIC.items():
        if data.startswith(magic):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] in BRANDS:
        return BRANDS[data[8:12]]
    # "BM" alone begins many a text: a bitmap goes on with the size of its second header, one of a few.
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
    """The message for one encoded image.

    Args:
        data: the bytes of the image, which become the value as they are.
        source: where the image comes from, for a file its name as it was given; it becomes the column `source`.
        label: the true class, where it is known.
        image_id: the key; default: the SHA-256 of `data` in hex.
        time: when the image came to be published, with a time zone; default: now.
        traceparent: the W3C trace context to pass on.
        original: what `data` was made from, where it is not sent as it was; its hash and size become headers.
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
    """What the headers of any message say, be they ours or hostile; never raises for what they hold.

    Invalid UTF-8 becomes U+FFFD, a value is cut after MAX_HEADER_CHARS characters, and the last of several headers of
    one name wins.

    Args:
        headers: (name, value) pairs, or `{"key": name, "value": value}` as Spark's Kafka source gives them.
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
    # A file's name need not be UTF-8: Python carries its bytes as surrogates, and so they come back as they were.
    return text.encode("utf-8", "surrogateescape")


def _decoded(value: bytes | None) -> str | None:
    # A character takes at most four bytes: nothing beyond what may be kept is decoded.
    return bytes(value[: 4 * MAX_HEADER_CHARS]).decode("utf-8", "replace")[:MAX_HEADER_CHARS] or None if value else None
