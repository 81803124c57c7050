"""Reads the Delta tables for many small queries: handles stay open and follow the log, DuckDB reads the files.

`streaming.query` opens the tables for each query of a user and confines the user's SQL. Here the SQL is the dashboard's
own, with values as parameters only, so the state of the log and the footers of the files are cached between queries:
a page over a million rows is fast.
"""

import threading
from pathlib import Path
from time import monotonic
from typing import Any

import duckdb
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from streaming.errors import UnavailableError
from streaming.storage.home import LOG, Home
from streaming.storage.sql import connect
from streaming.storage.store_errors import StoreAwayError
from streaming.storage.table_files import local_copies
from streaming.storage.table_log import open_delta, store_errors_in_one_line
from streaming.storage.tables import SCHEMAS, data_files

TIMEOUT_S = 20.0
FRESH_IN_BUCKET_S = 1.0  # time for which the version of a table in a bucket is cached


class Reader:
    """Runs SQL over the tables of a home, each a view of its name; a missing table is empty. Thread-safe."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._asked: dict[str, float] = {}  # time of the last read of the log
        self._lock = threading.Lock()
        self._handles: dict[str, tuple[DeltaTable, int]] = {}
        self._viewed: dict[str, tuple[str, int]] = {}  # table → (which table, the version that its view shows)
        self._database = connect(cache_footers=True)
        for name, (schema, _) in SCHEMAS.items():
            self._view_nothing(name, schema)

    def version(self, *names: str) -> tuple[tuple[str, int], ...]:
        """Return a value that changes whenever one of these tables does; their views show this version from now on.

        Raises:
            ServiceError: a table cannot be read.
        """
        with self._lock:
            return tuple(self._follow(name) for name in names)

    def rows(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return the rows of a SELECT over the versions that `version` read; `parameters` are the values of `$name`.

        Raises:
            ServiceError: a table cannot be read, or the query takes longer than TIMEOUT_S.
        """
        found: list[dict[str, Any]] = self.table(sql, **parameters).to_pylist()
        return found

    def table(self, sql: str, **parameters: Any) -> pa.Table:
        """Return the rows as an Arrow table; see `rows`."""
        cursor = self._database.cursor()
        limit = threading.Timer(TIMEOUT_S, cursor.interrupt)
        limit.daemon = True
        limit.start()
        try:
            return cursor.sql(sql, params=parameters).to_arrow_table()
        except duckdb.InterruptException as error:
            raise UnavailableError(
                f"the query took longer than {TIMEOUT_S:g} s: compact the tables with `imagestream maintain`"
            ) from error
        except duckdb.Error as error:
            raise UnavailableError(f"the tables cannot be read: {_line(error)}") from error
        finally:
            limit.cancel()
            limit.join()
            cursor.close()

    def _follow(self, name: str) -> tuple[str, int]:
        place = self.home.table(name)
        if not self.home.is_local and name in self._viewed and monotonic() - self._asked[name] < FRESH_IN_BUCKET_S:
            return self._viewed[name]
        try:
            self._asked[name] = monotonic()
            made = self._table_identity(name)
            if made is None:
                if name in self._handles:  # the table was removed
                    del self._handles[name]
                    self._view_nothing(name, SCHEMAS[name][0])
                    self._viewed.pop(name, None)
                return ("", -1)
            table, made_before = self._handles.get(name, (None, 0))
            if table is None or made != made_before:
                table = open_delta(place)
                self._handles[name] = (table, made)
            else:
                with store_errors_in_one_line(place):
                    table.update_incremental()
            seen = (f"{made}", table.version())
            if self._viewed.get(name) != seen:
                self._view(name, table)
                self._viewed[name] = seen
        except (DeltaError, duckdb.Error, OSError, StoreAwayError) as error:
            self._handles.pop(name, None)  # it may have been recreated: the next query opens it again
            raise UnavailableError(f"table {name} in {self.home.tables} cannot be read: {_line(error)}") from error
        return seen

    def _table_identity(self, name: str) -> int | None:
        """Identify the table, to notice one that was recreated under its name; None if there is no table.

        In a bucket, a recreated table cannot be noticed without opening it.
        """
        if not self.home.is_local:
            return 0 if name in self._handles or self.home.has_table(name) else None
        try:
            return Path(self.home.table(name), LOG).stat().st_ino
        except FileNotFoundError:
            return None

    def _view(self, name: str, table: DeltaTable) -> None:
        files = local_copies(self.home, data_files(table, self.home.table(name)))
        if not files:
            self._view_nothing(name, pa.schema(table.schema()))
            return
        # By name: a column that a file does not have yet is NULL. A partition column is only in the paths.
        relation = self._database.read_parquet(files, hive_partitioning=True, union_by_name=True)
        relation.create_view(name, replace=True)

    def _view_nothing(self, name: str, schema: pa.Schema) -> None:
        empty = f"no_{name}"
        self._database.execute(f"DROP TABLE IF EXISTS {empty}")
        self._database.from_arrow(pa.Table.from_batches([], schema)).create(empty)
        self._database.table(empty).create_view(name, replace=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\nLINE ")[0].split())[:300]
