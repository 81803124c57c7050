"""A file becomes a message, or a name and a reason why not; no more of it is read than may be sent."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from producer.message import (
    HEADER_MARGIN_BYTES,
    MAX_MESSAGE_BYTES,
    SNIFF_BYTES,
    UNKNOWN_CONTENT,
    Message,
    build_message,
    content_type,
)
from producer.sender import message_bytes
from producer.sources import SourceFile

if TYPE_CHECKING:
    from models.bad_image import Limits

MAX_ORIGINAL_BYTES = 256 * 1024 * 1024  # of an image that is made smaller


Fetch = Callable[[str, int], bytes]  # (URI, n) → the first n bytes, or all; an OSError if it cannot be read


class Reason(StrEnum):
    """Why a file was not sent."""

    TOO_LARGE = "too large"
    UNREADABLE = "unreadable"
    NOT_AN_IMAGE = "not an image"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out before it was sent; `wanted` where an option asked for leaving it out."""

    path: str
    reason: Reason
    detail: str
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What is made of each file.

    Attributes:
        only_images: leave out what is no image by its first bytes.
        skip_too_large: count a file that is too large as left out on purpose.
        max_bytes: the largest image to send.
        shrink_to: the longest side in pixels; larger images are made smaller before they are sent.
        limits: what may be decoded for that, and what it may cost; default: `models.bad_image.DEFAULT_LIMITS`.
        fetch: reads what is not a local file, of which the name is a URI.
    """

    only_images: bool = False
    skip_too_large: bool = False
    max_bytes: int = MAX_MESSAGE_BYTES
    shrink_to: int | None = None
    limits: "Limits | None" = None
    fetch: Fetch | None = None


def read(file: SourceFile, reading: Reading, max_message_bytes: int) -> Message | Skipped:
    """The message for a file, or why there is none.

    Args:
        max_message_bytes: the largest message that the topic takes, headers included.
    """
    max_bytes = min(reading.max_bytes, max_message_bytes)
    found = _content(file.name, MAX_ORIGINAL_BYTES if reading.shrink_to else max_bytes, reading)
    if isinstance(found, Skipped):
        return found
    data = found
    if reading.shrink_to:
        from models.shrink import shrink  # Pillow, which workers that read the contract need not load

        limits = {} if reading.limits is None else {"limits": reading.limits}
        data = shrink(found, reading.shrink_to, **limits)
    if len(data) > max_bytes:
        return _too_large(file.name, f"{len(data):,} bytes, at most {max_bytes:,} are taken", reading)
    message = build_message(data, file.name, label=file.label, original=None if data is found else found)
    # To measure a message costs more than to make one; its headers are short enough to be asked only near the limit.
    if len(data) + HEADER_MARGIN_BYTES > max_message_bytes and (size := message_bytes(message)) > max_message_bytes:
        detail = f"{size:,} bytes with its headers, the topic takes {max_message_bytes:,}"
        return _too_large(file.name, detail, reading)
    return message


def _content(name: str, max_bytes: int, reading: Reading) -> bytes | Skipped:
    if reading.fetch is not None and "://" in name:
        return _fetched(name, max_bytes, reading, reading.fetch)
    try:
        found = os.stat(name)  # noqa: PTH116  the name as it was given
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for a writer
            return Skipped(name, Reason.UNREADABLE, "no regular file")
        size = found.st_size
        # Unbuffered: for files of kilobytes every call counts, and each lets the sending thread in.
        with open(name, "rb", buffering=0) as stream:  # noqa: PTH123
            data = stream.read(SNIFF_BYTES if size > max_bytes else size + 1) or b""
            # Once is enough, unless the file is being written to or its file system gives less than was asked for.
            while size <= max_bytes and len(data) != size and (more := stream.read(max_bytes + 1 - len(data))):
                data += more
            if reading.only_images and content_type(data[:SNIFF_BYTES]) == UNKNOWN_CONTENT:
                return Skipped(name, Reason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return Skipped(name, Reason.UNREADABLE, getattr(error, "strerror", None) or str(error))
    if (size := max(size, len(data))) > max_bytes:
        return _too_large(name, f"{size:,} bytes, at most {max_bytes:,} are taken", reading)
    return data


def _fetched(name: str, max_bytes: int, reading: Reading, fetch: Fetch) -> bytes | Skipped:
    try:
        data = fetch(name, max_bytes + 1)
    except OSError as error:
        return Skipped(name, Reason.UNREADABLE, error.strerror or str(error))
    if reading.only_images and content_type(data[:SNIFF_BYTES]) == UNKNOWN_CONTENT:
        return Skipped(name, Reason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    if len(data) > max_bytes:
        return _too_large(name, f"more than the {max_bytes:,} bytes that are taken", reading)
    return data


def _too_large(name: str, detail: str, reading: Reading) -> Skipped:
    return Skipped(name, Reason.TOO_LARGE, detail, wanted=reading.skip_too_large)
