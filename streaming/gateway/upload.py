"""The body of an upload, raw or multipart; no more of it is read than an image may have."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from producer.class_names import class_name
from producer.message import MAX_HEADER_CHARS, UNKNOWN_CONTENT, content_type
from streaming.gateway.problems import RETRY_AFTER_S, too_many

ENVELOPE_BYTES = 64 * 1024  # what multipart may add to the image
MAX_LABEL_CHARS = 200
MAX_SOURCE_CHARS = MAX_HEADER_CHARS
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
UPLOAD_TIMEOUT_S = 60.0  # for the whole body
ROOM_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Upload:
    """An encoded image, with the label and the file name that came with it, if any did."""

    data: bytes
    label: str | None = None
    name: str | None = None


class Room:
    """How many bytes of uploads may be in memory at once; who finds no room waits, first come first served."""

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Hold room for `size` bytes, at most the limit; 429 if there is none in ten seconds."""
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S), self._changed:
                await self._changed.wait_for(lambda: self._free >= size)
                self._free -= size
        except TimeoutError as error:
            raise too_many("too many uploads at once: try again", RETRY_AFTER_S) from error
        try:
            yield
        finally:
            async with self._changed:
                self._free += size
                self._changed.notify_all()


def declared_size(request: Request, max_bytes: int) -> int:
    """How many bytes the body may have: what it declares, or else, as in chunks, the most that is taken.

    Raises 413 if it declares more than an upload may have.
    """
    most = max_bytes + ENVELOPE_BYTES
    chunked = "transfer-encoding" in request.headers  # whatever is declared beside it
    declared = "" if chunked else request.headers.get("content-length", "")
    size = int(declared) if declared.isascii() and declared.isdecimal() else most
    if size > most:
        raise _too_large(max_bytes)
    return size


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """The image in the body of a request.

    Raises HTTPException: 400 for a body that cannot be read, 408 for one that does not come, 413 for one that is too
    large, 415 for one that is no image, 422 for a label that is none.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    multipart = media_type == "multipart/form-data"
    if not (multipart or media_type.startswith("image/") or media_type == UNKNOWN_CONTENT):
        raise HTTPException(
            415, "expected multipart/form-data with the field file, or the image itself with Content-Type: image/…"
        )
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            upload = await (_read_multipart if multipart else _read_raw)(request, max_bytes)
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took longer than {UPLOAD_TIMEOUT_S:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload was broken off") from error
    if not upload.data:
        raise HTTPException(400, "the upload is empty: expected an encoded image")
    if len(upload.data) > max_bytes:
        raise _too_large(max_bytes)
    if content_type(upload.data) == UNKNOWN_CONTENT:
        raise HTTPException(415, "expected an image (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC), got something else")
    return upload


async def _read_raw(request: Request, max_bytes: int) -> Upload:
    data = bytearray()
    async for chunk in _bounded(request, max_bytes, lambda: _too_large(max_bytes)):
        data += chunk
    return Upload(bytes(data))


async def _read_multipart(request: Request, max_bytes: int) -> Upload:
    stream = _bounded(request, max_bytes + ENVELOPE_BYTES, lambda: _too_large(max_bytes))
    parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=4, max_part_size=ENVELOPE_BYTES)
    parser.spool_max_size = max_bytes + ENVELOPE_BYTES  # in memory, whose room is taken already, and never on disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:  # KeyError: no boundary is given
        why = getattr(error, "message", "no boundary, or one that is none")
        raise HTTPException(400, f"the multipart body cannot be read: {why}") from error
    try:
        file, label = form.get("file"), form.get("label")
        if not isinstance(file, UploadFile):
            raise HTTPException(422, "expected a file in the field file of the form, got none")
        if isinstance(label, UploadFile):
            raise HTTPException(422, "expected text in the field label of the form, got a file")
        return Upload(await file.read(), label, file.filename)
    finally:
        await form.close()


async def _bounded(request: Request, limit: int, refusal: Callable[[], HTTPException]) -> AsyncGenerator[bytes, None]:
    """The chunks of a body, whatever it declared, until they are more than the limit."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise refusal()
        yield chunk


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the image is too large: at most {max_bytes:,} bytes are taken")


def check_label(label: str | None) -> str | None:
    """The label in its common form, or None for none; 422 if it cannot be one."""
    return class_name(_printable("label", label, MAX_LABEL_CHARS))


def check_source(source: str | None) -> str | None:
    """The source of an image, or None for none; 422 if it cannot be one."""
    return _printable("source", source, MAX_SOURCE_CHARS)


def _printable(what: str, text: str | None, max_chars: int) -> str | None:
    if text and (len(text) > max_chars or CONTROL_CHARACTER.search(text)):
        raise HTTPException(422, f"{what}: expected 1 to {max_chars} printable characters, got {text[:50]!r}")
    return text or None
