"""Frames around images: base64, data URLs, JSON with a field in base64, and what registries put in front of a record.

A message is expected to be an encoded image as it is. One in a frame is quarantined, and its detail names the frame.
Where the stream is told so (`--payload`), the common ones are taken off.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable
from typing import Any

from producer.message import UNKNOWN_CONTENT, content_type
from streaming.errors import UsageError

RAW = "raw"
LOOKED_AT = 4096  # bytes, in which a frame has to show
BASE64 = re.compile(rb"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
DATA_URL = re.compile(rb"\s*data:(image/[a-z+.-]+)?[^,]{0,100};base64,", re.IGNORECASE)
MAX_JSON_BYTES = 32 * 1024**2
MAX_DEPTH = 8  # of fields in fields
REGISTRY_HEADER_BYTES = 5  # a zero, and the number of the schema
MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"WEBP")

Unwrap = Callable[[bytes], bytes]


class FrameError(ValueError):
    """A message is not in the frame that it should be in."""


def checked_payload(text: str) -> str:
    """A payload as the option has it.

    Raises:
        ServiceError: it is not one.
    """
    unwrapping(text)
    return text


def unwrapping(payload: str) -> Unwrap | None:
    """What takes the frame off a message; None for `raw`.

    Args:
        payload: `raw`, `base64`, or `json:FIELD`; a field in a field is `json:OUTER.INNER`.

    Raises:
        ServiceError: it is none of these.
    """
    kind, _, field = payload.partition(":")
    if payload == RAW:
        return None
    if payload == "base64":
        return _from_base64
    if kind == "json" and field:
        return lambda data: _from_json(data, field.split("."))
    raise UsageError(f"--payload: expected raw, base64 or json:FIELD, got {payload!r}")


def _from_base64(data: bytes) -> bytes:
    """Base64 in either alphabet, with or without line breaks and padding, or a data URL."""
    if url := DATA_URL.match(data[:LOOKED_AT]):
        data = data[url.end() :]
    compact = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise FrameError(f"expected base64: {error}") from error


def _from_json(data: bytes, path: list[str]) -> bytes:
    name = ".".join(path)
    found: Any = _parsed(data)
    for one in path:
        found = found.get(one) if isinstance(found, dict) else None
    if not isinstance(found, str):
        raise FrameError(f"expected text in the field {name!r}, got {type(found).__name__}")
    return _from_base64(found.encode())


def _parsed(data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise FrameError(f"expected at most {MAX_JSON_BYTES:,} bytes of JSON, got {len(data):,}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"expected JSON: {str(error)[:80]}") from error


def frame_of(data: bytes) -> str | None:
    """What a message seems to be, and how it would be taken; None where it is no frame that is known."""
    head = data[:LOOKED_AT]
    if DATA_URL.match(head):
        return "a data URL: read it with --payload base64"
    if BASE64.fullmatch(head) and _is_image(head):
        return "an image in base64: read it with --payload base64"
    if len(data) > REGISTRY_HEADER_BYTES and data[0] == 0 and any(one in head for one in MAGICS):
        schema = int.from_bytes(data[1:REGISTRY_HEADER_BYTES], "big")
        return f"a record of schema {schema} of a schema registry (Avro or Protobuf) with an image in it"
    if head.startswith(b"--") and re.search(rb"\ncontent-(type|disposition):", head, re.IGNORECASE):
        return "a multipart body: send its part as the message"
    return _json_frame(data) if head.lstrip()[:1] == b"{" else None


def _json_frame(data: bytes) -> str | None:
    try:
        field = _image_field(_parsed(data), ())
    except FrameError:
        return None
    return f"JSON with an image in base64: read it with --payload json:{field}" if field else "JSON without an image"


def _is_image(text: bytes) -> bool:
    compact = b"".join(text.split())
    try:
        return content_type(_from_base64(compact[: len(compact) // 4 * 4])) != UNKNOWN_CONTENT
    except FrameError:
        return False


def _image_field(value: Any, path: tuple[str, ...]) -> str | None:
    if isinstance(value, str):
        head = value[:LOOKED_AT].encode(errors="replace")
        return ".".join(path) if DATA_URL.match(head) or _is_image(head) else None
    if isinstance(value, dict) and len(path) < MAX_DEPTH:
        return next((found for name, one in value.items() if (found := _image_field(one, (*path, name)))), None)
    return None
