"""SQL queries over the Delta tables without a JVM: deltalake lists the files of each table, and DuckDB reads them.

The SQL comes from a user and is sandboxed: one SELECT, in an in-memory database with a locked configuration that can
only open the tables' files, so that it cannot write, attach, install or read other files; time and memory are limited.
Rows are streamed, so a large result is never in memory as a whole.

With a time, each table is read as of that time: Delta keeps old versions until their files are vacuumed.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa

from streaming.errors import DamagedError, DataError, NotFoundError, ServiceError
from streaming.settings import Settings
from streaming.storage.home import LOG, TABLES_FOLDER, Home
from streaming.storage.sql import MEMORY_LIMIT, connect
from streaming.storage.table_files import CACHE, local_copies

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")

TIMEOUT_S = 60.0
INTERRUPT_EVERY_S = 0.1
BATCH_ROWS = 10_000
WORD = re.compile(r"\w+")
ENTRY = re.compile(r"/([0-9]{20})\.json$")


def query(
    settings: Settings,
    sql: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
    at: datetime | None = None,
) -> pa.Table:
    """All rows of a SELECT over the tables; see `open_query` for arguments and errors."""
    with open_query(settings, sql, parameters=parameters, timeout_s=timeout_s, at=at) as reader:
        return reader.read_all()


@contextmanager
def open_query(
    settings: Settings,
    sql: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
    at: datetime | None = None,
) -> Iterator[pa.RecordBatchReader]:
    """The rows of a SELECT over the tables, in batches that can be read within the context.

    Args:
        sql: one SELECT (or WITH, FROM, VALUES, DESCRIBE, SHOW TABLES); each Delta table is a view with its name.
        parameters: values of `$name` in the SQL.
        timeout_s: from now until the last row is read.
        at: a time with a time zone; the tables are read as of this time, without those that did not exist.

    Raises:
        ServiceError: there are no tables, a table's files of that time have been vacuumed, the SQL is not a single
            SELECT or is invalid, or it exceeds its time or memory; also raised while rows are read.
    """
    with open_snapshot(settings, at=at) as snapshot, snapshot.query(sql, parameters, timeout_s) as reader:
        yield reader


@contextmanager
def open_snapshot(settings: Settings, *, at: datetime | None = None) -> Iterator["Snapshot"]:
    """A snapshot of the tables for several statements; see `open_query` for errors."""
    connection = connect()
    try:
        yield Snapshot(connection, _Views(connection, settings.place, at))
    finally:
        connection.close()


class Snapshot:
    """The tables as of the time when they were opened; later commits are not visible."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, views: "_Views") -> None:
        self.tables = views.names
        self._connection = connection
        self._views = views

    @contextmanager
    def query(
        self, sql: str, parameters: Mapping[str, Any] | None = None, timeout_s: float = TIMEOUT_S
    ) -> Iterator[pa.RecordBatchReader]:
        """As `open_query`; a second statement may run while the rows of the first are read."""
        connection = self._connection.cursor()
        limit = _Limit(connection, timeout_s)
        try:
            statement = _only_select(sql)
            self._views.fill(sql)
            with _errors_in_one_line(self.tables, limit):
                rows = limit.call(
                    lambda: connection.sql(statement, params=dict(parameters or {})).to_arrow_reader(BATCH_ROWS)
                )
            yield pa.RecordBatchReader.from_batches(rows.schema, _guarded(rows, self.tables, limit))
        finally:
            limit.cancel()
            connection.close()


class _Limit:
    """Interrupts a connection when its timeout expires, or at Ctrl-C."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.passed = False
        self._connection = connection
        self._ended = threading.Event()
        self._timer = threading.Thread(target=self._watch, daemon=True)
        self._timer.start()
        self._worker = ThreadPoolExecutor(1)

    def call(self, step: Callable[[], T]) -> T:
        """Run `step` in another thread, since this one could not react to Ctrl-C while DuckDB is working."""
        result = self._worker.submit(step)
        try:
            return result.result()
        except KeyboardInterrupt:
            self._connection.interrupt()
            raise

    def cancel(self) -> None:
        self._ended.set()
        self._timer.join()  # a connection must not be interrupted while it is being closed
        self._worker.shutdown()

    def _watch(self) -> None:
        pause = self.timeout_s
        while not self._ended.wait(pause):
            self.passed = True
            self._connection.interrupt()
            pause = INTERRUPT_EVERY_S  # repeated, since an interrupt does not affect a statement that starts later


class _Views:
    """Creates a view over local files for each table, then denies the connection access to everything else.

    For a home in a bucket, only files of tables that a statement names are copied; other views stay empty.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, home: Home, at: datetime | None) -> None:
        self._connection = connection
        self._home = home
        self._at = at
        names = home.table_names()
        if not names:
            raise NotFoundError(
                f"no tables yet in {home.tables}: run `imagestream demo`, or publish images and run "
                "`imagestream stream`"
            )
        with ThreadPoolExecutor(len(names)) as pool:  # in parallel, since a bucket takes several requests per table
            opened = dict(zip(names, pool.map(self._open, names), strict=True))
        self._tables = {name: table for name, table in opened.items() if table is not None}
        self.names = list(self._tables)
        if not self.names:
            raise NotFoundError(f"no table in {home.tables} existed at {at}: give a later time")
        self._empty = set(self.names)
        if home.is_local:
            readable = [file for name in self.names for file in self._fill(name)]
            connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, readable))}]")
        else:
            for name in self.names:
                self._make(name, [])
            copies = home.work / CACHE / TABLES_FOLDER
            connection.execute(f"SET allowed_directories = [{_quoted(str(copies))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

    def fill(self, sql: str) -> None:
        """Fill the views that a statement names."""
        words = set(WORD.findall(sql.lower()))
        for name in [name for name in self.names if name in self._empty and name in words]:
            self._fill(name)

    def _open(self, name: str) -> "DeltaTable | None":
        from deltalake.exceptions import DeltaError

        try:
            return _table_at(self._home, name, self._at)
        except (DeltaError, OSError) as error:
            raise self._unreadable(name, error) from error

    def _fill(self, name: str) -> list[str]:
        from deltalake.exceptions import DeltaError

        from streaming.storage.tables import data_files

        try:
            files = data_files(self._tables[name], self._home.table(name))
            if self._at is not None:
                _check_not_vacuumed(self._home, name, files, self._at)
            files = local_copies(self._home, files)
            if files and not self._home.is_local:
                self._connection.execute(f'DROP TABLE "{name}"')
            if files or self._home.is_local:
                self._make(name, files)
        except (DeltaError, duckdb.Error, OSError) as error:
            raise self._unreadable(name, error) from error
        self._empty.discard(name)
        return files

    def _make(self, name: str, files: list[str]) -> None:
        empty = self._connection.from_arrow(pa.Table.from_batches([], pa.schema(self._tables[name].schema())))
        if not files:
            empty.create(name)
            return
        # By name, so that a column that an old file lacks is NULL. Partition columns are in the paths only.
        rows = self._connection.read_parquet(files, hive_partitioning=True, union_by_name=True)
        types = zip(empty.columns, empty.types, strict=True)
        # A column that no file has is NULL as well.
        nulls = [f'NULL::{kind} AS "{column}"' for column, kind in types if column not in rows.columns]
        (rows.project(", ".join(["*", *nulls])) if nulls else rows).create_view(name)

    def _unreadable(self, name: str, error: Exception) -> ServiceError:
        return DamagedError(f"table {name} in {self._home.tables} cannot be read: {_condensed(error)}")


def _table_at(home: Home, name: str, at: datetime | None) -> "DeltaTable | None":
    """The table as of a time, None if it did not exist; without a time, its current version."""
    from deltalake.exceptions import DeltaError

    from streaming.storage.table_log import open_delta

    if at is None:
        return open_delta(home.table(name))
    # Delta dates a version by its log file. For a time before the oldest entry, deltalake would return version 0.
    entries = home.store.list(f"{TABLES_FOLDER}/{name}/{LOG}")
    commits = {int(found[1]): one.modified for one in entries if (found := ENTRY.search(one.key))}
    versions = [version for version, modified in commits.items() if modified <= at]
    if not versions and 0 in commits:
        return None
    try:
        return open_delta(home.table(name), max(versions))
    except (ValueError, DeltaError) as error:
        raise NotFoundError(f"table {name} has no history as old as {at}: `maintain` cleaned it") from error


def _check_not_vacuumed(home: Home, name: str, files: list[str], at: datetime) -> None:
    there = {one.key for one in home.store.list(f"{TABLES_FOLDER}/{name}")}
    gone = sum(file.removeprefix(f"{home.uri}/") not in there for file in files)
    if gone:
        raise NotFoundError(
            f"table {name} cannot be read as of {at}: {gone} of its {len(files)} files have been vacuumed since;"
            " `imagestream maintain --retention` says how long they are kept"
        )


def _only_select(sql: str) -> duckdb.Statement:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise DataError(f"SQL: {_condensed(error)}") from error
    if len(statements) != 1:
        raise DataError(f"SQL: expected one SELECT statement, got {len(statements)} statements")
    (statement,) = statements
    if statement.type != duckdb.StatementType.SELECT:
        kind = statement.type.name.replace("_", " ")
        raise DataError(f"SQL: expected a SELECT, got {kind}; queries read the tables and never change anything")
    return statement


def _guarded(rows: pa.RecordBatchReader, tables: list[str], limit: _Limit) -> Iterator[pa.RecordBatch]:
    batches = iter(rows)
    with _errors_in_one_line(tables, limit):
        while (batch := limit.call(lambda: next(batches, None))) is not None:
            yield batch


@contextmanager
def _errors_in_one_line(tables: list[str], limit: _Limit) -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # the Arrow reader raises DuckDB's errors as OSError
        if limit.passed:
            message = f"the query took longer than {limit.timeout_s:g} s: narrow it, or allow more with --timeout"
        elif isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in str(error):
            message = f"the query needs more than {MEMORY_LIMIT} of memory: narrow it"
        elif isinstance(error, duckdb.CatalogException) and "Table with name" in str(error):
            message = f"{str(error).splitlines()[0]} The tables here: {', '.join(tables)}"
        else:
            message = _condensed(error)
        raise DataError(f"SQL: {message}") from error


def _condensed(error: Exception) -> str:
    """DuckDB's message without the lines that point to the position in the SQL."""
    return " ".join(str(error).split("\nLINE ")[0].split())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
