"""Thumbnails of the images in a table, from their source files.

The source of an image is set by its sender and may be any path. A file is read only if it is a regular file of an
image's size, and used only if its SHA-256 is the image's id.
"""

import hashlib
import os
import stat
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from models.decode import DEFAULT_LIMITS, BadImage, Limits, Resize, decode

SIZE = (112, 112)  # pixels


def thumbnail(
    sources: Iterable[str | None], image_id: str, resize: Resize = "stretch", limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.uint8] | None:
    """Return the image as (112, 112, 3) uint8, from the first of `sources` that contains it; None if none does.

    Args:
        sources: possible files of the image.
        image_id: hex SHA-256 of the image.
    """
    for source in sources:
        data = _read(source) if source else None
        if data is not None and hashlib.sha256(data).hexdigest() == image_id:
            pixels = decode(data, SIZE, limits, resize)
            return None if isinstance(pixels, BadImage) else pixels
    return None


def _read(path: str) -> bytes | None:
    """Read a regular file within the size limit of images; do not block on a pipe or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):  # a path may contain a NUL
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > DEFAULT_LIMITS.max_bytes:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(DEFAULT_LIMITS.max_bytes + 1)
    except OSError:
        return None
    finally:
        os.close(descriptor)
