"""Looks up images in the Delta tables: deltalake lists the files, and DuckDB searches them.

An image's id is usually a hash, so the statistics of files cannot exclude it, and every file is searched: first the
column of ids, then the other columns of matching rows. Files never change, so a lookup that waits for a row only
searches new files when it is repeated.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import duckdb

from streaming.errors import ServiceError, UnavailableError
from streaming.storage.home import Home
from streaming.storage.sql import connect
from streaming.storage.store_errors import StoreAwayError

MAX_ROWS = 100
TIMEOUT_S = 20.0
MEMORY_LIMIT = "512MB"
FRESH_S = 0.2  # how long the list of a table's files is cached
FRESH_IN_BUCKET_S = 1.0

IDENTITY = 'image_id, source, label_true, topic, "partition", "offset", published_at'
COLUMNS = {
    "predictions": f"label, confidence, top_k, model_version, {IDENTITY}, scored_at",
    "quarantine": f"stage, reason, detail, {IDENTITY}, quarantined_at",
}
TIME_COLUMNS = {"predictions": "scored_at", "quarantine": "quarantined_at"}  # the time of a row

T = TypeVar("T")
Rows = list[dict[str, Any]]
Files = frozenset[str]
NOTHING: Files = frozenset()


@dataclass(frozen=True)
class Found:
    """The rows of an image by table, latest first, and the files that were searched."""

    rows: Mapping[str, Rows]
    searched: Mapping[str, Files] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.rows.values())


def order(table: str) -> tuple[str, ...]:
    """The sort key of a table's rows, which is unique."""
    return (TIME_COLUMNS[table], "topic", '"partition"', '"offset"')


class Lookup:
    """Finds images in the tables of a home; thread-safe."""

    def __init__(self, home: Home) -> None:
        self._tables = {name: _Files(home, name) for name in COLUMNS}
        self._connection = connect(memory_limit=MEMORY_LIMIT, cache_footers=True)

    def find(self, image_id: str, before: Found | None = None) -> Found:
        """All rows of an image.

        Args:
            image_id: the value of the column.
            before: the result of a previous lookup without rows, so that only new files are searched.

        Raises:
            ServiceError: the tables cannot be read at the moment.
        """
        searched = before.searched if before is not None else {}

        def search() -> Found:
            files = {name: table.current() for name, table in self._tables.items()}
            rows = {
                name: self._rows(name, current - searched.get(name, NOTHING), "image_id = $id", {"id": image_id})
                for name, current in files.items()
            }
            return Found(rows, files)

        return self._with_retry(search)

    def page(self, table: str, condition: str, values: Mapping[str, Any], limit: int) -> Rows:
        """The latest rows of a table that match a condition.

        Args:
            condition: in SQL, with `$name` for values.

        Raises:
            ServiceError: the table cannot be read at the moment.
        """
        return self._with_retry(lambda: self._rows(table, self._tables[table].current(), condition, values, limit))

    def close(self) -> None:
        self._connection.close()

    def _with_retry(self, search: Callable[[], T]) -> T:
        """Search, and retry once with a new list of files, since a file may have been vacuumed in the meantime."""
        try:
            return search()
        except (duckdb.Error, OSError, ServiceError):
            for table in self._tables.values():
                table.forget()
        try:
            return search()
        except (duckdb.Error, OSError, ServiceError) as error:
            raise UnavailableError("the tables cannot be read now") from error

    def _rows(self, table: str, files: Files, condition: str, values: Mapping[str, Any], limit: int = MAX_ROWS) -> Rows:
        if not files:
            return []
        sql = (
            f"SELECT {COLUMNS[table]} FROM read_parquet($files, hive_partitioning = false) "  # noqa: S608
            f"WHERE {condition} ORDER BY {', '.join(f'{key} DESC' for key in order(table))} LIMIT {limit}"
        )
        with self._connection.cursor() as cursor:
            timer = threading.Timer(TIMEOUT_S, cursor.interrupt)
            timer.start()
            try:
                found = cursor.execute(sql, {"files": sorted(files), **values})
                names = [column[0] for column in found.description or ()]
                return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
            finally:
                timer.cancel()
                timer.join()  # a cursor must not be interrupted while it is being closed


class _Files:
    """The files of a table's newest version, by a handle that is kept open and updated."""

    def __init__(self, home: Home, name: str) -> None:
        self._home = home
        self._name = name
        self._fresh_s = FRESH_S if home.is_local else FRESH_IN_BUCKET_S
        self._handle: Any = None
        self._version = -1
        self._files: Files = NOTHING
        self._asked = 0.0
        self._lock = threading.Lock()

    def current(self) -> Files:
        """The current files; none if the table does not exist.

        Raises:
            ServiceError: the table cannot be opened.
        """
        from deltalake.exceptions import DeltaError

        from streaming.storage.table_files import local_copies
        from streaming.storage.table_log import open_delta, store_errors_in_one_line
        from streaming.storage.tables import data_files

        place = self._home.table(self._name)

        with self._lock:
            if self._version >= 0 and time.monotonic() - self._asked < self._fresh_s:
                return self._files
            try:
                if self._handle is None:
                    if not self._home.has_table(self._name):
                        return NOTHING
                    self._handle = open_delta(place)
                else:
                    with store_errors_in_one_line(place):
                        self._handle.update_incremental()
                if self._handle.version() != self._version:
                    self._files = frozenset(local_copies(self._home, data_files(self._handle, place)))
                    self._version = self._handle.version()
            except (DeltaError, OSError, StoreAwayError) as error:
                self._handle, self._version = None, -1
                raise UnavailableError("the tables cannot be read now") from error
            self._asked = time.monotonic()
            return self._files

    def forget(self) -> None:
        """Close the handle, so that the next call opens the table again."""
        with self._lock:
            self._handle, self._version, self._files = None, -1, NOTHING
