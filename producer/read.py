"""Reading a file into a message, or the reason for skipping it; no more is read than may be sent."""

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

MAX_ORIGINAL_BYTES = 256 * 1024 * 1024  # of an image to shrink

Fetch = Callable[[str, int], bytes]  # (URI, n) → up to n bytes; raises OSError if the object cannot be read


class SkipReason(StrEnum):
    """The reason a file was not sent."""

    TOO_LARGE = "too large"
    UNREADABLE = "unreadable"
    NOT_AN_IMAGE = "not an image"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not sent; `wanted` if an option asked for it to be skipped."""

    path: str
    reason: SkipReason
    detail: str
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    Attributes:
        only_images: skip files that are not images by their first bytes.
        skip_too_large: count a file that is too large as skipped on purpose.
        max_bytes: the largest image to send, in bytes.
        shrink_to: the longest side in pixels; larger images are shrunk to it.
        limits: bounds on decoding images to shrink; default: `models.bad_image.DEFAULT_LIMITS`.
        fetch: reads the files whose names are URIs.
    """

    only_images: bool = False
    skip_too_large: bool = False
    max_bytes: int = MAX_MESSAGE_BYTES
    shrink_to: int | None = None
    limits: "Limits | None" = None
    fetch: Fetch | None = None


def read(file: SourceFile, options: ReadOptions, max_message_bytes: int) -> Message | Skipped:
    """Read a file into a message, or return why it was skipped.

    Args:
        max_message_bytes: the largest message that the topic accepts, headers included.
    """
    max_bytes = min(options.max_bytes, max_message_bytes)
    found = _content(file.name, MAX_ORIGINAL_BYTES if options.shrink_to else max_bytes, options)
    if isinstance(found, Skipped):
        return found
    data = found
    if options.shrink_to:
        from models.shrink import shrink  # imports Pillow

        limits = {} if options.limits is None else {"limits": options.limits}
        data = shrink(found, options.shrink_to, **limits)
    if len(data) > max_bytes:
        return _too_large(file.name, f"{len(data):,} bytes, the limit is {max_bytes:,}", options)
    message = build_message(data, file.name, label=file.label, original=None if data is found else found)
    # Measuring a message costs more than building one, so only messages near the limit are measured.
    if len(data) + HEADER_MARGIN_BYTES > max_message_bytes and (size := message_bytes(message)) > max_message_bytes:
        detail = f"{size:,} bytes with headers, the topic's limit is {max_message_bytes:,}"
        return _too_large(file.name, detail, options)
    return message


def _content(name: str, max_bytes: int, options: ReadOptions) -> bytes | Skipped:
    if options.fetch is not None and "://" in name:
        return _fetched(name, max_bytes, options, options.fetch)
    try:
        found = os.stat(name)  # noqa: PTH116  the name as given
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for a writer
            return Skipped(name, SkipReason.UNREADABLE, "not a regular file")
        size = found.st_size
        # Unbuffered: with files of a few kilobytes each call costs, and each hands the GIL to the sending thread.
        with open(name, "rb", buffering=0) as stream:  # noqa: PTH123
            data = stream.read(SNIFF_BYTES if size > max_bytes else size + 1) or b""
            # One read suffices unless the file is being written or its file system returns less than requested.
            while size <= max_bytes and len(data) != size and (more := stream.read(max_bytes + 1 - len(data))):
                data += more
            if options.only_images and content_type(data[:SNIFF_BYTES]) == UNKNOWN_CONTENT:
                return Skipped(name, SkipReason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return Skipped(name, SkipReason.UNREADABLE, getattr(error, "strerror", None) or str(error))
    if (size := max(size, len(data))) > max_bytes:
        return _too_large(name, f"{size:,} bytes, the limit is {max_bytes:,}", options)
    return data


def _fetched(name: str, max_bytes: int, options: ReadOptions, fetch: Fetch) -> bytes | Skipped:
    try:
        data = fetch(name, max_bytes + 1)
    except OSError as error:
        return Skipped(name, SkipReason.UNREADABLE, error.strerror or str(error))
    if options.only_images and content_type(data[:SNIFF_BYTES]) == UNKNOWN_CONTENT:
        return Skipped(name, SkipReason.NOT_AN_IMAGE, "by its first bytes", wanted=True)
    if len(data) > max_bytes:
        return _too_large(name, f"more than the limit of {max_bytes:,} bytes", options)
    return data


def _too_large(name: str, detail: str, options: ReadOptions) -> Skipped:
    return Skipped(name, SkipReason.TOO_LARGE, detail, wanted=options.skip_too_large)
