"""Envelopes around images: base64, data URLs, JSON with a base64 field, and Avro records with a field.

By default, a message is expected to be an encoded image. An image in an envelope is quarantined, and the detail names
the envelope. With `--payload`, the stream removes it.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from producer.message import UNKNOWN_CONTENT, content_type
from streaming.errors import UsageError
from streaming.pipeline.avro import HEADER_BYTES, RecordError, Schema, records_of_file, records_of_registry
from streaming.platform.schema_registry import MAX_SCHEMA_BYTES

SNIFFED_BYTES = 4096  # at the start of a message, from which an envelope is recognised
BASE64 = re.compile(rb"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
DATA_URL = re.compile(rb"\s*data:(image/[a-z+.-]+)?[^,]{0,100};base64,", re.IGNORECASE)
MAX_JSON_BYTES = 32 * 1024**2
MAX_DEPTH = 8  # of nested fields
MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"WEBP")

Unwrap = Callable[[bytes], bytes]


class FrameError(ValueError):
    """A message is not in the expected envelope."""


@dataclass(frozen=True)
class Payload:
    """The envelope around each image.

    Attributes:
        frame: `raw`, `base64`, `json:FIELD` or `avro:FIELD`; a nested field is `OUTER.INNER`.
        schema: of Avro records, as JSON; None if their header names one of the registry's.
        registry: URL of a schema registry.
    """

    frame: str = "raw"
    schema: str | None = None
    registry: str | None = None


RAW = Payload()


def chosen_payload(frame: str, schema_file: Path | None = None, registry: str | None = None) -> Payload:
    """The payload that the options describe.

    Args:
        frame: see `Payload.frame`.
        schema_file: with an Avro schema in JSON.
        registry: URL of a schema registry.

    Raises:
        ServiceError: the frame is unknown, or the schema is missing, cannot be read or lacks the field.
    """
    kind, _, field = frame.partition(":")
    if frame not in {"raw", "base64"} and not (kind in {"json", "avro"} and field):
        raise UsageError(f"--payload: expected raw, base64, json:FIELD or avro:FIELD, got {frame!r}")
    if kind != "avro":
        if schema_file:
            raise UsageError(f"--payload-schema: expected with --payload avro:FIELD only, got --payload {frame}")
        return Payload(frame)
    if schema_file:
        return Payload(frame, schema=_schema_text(schema_file, field.split(".")[0]))
    if not registry:
        raise UsageError(
            f"--payload {frame}: expected a schema: add --payload-schema FILE, or set IMAGESTREAM_SCHEMA_REGISTRY to "
            "the URL of a schema registry"
        )
    return Payload(frame, registry=registry)


def _schema_text(file: Path, field: str) -> str:
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_SCHEMA_BYTES + 1).decode()
        fields = Schema(text).fields
    except (OSError, ValueError) as error:
        raise UsageError(f"--payload-schema {file}: {error}") from error
    if field not in fields:
        raise UsageError(
            f"--payload-schema {file}: expected a record with the field {field!r}, got one with {', '.join(fields)}"
        )
    return text


@lru_cache(8)
def unwrapper(payload: Payload) -> Unwrap | None:
    """The function that removes the envelope of a message; None for `raw`.

    It is cached, so that a worker keeps the schemas that it has fetched.

    Raises:
        FrameError: by the function, if a message is not in the envelope.
    """
    kind, _, field = payload.frame.partition(":")
    path = field.split(".")
    if kind == "base64":
        return _from_base64
    if kind == "json":
        return lambda data: _image_at(path, _parsed(data))
    if kind == "avro":
        read = records_of_file(payload.schema) if payload.schema else records_of_registry(str(payload.registry))
        return lambda data: _from_avro(path, read, data)
    return None


def _from_base64(data: bytes) -> bytes:
    """Decode a data URL, or base64 in either alphabet, with or without line breaks and padding."""
    if url := DATA_URL.match(data[:SNIFFED_BYTES]):
        data = data[url.end() :]
    compact = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise FrameError(f"expected base64: {error}") from error


def _from_avro(path: list[str], read: Callable[[bytes], Any], data: bytes) -> bytes:
    try:
        return _image_at(path, read(data))
    except RecordError as error:
        raise FrameError(str(error)) from error


def _image_at(path: list[str], found: Any) -> bytes:
    """The image in a field that holds bytes, or text in base64."""
    for one in path:
        found = found.get(one) if isinstance(found, dict) else None
    if isinstance(found, bytes):
        return found
    if isinstance(found, str):
        return _from_base64(found.encode())
    raise FrameError(f"expected an image in the field {'.'.join(path)!r}, got {type(found).__name__}")


def _parsed(data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise FrameError(f"expected at most {MAX_JSON_BYTES:,} bytes of JSON, got {len(data):,}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"expected JSON: {str(error)[:80]}") from error


def frame_of(data: bytes) -> str | None:
    """The envelope that a message seems to have, and the option that reads it; None if it is not a known one."""
    head = data[:SNIFFED_BYTES]
    if DATA_URL.match(head):
        return "a data URL: read it with --payload base64"
    if BASE64.fullmatch(head) and _is_image(head):
        return "an image in base64: read it with --payload base64"
    if len(data) > HEADER_BYTES and data[0] == 0 and any(one in head for one in MAGICS):
        schema = int.from_bytes(data[1:HEADER_BYTES], "big")
        return (
            f"a record with an image, of schema {schema} of a schema registry: read it with --payload avro:FIELD if it "
            "is Avro"
        )
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
        head = value[:SNIFFED_BYTES].encode(errors="replace")
        return ".".join(path) if DATA_URL.match(head) or _is_image(head) else None
    if isinstance(value, dict) and len(path) < MAX_DEPTH:
        return next((found for name, one in value.items() if (found := _image_field(one, (*path, name)))), None)
    return None
