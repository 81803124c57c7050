"""Reads the body of an upload, raw or multipart, up to the size limit of an image."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from producer.class_names import CONTROL_CHARACTER, MAX_LABEL_CHARS, class_name
from producer.message import MAX_HEADER_CHARS, UNKNOWN_CONTENT, content_type
from streaming.gateway.problems import RETRY_AFTER_S, too_many

ENVELOPE_BYTES = 64 * 1024  # allowed for multipart in addition to the images
MAX_SOURCE_CHARS = MAX_HEADER_CHARS
MAX_BATCH_IMAGES = 100
MAX_BATCH_BYTES = 64 * 1024 * 1024  # of all images in one request
UPLOAD_TIMEOUT_S = 60.0  # for the whole body
MEMORY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Upload:
    """An encoded image, with its label and file name, if given."""

    data: bytes
    label: str | None = None
    name: str | None = None


class MemoryBudget:
    """Limits the total size of uploads in memory; further uploads wait in order of arrival."""

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Reserve `size` bytes, at most the limit; 429 if they do not become available within ten seconds."""
        try:
            async with asyncio.timeout(MEMORY_TIMEOUT_S), self._changed:
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


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """The limits of an upload.

    Attributes:
        image_bytes: the maximum size of an image.
        images: the maximum number of images.
    """

    image_bytes: int
    images: int = 1

    @property
    def body_bytes(self) -> int:
        """The maximum size of a body, including multipart."""
        several = MAX_BATCH_BYTES if self.images > 1 else 0
        return max(self.image_bytes, several) + ENVELOPE_BYTES

    def too_large(self) -> HTTPException:
        """A 413 response with the limits."""
        total = f", {self.body_bytes - ENVELOPE_BYTES:,} bytes in total" if self.images > 1 else ""
        return HTTPException(413, f"the upload is too large: at most {self.image_bytes:,} bytes per image{total}")


def declared_size(request: Request, limits: UploadLimits) -> int:
    """The declared size of the body in bytes, or the maximum if there is none, as with chunked encoding.

    Raises:
        HTTPException: 413 if the declared size exceeds the limit.
    """
    chunked = "transfer-encoding" in request.headers  # it overrides Content-Length
    declared = "" if chunked else request.headers.get("content-length", "")
    size = int(declared) if declared.isascii() and declared.isdecimal() else limits.body_bytes
    if size > limits.body_bytes:
        raise limits.too_large()
    return size


async def read_uploads(request: Request, limits: UploadLimits) -> list[Upload]:
    """The images in the body of a request, at least one.

    Raises:
        HTTPException: 400 if the body cannot be read, 408 if it takes too long, 413 if it is too large, 415 if it is
            not an image, 422 if a field is missing or invalid.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    multipart = media_type == "multipart/form-data"
    raw = limits.images == 1 and (media_type.startswith("image/") or media_type == UNKNOWN_CONTENT)
    if not (multipart or raw):
        alone = ", or the image itself with Content-Type: image/…" if limits.images == 1 else ""
        raise HTTPException(415, f"expected multipart/form-data with the field file{alone}")
    async with _in_time():
        uploads = await (_read_multipart if multipart else _read_raw)(request, limits)
    for upload in uploads:
        _check_image(upload, limits)
    return uploads


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """Raise 408 if the body takes too long, and 400 if it ends early."""
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took longer than {UPLOAD_TIMEOUT_S:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload was interrupted") from error


def _check_image(upload: Upload, limits: UploadLimits) -> None:
    which = f"{upload.name[:50]!r}: " if upload.name and limits.images > 1 else ""
    if not upload.data:
        raise HTTPException(400, f"{which}the upload is empty: expected an encoded image")
    if len(upload.data) > limits.image_bytes:
        raise limits.too_large()
    if content_type(upload.data) == UNKNOWN_CONTENT:
        raise HTTPException(
            415, f"{which}expected an image (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC), got an unknown format"
        )


async def _read_raw(request: Request, limits: UploadLimits) -> list[Upload]:
    return [Upload(await _read_all(request, limits.image_bytes, limits.too_large))]


async def read_json(request: Request, max_bytes: int) -> bytes:
    """The unparsed body of a JSON request; raises the errors of `read_uploads`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected a body of Content-Type: application/json")
    refusal = HTTPException(413, f"the body is too large: at most {max_bytes:,} bytes are accepted")
    async with _in_time():
        return await _read_all(request, max_bytes, lambda: refusal)


async def _read_all(request: Request, limit: int, refusal: Callable[[], HTTPException]) -> bytes:
    data = bytearray()
    async for chunk in _bounded(request, limit, refusal):
        data += chunk
    return bytes(data)


async def _read_multipart(request: Request, limits: UploadLimits) -> list[Upload]:
    stream = _bounded(request, limits.body_bytes, limits.too_large)
    parser = MultiPartParser(
        request.headers, stream, max_files=limits.images, max_fields=4, max_part_size=ENVELOPE_BYTES
    )
    parser.spool_max_size = limits.body_bytes  # in memory, which has been reserved, and never on disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:  # KeyError: there is no boundary
        why = getattr(error, "message", "missing or invalid boundary")
        raise HTTPException(400, f"the multipart body cannot be read: {why}") from error
    try:
        label = form.get("label")
        if isinstance(label, UploadFile):
            raise HTTPException(422, "expected text in the field label of the form, got a file")
        files = [one for one in form.getlist("file") if isinstance(one, UploadFile)]
        if not files:
            raise HTTPException(422, "expected a file in the field file of the form, got none")
        uploads = []
        for file in files:
            uploads.append(Upload(await file.read(), label, file.filename))
            await file.close()  # so that not all images are in memory twice
        return uploads
    finally:
        await form.close()


async def _bounded(request: Request, limit: int, refusal: Callable[[], HTTPException]) -> AsyncGenerator[bytes, None]:
    """The chunks of a body; raises if their total size exceeds the limit, regardless of the declared size."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise refusal()
        yield chunk


def check_label(label: str | None) -> str | None:
    """The normalised label, None if there is none; 422 if it is invalid."""
    return class_name(_printable("label", label, MAX_LABEL_CHARS))


def check_source(source: str | None) -> str | None:
    """The source of an image, None if there is none; 422 if it is invalid."""
    return _printable("source", source, MAX_SOURCE_CHARS)


def _printable(what: str, text: str | None, max_chars: int) -> str | None:
    if text and (len(text) > max_chars or CONTROL_CHARACTER.search(text)):
        raise HTTPException(422, f"{what}: expected 1 to {max_chars} printable characters, got {text[:50]!r}")
    return text or None
