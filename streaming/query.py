"""SQL over the Delta tables without a JVM: deltalake lists the files of each table, DuckDB reads them.

The SQL comes from a user and is confined: one SELECT, in a database in memory whose configuration is locked and which
can open the tables' files and nothing else, so it cannot write, attach, install or read other files; it has a limit of
time and one of memory. Rows stream: neither side holds a large result.

With a time, each table is read as it was then: Delta keeps its versions until their files are vacuumed.
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
from streaming.storage.home import LOG, TABLES, Home
from streaming.storage.table_files import CACHE, local_copies

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")

TIMEOUT_S = 60.0
MEMORY_LIMIT = "1GB"
BATCH_ROWS = 10_000
WORD = re.compile(r"\w+")
ENTRY = re.compile(r"/([0-9]{20})\.json$")

# No spilling to disk, nothing fetched or loaded, no Python variable reachable by its name, one time
# zone for all; GLOBAL, because a cursor does not take over the session's settings of its connection.
CONFINEMENT = f"""
SET GLOBAL memory_limit = '{MEMORY_LIMIT}';
SET GLOBAL temp_directory = '';
SET GLOBAL autoinstall_known_extensions = false;
SET GLOBAL autoload_known_extensions = false;
SET GLOBAL python_enable_replacements = false;
SET GLOBAL TimeZone = 'UTC';
"""


def query(
    settings: Settings,
    sql: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
    at: datetime | None = None,
) -> pa.Table:
    """The rows that a SELECT over the tables gives, all at once; arguments and errors as for `open_query`."""
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
    """The rows that a SELECT over the tables gives, batch by batch, read while the context lasts.

    Args:
        sql: one SELECT (or WITH, FROM, VALUES, DESCRIBE, SHOW TABLES); each Delta table is a view of its own name.
        parameters: the values of `$name` in the SQL.
        timeout_s: from now until the last row is read.
        at: a time with its zone; the tables as they were then, those left out that were not there yet.

    Raises:
        ServiceError: there is no table yet, or a table's files of that time have been vacuumed, the SQL is not a
            single SELECT, names what is not there, or needs more time or memory than it may have; also while the rows
            are read.
    """
    with open_snapshot(settings, at=at) as snapshot, snapshot.query(sql, parameters, timeout_s) as reader:
        yield reader


@contextmanager
def open_snapshot(settings: Settings, *, at: datetime | None = None) -> Iterator["Snapshot"]:
    """The tables of one moment, for several statements; errors as for `open_query`."""
    connection = duckdb.connect(":memory:")
    try:
        connection.execute(CONFINEMENT)
        yield Snapshot(connection, _Views(connection, settings.place, at))
    finally:
        connection.close()


class Snapshot:
    """The tables as they were when they were opened, whatever is committed meanwhile."""

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
    """Interrupts what a connection is doing when its time is up, or at Ctrl-C."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.passed = False
        self._connection = connection
        self._timer = threading.Timer(timeout_s, self._interrupt)
        self._timer.daemon = True
        self._timer.start()
        self._worker = ThreadPoolExecutor(1)

    def call(self, step: Callable[[], T]) -> T:
        """What `step` gives, run in another thread: while DuckDB works, this one could not see a Ctrl-C."""
        result = self._worker.submit(step)
        try:
            return result.result()
        except KeyboardInterrupt:
            self._connection.interrupt()
            raise

    def cancel(self) -> None:
        self._timer.cancel()
        self._timer.join()  # an interrupt must not meet a connection that is being closed
        self._worker.shutdown()

    def _interrupt(self) -> None:
        self.passed = True
        self._connection.interrupt()


class _Views:
    """Each table as a view of its name, over local files; then the connection is shut off from everything else.

    Of a home in a bucket, files are copied only of the tables that a statement names: until then their views are empty.
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
        with ThreadPoolExecutor(len(names)) as pool:  # a bucket takes a while for each
            opened = dict(zip(names, pool.map(self._open, names), strict=True))
        self._tables = {name: table for name, table in opened.items() if table is not None}
        self.names = list(self._tables)
        if not self.names:
            raise NotFoundError(f"no table in {home.tables} was there at {at}: give a later time")
        self._empty = set(self.names)
        if home.is_local:
            readable = [file for name in self.names for file in self._fill(name)]
            connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, readable))}]")
        else:
            for name in self.names:
                self._make(name, [])
            copies = home.work / CACHE / TABLES
            connection.execute(f"SET allowed_directories = [{_quoted(str(copies))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

    def fill(self, sql: str) -> None:
        """Give the views that a statement names their rows."""
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
                _refuse_vacuumed(self._home, name, files, self._at)
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
        # By name: a file from before a column was added gives NULL there. A partition column is in the paths alone.
        rows = self._connection.read_parquet(files, hive_partitioning=True, union_by_name=True)
        types = zip(empty.columns, empty.types, strict=True)
        # A column that no file has yet is NULL, too.
        nulls = [f'NULL::{kind} AS "{column}"' for column, kind in types if column not in rows.columns]
        (rows.project(", ".join(["*", *nulls])) if nulls else rows).create_view(name)

    def _unreadable(self, name: str, error: Exception) -> ServiceError:
        return DamagedError(f"table {name} in {self._home.tables} cannot be read: {_condensed(error)}")


def _table_at(home: Home, name: str, at: datetime | None) -> "DeltaTable | None":
    """The table as it was at a time, None if it was not there yet; without a time, as it is."""
    from deltalake.exceptions import DeltaError

    from streaming.storage.table_log import open_delta

    if at is None:
        return open_delta(home.table(name))
    # As Delta itself dates a version, by its file; asked for an earlier time than it knows, deltalake gives version 0.
    entries = home.store.list(f"{TABLES}/{name}/{LOG}")
    commits = {int(found[1]): one.modified for one in entries if (found := ENTRY.search(one.key))}
    versions = [version for version, modified in commits.items() if modified <= at]
    if not versions and 0 in commits:
        return None
    try:
        return open_delta(home.table(name), max(versions))
    except (ValueError, DeltaError) as error:
        raise NotFoundError(f"table {name} has no history as old as {at}: `maintain` cleaned it") from error


def _refuse_vacuumed(home: Home, name: str, files: list[str], at: datetime) -> None:
    there = {one.key for one in home.store.list(f"{TABLES}/{name}")}
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
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # the Arrow reader gives DuckDB's errors as OSError
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
    """DuckDB's message without the lines that draw where in the SQL the error is."""
    return " ".join(str(error).split("\nLINE ")[0].split())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
