"""Which files were published: a small SQLite file, so that whoever watches a folder remembers it across restarts.

A file is known by its real path, its size and the time of its last change. One that changed is a new image.
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
    """One state of a file: the real path, bytes, and nanoseconds since 1970 of its last change."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, name: str) -> Self:
        """The state of a file now; raises OSError if it is gone."""
        status = os.stat(name)  # noqa: PTH116  the name as it was given
        return cls(os.path.realpath(name), status.st_size, status.st_mtime_ns)

    @property
    def key(self) -> tuple[bytes, int, int]:
        return os.fsencode(self.path), self.size, self.mtime_ns


class Seen:
    """The files that were published, or left out; one process at a time may use it."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        What an earlier process left out is forgotten: other options may take it.

        Raises:
            PublishError: another process uses it, or it cannot be used.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(path.name + ".lock").open("w")
        except OSError as error:
            raise PublishError(f"{path}: the memory of what was published cannot be kept there: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise PublishError(
                f"another `imagestream publish --watch` remembers in {path}: stop it, or name another --state FILE"
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
                f"{path}: expected the memory of `imagestream publish --watch`, got: {error}; name another --state "
                "FILE, or remove it, and everything is published anew"
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
        """Remember files that were sent, or left out, all at once; of a file its latest state is known.

        Raises:
            PublishError: the disk is full, for example.
        """
        rows = [(*state.key, sent) for state in states]
        try:
            self._files.execute("BEGIN")
            self._files.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
            self._files.execute("COMMIT")
        except sqlite3.Error as error:
            raise PublishError(f"{self._path}: what was published cannot be remembered: {error}") from error
