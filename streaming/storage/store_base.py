"""The interface of a store: small objects by key, which can be created at most once, or overwritten.

Everything else relies on creation: if several processes create the same key, exactly one succeeds, and each knows
whether it did. The response of a store can be lost, or be an error although the object was stored, so an unknown
outcome is resolved by reading the object back. An object that several processes may create therefore contains something
that identifies its writer, such as a random number.
"""

import io
import random
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Barrier
from time import monotonic, sleep
from types import TracebackType
from typing import BinaryIO, Protocol, cast, final

from streaming.errors import ConfigurationError, DataError
from streaming.storage.store_errors import StoreAwayError

CREATE_TIMEOUT_S = 60.0  # how long creation is retried
PAUSE_S = (0.05, 2.0)  # the first and the longest pause between two attempts
CHECKED_KEYS, CHECKED_WRITERS = 5, 8
MAX_KEY = 900  # bytes; S3 allows 1,024, including the home's own prefix
SHOWN = 100  # characters of a bad key

# A part never begins with a dot: this excludes `..` and objects that are being written.
PART = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")
URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True)
class Stored:
    """An object in a listing.

    Attributes:
        key: relative to the store.
        modified: by the store's clock.
    """

    key: str
    bytes: int
    modified: datetime


class Store(ABC):
    """Objects below one place, a path or a URI. Keys are relative to it: parts joined by `/`, see `check_key`.

    Every method raises a ServiceError if the key is invalid or access is denied, and a StoreAwayError if the store does
    not answer.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """The object's bytes, or None if it does not exist."""

    @abstractmethod
    def head(self, key: str, n: int) -> bytes | None:
        """The first `n` bytes of the object, or all of it if it has fewer; None if it does not exist."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None if it does not exist."""

    @final
    def create(self, key: str, data: bytes) -> bool:
        """Store an object that does not exist yet.

        Returns:
            Whether the object now holds exactly `data`; False if another one existed before.
        """
        check_key(key)
        pause, longest = PAUSE_S
        deadline = monotonic() + CREATE_TIMEOUT_S
        while True:
            failure: StoreAwayError | None = None
            try:
                if self._put_if_absent(key, data):
                    return True
            except StoreAwayError as error:
                failure = error
            try:
                stored = self.get(key)
            except StoreAwayError as error:
                failure = error
            else:
                if stored is not None:
                    return stored == data
            if monotonic() > deadline:
                raise StoreAwayError(
                    f"{self.place} did not store {key} within {CREATE_TIMEOUT_S:g} s "
                    f"({failure or 'it reports both that the object exists and that it does not'})"
                )
            sleep(pause * random.uniform(0.5, 1))  # noqa: S311  jitter, not a secret
            pause = min(2 * pause, longest)

    @abstractmethod
    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """Try once to store an object; False if the store reports that it exists."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store an object, replacing an existing one."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Stored]:
        """All objects below a folder, at any depth, in no particular order."""

    @abstractmethod
    def folders(self, prefix: str = "") -> Sequence[str]:
        """The names of the folders directly in a folder, in alphabetical order."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; keys that do not exist are ignored."""

    @abstractmethod
    def open_output(self, key: str) -> BinaryIO:
        """Open a new object for writing. It is stored when it is closed; an exception in its `with` block discards it.

        Only one writer may use a key, so the name should contain something random.
        """

    @abstractmethod
    def fetch(self, key: str, to: Path) -> None:
        """Copy an object to a local file, which appears when it is complete.

        Raises:
            ServiceError: the object does not exist.
        """

    @final
    def check_access(self) -> None:
        """Check that objects can be written, read and deleted.

        Raises:
            ServiceError: they cannot; the error gives the reason.
            StoreAwayError: the store does not answer.
        """
        key = f"locks/check-{uuid.uuid4().hex}"
        self.put(key, b"")
        try:
            if self.get(key) is None:
                raise ConfigurationError(
                    f"{self.place} does not return what was written to it", hint="choose another store"
                )
        finally:
            self.delete([key])

    @final
    def check_conditional(self) -> None:
        """Check that if several writers create the same object at the same time, exactly one succeeds.

        Raises:
            ServiceError: the store does not guarantee that, so two streams could lose rows.
        """
        run = uuid.uuid4().hex
        keys = [f"locks/check-{run}-{number}" for number in range(CHECKED_KEYS)]
        barrier = Barrier(CHECKED_WRITERS)

        def winners(writer: int) -> list[bool]:
            barrier.wait()
            return [self.create(key, f"{run} {writer}".encode()) for key in keys]

        try:
            with ThreadPoolExecutor(CHECKED_WRITERS) as pool:
                won = [sum(of_key) for of_key in zip(*pool.map(winners, range(CHECKED_WRITERS)), strict=True)]
            late = [self.create(key, b"late") for key in keys]
        finally:
            self.delete(keys)
        if won != [1] * CHECKED_KEYS or any(late):
            raise ConfigurationError(
                f"{self.place} does not support conditional puts: of {CHECKED_WRITERS} writers of one new object "
                f"exactly one must succeed, but {max(won) + max(late)} did",
                hint="choose a store that does, such as S3",
            )


def is_uri(place: str | Path) -> bool:
    """Whether a place is a URI rather than a path."""
    return URI.fullmatch(str(place)) is not None


def check_key(key: str) -> str:
    """Validate a key, which may come from a table's log that another program wrote, and return it.

    Raises:
        ServiceError: it is absolute, too long, or has an empty part, a part that begins with a dot, a control character
            or a backslash.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_KEY or not all(map(PART.fullmatch, key.split("/"))):
        raise DataError(f"expected a key such as tables/batches/part-1.parquet, got {key[:SHOWN]!r}")
    return key


class RawOutput(Protocol):
    """An unbuffered output that can be abandoned."""

    def discard(self) -> None:
        """Close the output without storing an object."""


class Output(io.BufferedWriter):
    """A buffered output; an exception in its `with` block discards it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /
    ) -> None:
        if kind is None:
            self.close()
        else:
            cast("RawOutput", self.detach()).discard()


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """A temporary file next to `path`, renamed to `path` at the end."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield temporary
        with local_errors("write", path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def local_errors(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreAwayError(f"cannot {verb} {path}: {error.strerror or error}") from error
