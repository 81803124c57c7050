"""The store in a bucket of S3, Google Cloud Storage or Azure, or below a prefix in one, by obstore.

An object is created by a conditional put. obstore is imported only if a bucket is used.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from streaming.errors import ConfigurationError, NotFoundError
from streaming.storage.store_base import Output, Store, Stored, check_key, local_errors, replaced_when_complete
from streaming.storage.store_errors import ENDPOINTS, store_error

REQUEST_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
CLOUD_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")  # prefixes of the variables that obstore and deltalake read
# The variables without secrets, which clients on other machines need as well.
SHARED_VARIABLES = (
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ALLOW_HTTP", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"),
    *(name for names in ENDPOINTS.values() for name in names),
)
ENDPOINT = re.compile(r"https?://[^/@\s]+(/[^@?#\s]*)?", re.IGNORECASE)


class BucketStore(Store):
    """A bucket, or a prefix in one.

    Args:
        place: its URI.
        client: obstore's client of the bucket.
        prefix: of all keys.
    """

    def __init__(self, place: str, client: Any, prefix: str = "") -> None:
        super().__init__(place)
        self._client = client
        self._prefix = f"{prefix}/" if prefix else ""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self} holds credentials: pass its URI instead, and open it in the other process")

    def get(self, key: str) -> bytes | None:
        with self._errors():
            try:
                return bytes(self._client.get(self._path(key)).bytes())
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                return None

    def head(self, key: str, n: int) -> bytes | None:
        path = self._path(key)
        with self._errors():
            try:
                found = self._client.get(path)
                if found.meta["size"] <= n:
                    return bytes(found.bytes())
                return bytes(self._client.get_range(path, start=0, length=n))
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                return None

    def size(self, key: str) -> int | None:
        with self._errors():
            try:
                return int(self._client.head(self._path(key))["size"])
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                return None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        with self._errors():
            try:
                self._client.put(self._path(key), data, mode="create")
            except AlreadyExistsError:  # also if our own put was stored but its response was lost
                return False
        return True

    def put(self, key: str, data: bytes) -> None:
        with self._errors():
            self._client.put(self._path(key), data, use_multipart=False)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        return self._below(self._folder(prefix))

    def _below(self, folder: str | None) -> Iterator[Stored]:
        with self._errors():
            for chunk in self._client.list(folder):
                for one in chunk:
                    yield Stored(one["path"].removeprefix(self._prefix), one["size"], one["last_modified"])

    def folders(self, prefix: str = "") -> Sequence[str]:
        with self._errors():
            found = self._client.list_with_delimiter(self._folder(prefix))
        return sorted(path.rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        if paths:
            with self._errors(), suppress(FileNotFoundError):
                self._client.delete(paths)

    def open_output(self, key: str) -> BinaryIO:
        import obstore

        path = self._path(key)
        with self._errors():
            upload = _Upload(obstore.open_writer(self._client, path), self._errors)
        return cast("BinaryIO", Output(upload))

    def fetch(self, key: str, to: Path) -> None:
        path = self._path(key)
        with replaced_when_complete(to) as temporary, self._errors():
            try:
                chunks = self._client.get(path).stream()
            except FileNotFoundError as error:
                self._raise_unless_absent(error)
                raise NotFoundError(f"{self.place}/{key} does not exist") from None
            with local_errors("write", to), temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _folder(self, prefix: str) -> str | None:
        return self._path(prefix) if prefix else self._prefix.rstrip("/") or None

    def _raise_unless_absent(self, error: FileNotFoundError) -> None:
        """Raise an error if not only the object but the bucket does not exist."""
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
    """obstore's writer as a Python file; its own `closed` is a method, which neither Python nor Arrow accepts."""

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


def open_bucket(uri: str, options: Mapping[str, str]) -> BucketStore:
    """The store at a URI that `check_place` has accepted; see `open_store`."""
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    variables = tuple((name, value) for name, value in os.environ.items() if name.startswith(CLOUD_VARIABLES))
    return BucketStore(uri, _client(scheme, bucket, tuple(options.items()), variables, os.getpid()), prefix)


def allows_http(scheme: str) -> bool:
    """Whether the environment names an endpoint without TLS, such as a server in the same network."""
    variables = ENDPOINTS.get(scheme, ())
    return any(os.environ.get(name, "").lower().startswith("http://") for name in variables)


def shared_variables() -> dict[str, str]:
    """The environment variables with regions, servers and accounts of stores, without credentials."""
    return {name: value for name in SHARED_VARIABLES if (value := os.environ.get(name))}


@lru_cache(maxsize=16)
def _client(
    scheme: str,
    bucket: str,
    options: tuple[tuple[str, str], ...],
    variables: tuple[tuple[str, str], ...],
    process: int,  # noqa: ARG001  part of the cache key, since threads and connections do not survive a fork
) -> Any:
    """obstore's client of a bucket, cached with its connections for as long as the variables stay the same."""
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
                f"{scheme}://{bucket} cannot be opened: AZURE_STORAGE_ACCOUNT_KEY is not a valid key"
            ) from None
        raise ConfigurationError(f"{scheme}://{bucket} cannot be opened: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
