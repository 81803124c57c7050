"""Small objects by key, in a local folder or in a bucket: created at most once, or overwritten.

Creating is what everything else rests on: of all who create one key exactly one succeeds, and each of them knows
whether it was the one. A store's answer can be lost on the way, or be an error although the object was stored; so
an outcome that is not known is resolved by reading the object back. Objects that several may create therefore hold
something that tells their writers apart, such as a random number.

Locally an object is written under a temporary name, synced, and linked to its own name, which fails where that exists.
In a bucket it is a conditional put by obstore, which is imported for buckets only.
"""

import io
import os
import random
import re
import shutil
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from threading import Barrier
from time import monotonic, sleep
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, NoReturn, cast, final

from streaming.errors import ConfigurationError, DamagedError, DataError, NotFoundError
from streaming.storage.store_errors import ENDPOINTS, StoreAwayError, store_error

SCHEMES = ("s3", "gs", "az")
ANSWER_WITHIN_S = 60.0  # creating is tried for so long
REQUEST_TIMEOUT_S = 30
PAUSE_S = (0.05, 2.0)  # the first pause between two tries and the longest
CHECKED_KEYS, CHECKED_WRITERS = 5, 8
MAX_KEY = 900  # bytes; S3 takes 1,024, and the home's own prefix is in front
CONNECT_TIMEOUT_S = 5
CLOUD_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")  # how the names begin of those that obstore and deltalake read
# Those of them that are no secrets, and which clients on other machines need, too.
SHARED_VARIABLES = (
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ALLOW_HTTP", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"),
    *(name for names in ENDPOINTS.values() for name in names),
)
ENDPOINT = re.compile(r"https?://[^/@\s]+(/[^@?#\s]*)?", re.IGNORECASE)
SHOWN = 100  # characters of a bad key

# A part never begins with a dot: no `..`, and nothing that is still being written.
PART = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")
URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it.

    Attributes:
        modified: by the store's clock.
    """

    key: str
    bytes: int
    modified: datetime


class Store(ABC):
    """Objects below one place. Keys are relative to it: parts joined by `/`, as `check_key` has them.

    Every method raises a ServiceError for a bad key or where access is refused, and a StoreAwayError where the store
    does not answer.
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
            Whether the object now holds exactly `data`: False if another one was there first.
        """
        check_key(key)
        pause, longest = PAUSE_S
        deadline = monotonic() + ANSWER_WITHIN_S
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
                    f"{self.place} did not store {key} within {ANSWER_WITHIN_S:g} s "
                    f"({failure or 'it answers that the object exists, and that it does not'})"
                )
            sleep(pause * random.uniform(0.5, 1))  # noqa: S311  spreads writers in time, no secret
            pause = min(2 * pause, longest)

    @abstractmethod
    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """One try: True if it stored the object; False if it did not, as far as the answer can be believed."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store an object, in place of the one that may be there."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Stored]:
        """All objects below a folder, at any depth, in no particular order."""

    @abstractmethod
    def folders(self, prefix: str = "") -> Sequence[str]:
        """The names of the folders directly in a folder, in alphabetical order."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that do not exist are left out."""

    @abstractmethod
    def open_output(self, key: str) -> BinaryIO:
        """A new object to write to, stored when it is closed; an exception in its `with` block discards it.

        Only one writer may use a key: the name should hold something random.
        """

    @abstractmethod
    def fetch(self, key: str, to: Path) -> None:
        """Copy an object to a local file, which appears once it is complete.

        Raises:
            ServiceError: there is no such object.
        """

    @final
    def check_access(self) -> None:
        """Check that objects can be written, read and deleted.

        Raises:
            ServiceError: why they cannot; a StoreAwayError where the store does not answer.
        """
        key = f"locks/check-{uuid.uuid4().hex}"
        self.put(key, b"")
        try:
            if self.get(key) is None:
                raise ConfigurationError(
                    f"{self.place} does not keep what is written to it", hint="choose another store"
                )
        finally:
            self.delete([key])

    @final
    def check_conditional(self) -> None:
        """Check that of several who create one object at the same time exactly one succeeds.

        Raises:
            ServiceError: the store does not keep to that; two streams would lose rows there.
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


def check_place(place: str) -> str:
    """The place itself, without a slash at its end, if it is a path or the URI of a bucket.

    Raises:
        ServiceError: another scheme, or no bucket in the URI.
    """
    uri = URI.fullmatch(place)
    if uri is None:
        return place
    scheme, rest = uri["scheme"].lower(), uri["rest"].rstrip("/").rpartition("@")[2]  # never a password in an error
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise ConfigurationError(f"expected a path or a URI that begins with {known}, got {scheme}://{rest}")
    bucket, _, prefix = rest.partition("/")
    if "@" in uri["rest"] or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise ConfigurationError(f"expected {scheme}://BUCKET/PREFIX, got {scheme}://{rest}")
    if prefix:
        check_key(prefix)
    return f"{scheme}://{rest}"


def open_store(place: str | Path, options: Mapping[str, str] = NO_OPTIONS) -> Store:
    """The store at a path, or at an `s3://`, `gs://` or `az://` URI.

    Args:
        options: of the bucket's client, as obstore names them, e.g. `endpoint`; what is not given comes from the
            cloud's usual environment variables and credential chain.

    Raises:
        ServiceError: another scheme, no bucket in the URI, or options that obstore does not know.
    """
    if not is_uri(place):
        return LocalStore(Path(place))
    uri = check_place(str(place))
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    variables = tuple((name, value) for name, value in os.environ.items() if name.startswith(CLOUD_VARIABLES))
    return ObjectStore(uri, _client(scheme, bucket, tuple(options.items()), variables, os.getpid()), prefix)


def check_key(key: str) -> str:
    """The key itself, if it is one: it may come from a table's log that somebody else wrote.

    Raises:
        ServiceError: it is absolute, has an empty part, one that begins with a dot, a control character or a
            backslash, or is longer than a store takes.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_KEY or not all(map(PART.fullmatch, key.split("/"))):
        raise DataError(f"expected a key such as tables/batches/part-1.parquet, got {key[:SHOWN]!r}")
    return key


class LocalStore(Store):
    """A folder. An object that is created or put is on the disk, its name included, before the call returns."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self._root = root

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        with _local_errors("read", path):
            try:
                # A pipe would otherwise be waited for until somebody writes to it.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                with open(descriptor, "rb") as file:  # noqa: PTH123
                    return file.read()
            os.close(descriptor)
        if stat.S_ISDIR(mode):
            return None
        raise DamagedError(f"{path} should be a regular file, but is a pipe, socket or device: remove it")

    def head(self, key: str, n: int) -> bytes | None:
        path = self._path(key)
        with _local_errors("read", path):
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return file.read(n)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with _local_errors("read", path):
            return path.stat().st_size if path.is_file() else None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _local_errors("write", path), _written(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _local_errors("write", path), _written(path, data) as temporary:
            temporary.replace(path)
            _sync_folder(path.parent)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        return self._below(self._folder(prefix), prefix)

    def _below(self, folder: Path, prefix: str) -> Iterator[Stored]:
        for entry in _entries(folder):
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                if entry.is_dir():
                    yield from self._below(folder / entry.name, key)
                    continue
                status = entry.stat()
            except FileNotFoundError:  # deleted since
                continue
            yield Stored(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def folders(self, prefix: str = "") -> Sequence[str]:
        return sorted(entry.name for entry in _entries(self._folder(prefix)) if entry.is_dir())

    def delete(self, keys: Iterable[str]) -> None:
        for path in [self._path(key) for key in keys]:
            with _local_errors("delete", path), suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    def open_output(self, key: str) -> BinaryIO:
        path = self._path(key)
        with _local_errors("write", path):
            _make_folder(path.parent)
            # Under its own name from the start: what a killed process leaves behind is then vacuumed with its table.
            return cast("BinaryIO", _Output(_SyncedFile(path, "xb")))

    def fetch(self, key: str, to: Path) -> None:
        path = self._path(key)
        with _complete(to) as temporary, _local_errors("read", path):
            try:
                shutil.copyfile(path, temporary)
            except FileNotFoundError as error:
                raise NotFoundError(f"{path} does not exist") from error

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _folder(self, prefix: str) -> Path:
        return self._path(prefix) if prefix else self._root


class _SyncedFile(io.FileIO):
    """A new file whose bytes are on the disk once it is closed, so before whatever names it later."""

    def close(self) -> None:
        if not self.closed:
            try:
                os.fsync(self.fileno())
            finally:
                super().close()

    def discard(self) -> None:
        super().close()
        Path(os.fsdecode(self.name)).unlink(missing_ok=True)


class _Output(io.BufferedWriter):
    """Buffers for a raw output, which has a `discard`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /
    ) -> None:
        if kind is None:
            self.close()
        else:
            cast("_SyncedFile | _Upload", self.detach()).discard()


@contextmanager
def _local_errors(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreAwayError(f"cannot {verb} {path}: {error.strerror or error}") from error


def _entries(folder: Path) -> Sequence[os.DirEntry[str]]:
    """What is in a folder, without what is still being written; nothing if there is no such folder."""
    with _local_errors("list", folder), suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
    return []


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file of `data` beside `path`, under a name that nobody sees."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    _make_folder(path.parent)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to it at the end."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield temporary
        with _local_errors("write", path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStore(Store):
    """A bucket, or a prefix in one.

    Args:
        client: obstore's, of the whole bucket.
        prefix: of the keys.
    """

    def __init__(self, place: str, client: Any, prefix: str = "") -> None:
        super().__init__(place)
        self._client = client
        self._prefix = f"{prefix}/" if prefix else ""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self} holds credentials: pass on its URI, and open it where it is used")

    def get(self, key: str) -> bytes | None:
        import obstore

        with self._errors():
            try:
                return bytes(obstore.get(self._client, self._path(key)).bytes())
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                return None

    def head(self, key: str, n: int) -> bytes | None:
        import obstore

        path = self._path(key)
        with self._errors():
            try:
                found = obstore.get(self._client, path)
                if found.meta["size"] <= n:
                    return bytes(found.bytes())
                return bytes(obstore.get_range(self._client, path, start=0, length=n))
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                return None

    def size(self, key: str) -> int | None:
        import obstore

        with self._errors():
            try:
                return int(obstore.head(self._client, self._path(key))["size"])
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                return None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._errors():
            try:
                obstore.put(self._client, self._path(key), data, mode="create")
            except AlreadyExistsError:  # also where our own put was stored and its answer lost
                return False
        return True

    def put(self, key: str, data: bytes) -> None:
        import obstore

        with self._errors():
            obstore.put(self._client, self._path(key), data, use_multipart=False)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        return self._below(self._folder(prefix))

    def _below(self, folder: str | None) -> Iterator[Stored]:
        import obstore

        with self._errors():
            for chunk in obstore.list(self._client, folder):
                for one in chunk:
                    yield Stored(one["path"].removeprefix(self._prefix), one["size"], one["last_modified"])

    def folders(self, prefix: str = "") -> Sequence[str]:
        import obstore

        with self._errors():
            found = obstore.list_with_delimiter(self._client, self._folder(prefix))
        return sorted(path.rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        paths = [self._path(key) for key in keys]
        if paths:
            with self._errors(), suppress(FileNotFoundError):
                obstore.delete(self._client, paths)

    def open_output(self, key: str) -> BinaryIO:
        import obstore

        path = self._path(key)
        with self._errors():
            upload = _Upload(obstore.open_writer(self._client, path), self._errors)
        return cast("BinaryIO", _Output(upload))

    def fetch(self, key: str, to: Path) -> None:
        import obstore

        path = self._path(key)
        with _complete(to) as temporary, self._errors():
            try:
                chunks = obstore.get(self._client, path).stream()
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                raise NotFoundError(f"{self.place}/{key} does not exist") from None
            with _local_errors("write", to), temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _folder(self, prefix: str) -> str | None:
        return self._path(prefix) if prefix else self._prefix.rstrip("/") or None

    def _raise_unless_absent(self, error: FileNotFoundError) -> None:
        """Raise an error where the bucket does not exist, rather than the object alone."""
        if isinstance(problem := store_error(self.place, error), ConfigurationError):
            raise problem from None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from obstore.exceptions import BaseError, NotSupportedError

        try:
            yield
        except NotSupportedError as error:
            raise ConfigurationError(f"{self.place} cannot be used as a store: {_first_line(error)}") from None
        except (BaseError, OSError) as error:
            raise store_error(self.place, error) from None


class _Upload(io.RawIOBase):
    """obstore's writer as a file: that one's `closed` is a method, which neither Python nor Arrow can use."""

    def __init__(self, writer: Any, errors: Any) -> None:
        super().__init__()
        self._writer = writer
        self._errors = errors
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._bytes

    def write(self, data: Any, /) -> int:
        with self._errors():
            self._writer.write(bytes(data))
        self._bytes += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            try:
                with self._errors():
                    self._writer.close()
            finally:
                super().close()

    def discard(self) -> None:
        super().close()


def allows_http(scheme: str) -> bool:
    """Whether the user's environment names an endpoint without TLS, as for a server in the same network."""
    variables = ENDPOINTS.get(scheme, ())
    return any(os.environ.get(name, "").lower().startswith("http://") for name in variables)


def shared_variables() -> dict[str, str]:
    """The variables of this process that name regions, servers and accounts of stores, without any credential."""
    return {name: value for name in SHARED_VARIABLES if (value := os.environ.get(name))}


@lru_cache(maxsize=16)
def _client(
    scheme: str,
    bucket: str,
    options: tuple[tuple[str, str], ...],
    variables: tuple[tuple[str, str], ...],
    process: int,  # noqa: ARG001  its threads and connections do not survive a fork
) -> Any:
    """obstore's client of a bucket, with connections that are used again as long as the variables stay the same."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError as error:
        raise ConfigurationError(f"{scheme}:// needs the package obstore: pip install obstore") from error

    given = dict(variables)
    for name in ENDPOINTS.get(scheme, ()):
        if name in given and not ENDPOINT.fullmatch(given[name]):
            raise ConfigurationError(f"{name}: expected http://HOST:PORT or https://HOST, without a user")
    http = allows_http(scheme) or dict(options).get("aws_allow_http") == "true"
    kind = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        return kind(
            bucket,
            config=dict(options),
            client_options={
                "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "allow_http": http,
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=REQUEST_TIMEOUT_S)},
        )
    except (BaseError, ValueError, TypeError) as error:
        if "Account must be specified" in str(error):
            raise ConfigurationError(f"{scheme}://{bucket} cannot be opened: set AZURE_STORAGE_ACCOUNT_NAME") from None
        if "Access Key" in str(error):  # the message quotes from it
            raise ConfigurationError(
                f"{scheme}://{bucket} cannot be opened: AZURE_STORAGE_ACCOUNT_KEY is no key"
            ) from None
        raise ConfigurationError(f"{scheme}://{bucket} cannot be opened: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
