"""The home, which holds the state of the service, and file locks in its local work folder.

The state (tables, decisions, models) is in a local folder or, with an `s3://`, `gs://` or `az://` URI, in a bucket.
Files that can be recreated (jars, Spark's log and scratch files, copies of files in a bucket) are in a local work
folder; for a local home, this is the home itself.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streaming.errors import ConfigurationError, ConflictError
from streaming.storage.store import Store, is_uri, open_store

TABLES_FOLDER = "tables"
LOG = "_delta_log"


@dataclass(frozen=True)
class Home:
    """The home of the service.

    Attributes:
        uri: an absolute path, or a URI.
        work: a local folder of this machine.
    """

    uri: str
    work: Path

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        """Whether the home is a folder rather than a bucket."""
        return not is_uri(self.uri)

    @cached_property
    def store(self) -> Store:
        """The objects of the home; keys are relative to it."""
        return open_store(self.uri)

    @property
    def tables(self) -> str:
        """The place of all tables, a path or a URI."""
        return f"{self.uri}/{TABLES_FOLDER}"

    def table(self, name: str) -> str:
        """The place of a table, a path or a URI."""
        return f"{self.tables}/{name}"

    def check(self) -> None:
        """Check that a home in a bucket can be written to.

        Raises:
            ServiceError: it cannot; the error gives the reason and the setting to check.
        """
        if not self.is_local:
            self.store.check_access()

    def has_table(self, name: str) -> bool:
        """Whether the table exists."""
        return has_table(self.tables, name)

    def table_names(self) -> list[str]:
        """The names of the tables that exist, in alphabetical order."""
        return [name for name in self.store.folders(TABLES_FOLDER) if self.has_table(name)]


def has_table(tables: str, name: str) -> bool:
    """Whether a table exists at a place of tables, a path or a URI."""
    return LOG in open_store(tables).folders(name)


def make_dir(path: Path) -> Path:
    """Create a directory and its parents if they do not exist, check that it is writable, and return it.

    Raises:
        ServiceError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {path} ({error.strerror})", hint="choose another home with --home DIR or IMAGESTREAM_HOME"
        ) from error
    return path


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, whose directory must exist; wait while another process holds it.

    The kernel releases the lock when the process ends, so an existing file never blocks.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def try_lock(path: Path, busy: str) -> Iterator[None]:
    """As `lock`, but fail with the message `busy` instead of waiting.

    Raises:
        ServiceError: another process holds the lock.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(busy) from error
        yield
