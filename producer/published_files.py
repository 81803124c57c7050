"""The files published by `--watch`, kept in an SQLite database across restarts.

A file is identified by its real path, size and modification time: a file that changed is a new image.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from producer.errors import PublishError

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sent INTEGER NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class FileState:
    """A file's real path, size in bytes and modification time in nanoseconds since 1970."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, name: str) -> Self:
        """The current state of a file; raises OSError if it does not exist."""
        status = os.stat(name)  # noqa: PTH116  the name as given
        return cls(os.path.realpath(name), status.st_size, status.st_mtime_ns)

    @property
    def key(self) -> tuple[bytes, int, int]:
        return os.fsencode(self.path), self.size, self.mtime_ns


class PublishedFiles:
    """The set of files that were published or skipped; exclusive to one process at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the database.

        Files that an earlier process skipped are forgotten: this one's options may include them.

        Raises:
            PublishError: another process uses the database, or it cannot be opened.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(path.name + ".lock").open("w")
        except OSError as error:
            raise PublishError(
                f"{path}: the state of `imagestream publish --watch` cannot be kept there: {error}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise PublishError(
                f"another `imagestream publish --watch` is using {path}: stop it, or set another --state FILE"
            ) from error
        try:
            self._files = sqlite3.connect(path, isolation_level=None)
            self._files.execute("PRAGMA journal_mode = WAL")
            self._files.execute("PRAGMA synchronous = NORMAL")
            self._files.execute(SCHEMA)
            self._files.execute("DELETE FROM files WHERE NOT sent")
        except sqlite3.Error as error:
            self._lock.close()
            raise PublishError(
                f"{path}: expected the state of `imagestream publish --watch`, got: {error}; set another --state FILE, "
                "or remove this one to publish everything again"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        with suppress(sqlite3.Error):
            self._files.close()
        self._lock.close()

    def __contains__(self, state: FileState) -> bool:
        query = "SELECT 1 FROM files WHERE path = ? AND size = ? AND mtime_ns = ?"
        return self._files.execute(query, state.key).fetchone() is not None

    def add(self, states: Iterable[FileState], *, sent: bool) -> None:
        """Record files that were sent or skipped, in one transaction; each replaces its earlier state.

        Raises:
            PublishError: the database cannot be written, for example because the disk is full.
        """
        rows = [(*state.key, sent) for state in states]
        try:
            self._files.execute("BEGIN")
            self._files.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
            self._files.execute("COMMIT")
        except sqlite3.Error as error:
            raise PublishError(f"{self._path}: published files cannot be recorded: {error}") from error
