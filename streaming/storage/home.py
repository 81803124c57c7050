"""The home: where the state of the service is kept, and the locks on the local folder beside it.

The state (tables, decisions, models) is in a local folder or, by an `s3://`, `gs://` or `az://` URI, in a bucket. What
can be made again (jars, Spark's log and scratch files, copies of files in a bucket) is in a local work folder; for a
local home it is the home itself.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streaming.errors import ConfigurationError, ConflictError
from streaming.storage.store import Store, is_uri, open_store

TABLES = "tables"
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
        return f"{self.uri}/{TABLES}"

    def table(self, name: str) -> str:
        """The place of a table, a path or a URI."""
        return f"{self.tables}/{name}"

    def check(self) -> None:
        """Check that a home in a bucket can be written to, before work begins that would be lost otherwise.

        Raises:
            ServiceError: why it cannot, and the setting to look at.
        """
        if not self.is_local:
            self.store.check_access()

    def has_table(self, name: str) -> bool:
        """Whether the table was created."""
        return has_table(self.tables, name)

    def table_names(self) -> list[str]:
        """The tables that were created, in alphabetical order."""
        return [name for name in self.store.folders(TABLES) if self.has_table(name)]


def has_table(tables: str, name: str) -> bool:
    """Whether a table was created at a place of tables, a path or a URI."""
    return LOG in open_store(tables).folders(name)


def make_dir(path: Path) -> Path:
    """Make the directory, and those above it, if it is not there yet.

    Raises:
        ServiceError: it cannot be made, or not be written to.
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
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` in a directory that is there; wait for another process that holds it.

    The kernel releases the lock with the process that holds it, so that one left behind never blocks.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """As `locked`, but refuse with `busy` instead of waiting.

    Raises:
        ServiceError: another process holds the lock.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(busy) from error
        yield
