"""Image files in local folders or in buckets (`s3://`, `gs://` or `az://` URIs)."""

import errno
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from models.decode import DEFAULT_LIMITS, Limits, read_limited
from streaming.storage.store import Store, Stored, check_place, is_uri, open_store

READ_AT_A_TIME = 8


def place_of(text: str) -> Path | str:
    """Parse a path or the URI of a folder in a bucket.

    Raises:
        ServiceError: the URI has another scheme or no bucket.
    """
    return check_place(text) if is_uri(text) else Path(text)


def read_source(source: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Read an image file from a path or a URI, up to one byte more than an image may have.

    Raises:
        OSError: the file does not exist or cannot be read; StoreAwayError if the bucket is unreachable.
    """
    return read_start(source, limits.max_bytes + 1) if is_uri(source) else read_limited(source, limits)


def read_start(uri: str, n: int) -> bytes:
    """Read the first `n` bytes of an object; errors as for `read_source`."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    content = _bucket(f"{scheme}://{bucket}").head(key, n)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    return content


def read_if_possible(source: str) -> bytes | None:
    """As `read_source`; None if the file cannot be read."""
    with suppress(OSError):
        return read_source(source)
    return None


def list_source(uri: str) -> Sequence[Stored]:
    """Return the objects below a URI at any depth, sorted by key relative to the URI.

    Raises:
        ServiceError: access is denied or the bucket is unreachable.
    """
    return sorted(open_store(uri).list(), key=lambda one: one.key)


class ReadAhead:
    """Prefetches objects in a given order, several at a time, to hide the latency of the network.

    Args:
        uris: the objects in the order in which they will be requested; some may be skipped.
    """

    def __init__(self, uris: Iterable[str]) -> None:
        self._left = iter(uris)
        self._begun: deque[tuple[str, Future[bytes]]] = deque()
        self._pool = ThreadPoolExecutor(READ_AT_A_TIME, thread_name_prefix="read-ahead")

    def __call__(self, uri: str, n: int) -> bytes:
        """Read the first `n` bytes of an object; errors as for `read_start`."""
        while True:
            while len(self._begun) < READ_AT_A_TIME and (following := next(self._left, None)) is not None:
                self._begun.append((following, self._pool.submit(read_start, following, n)))
            if not self._begun:
                return read_start(uri, n)
            name, content = self._begun.popleft()
            if name == uri:
                return content.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=8)
def _bucket(uri: str) -> Store:
    return open_store(uri)  # cached: a worker reads many objects
