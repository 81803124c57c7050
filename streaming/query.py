"""SQL over the Delta tables without a JVM: deltalake lists the files of each table, DuckDB reads them.

The SQL comes from a user and is confined: one SELECT, in a database in memory whose configuration is locked and which
can open the tables' files and nothing else, so it cannot write, attach, install or read other files; it has a limit of
time and one of memory. Rows stream: neither side holds a large result.

With a time, each table is read as it was then: Delta keeps its versions until their files are vacuumed.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa

from streaming.errors import ServiceError
from streaming.settings import Settings

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")

TIMEOUT_S = 60.0
MEMORY_LIMIT = "1GB"
BATCH_ROWS = 10_000

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
        yield Snapshot(connection, _open_tables(connection, settings.tables_dir, at))
    finally:
        connection.close()


class Snapshot:
    """The tables as they were when they were opened, whatever is committed meanwhile."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, tables: list[str]) -> None:
        self.tables = tables
        self._connection = connection

    @contextmanager
    def query(
        self, sql: str, parameters: Mapping[str, Any] | None = None, timeout_s: float = TIMEOUT_S
    ) -> Iterator[pa.RecordBatchReader]:
        """As `open_query`; a second statement may run while the rows of the first are read."""
        connection = self._connection.cursor()
        limit = _Limit(connection, timeout_s)
        try:
            statement = _only_select(sql)
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


def _open_tables(connection: duckdb.DuckDBPyConnection, tables_dir: Path, at: datetime | None) -> list[str]:
    """Make each Delta table a view over its files, then shut the connection off from everything else."""
    from deltalake.exceptions import DeltaError

    from streaming.storage.tables import data_files

    names = sorted(log.parent.name for log in tables_dir.glob("*/_delta_log"))
    if not names:
        raise ServiceError(
            f"no tables yet in {tables_dir}: run `imagestream demo`, or publish images and run `imagestream stream`"
        )
    there: list[str] = []
    readable: list[str] = []
    for name in names:
        try:
            table = _table_at(tables_dir / name, at)
            if table is None:
                continue
            files = data_files(table, tables_dir / name)
            if at is not None:
                _refuse_vacuumed(name, files, at)
            _make_view(connection, name, pa.schema(table.schema()), files)
        except (DeltaError, duckdb.Error, OSError) as error:
            raise ServiceError(f"table {name} in {tables_dir} cannot be read: {_condensed(error)}") from error
        there.append(name)
        readable += files
    if not there:
        raise ServiceError(f"no table in {tables_dir} was there at {at}: give a later time")
    connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, readable))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return there


def _table_at(directory: Path, at: datetime | None) -> "DeltaTable | None":
    """The table as it was at a time, None if it was not there yet; without a time, as it is."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    if at is None:
        return DeltaTable(directory)
    # As Delta itself dates a version, by its file; asked for an earlier time than it knows, deltalake gives version 0.
    commits = {int(path.stem): path for path in directory.glob(f"_delta_log/{'[0-9]' * 20}.json")}
    versions = [version for version, path in commits.items() if path.stat().st_mtime <= at.timestamp()]
    if not versions and 0 in commits:
        return None
    try:
        return DeltaTable(directory, version=max(versions))
    except (ValueError, DeltaError) as error:
        raise ServiceError(f"table {directory.name} has no history as old as {at}: `maintain` cleaned it") from error


def _refuse_vacuumed(name: str, files: list[str], at: datetime) -> None:
    gone = sum(not Path(file).is_file() for file in files)
    if gone:
        raise ServiceError(
            f"table {name} cannot be read as of {at}: {gone} of its {len(files)} files have been vacuumed since;"
            " `imagestream maintain --retention-hours` says how long they are kept"
        )


def _make_view(connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, files: list[str]) -> None:
    if files:
        # By name: a file from before a column was added gives NULL there. A partition column is in the paths alone.
        rows = connection.read_parquet(files, hive_partitioning=True, union_by_name=True)
        # A column that no file has yet is NULL, too.
        columns = connection.from_arrow(pa.Table.from_batches([], schema))
        types = zip(columns.columns, columns.types, strict=True)
        nulls = [f'NULL::{kind} AS "{column}"' for column, kind in types if column not in rows.columns]
        (rows.project(", ".join(["*", *nulls])) if nulls else rows).create_view(name)
    else:
        connection.from_arrow(pa.Table.from_batches([], schema)).create(name)


def _only_select(sql: str) -> duckdb.Statement:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise ServiceError(f"SQL: {_condensed(error)}") from error
    if len(statements) != 1:
        raise ServiceError(f"SQL: expected one SELECT statement, got {len(statements)} statements")
    (statement,) = statements
    if statement.type != duckdb.StatementType.SELECT:
        kind = statement.type.name.replace("_", " ")
        raise ServiceError(f"SQL: expected a SELECT, got {kind}; queries read the tables and never change anything")
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
        raise ServiceError(f"SQL: {message}") from error


def _condensed(error: Exception) -> str:
    """DuckDB's message without the lines that draw where in the SQL the error is."""
    return " ".join(str(error).split("\nLINE ")[0].split())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
