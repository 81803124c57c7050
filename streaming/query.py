"""SQL over the Delta tables without a JVM: deltalake lists the files of each table, DuckDB reads them.

The SQL comes from a user and is confined: one SELECT, in a database in memory whose configuration is locked and which
can open the tables' files and nothing else, so it cannot write, attach, install or read other files; it has a limit of
time and one of memory. Rows stream: neither side holds a large result.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import pyarrow as pa

from streaming.errors import ServiceError
from streaming.settings import Settings

TIMEOUT_S = 60.0
MEMORY_LIMIT = "1GB"
BATCH_ROWS = 10_000

# No spilling to disk, nothing fetched or loaded, no Python variable reachable by its name, one time zone for all.
CONFINEMENT = f"""
SET memory_limit = '{MEMORY_LIMIT}';
SET temp_directory = '';
SET autoinstall_known_extensions = false;
SET autoload_known_extensions = false;
SET python_enable_replacements = false;
SET TimeZone = 'UTC';
"""


def query(
    settings: Settings, sql: str, *, parameters: Mapping[str, Any] | None = None, timeout_s: float = TIMEOUT_S
) -> pa.Table:
    """The rows that a SELECT over the tables gives, all at once; arguments and errors as for `open_query`."""
    with open_query(settings, sql, parameters=parameters, timeout_s=timeout_s) as reader:
        return reader.read_all()


@contextmanager
def open_query(
    settings: Settings, sql: str, *, parameters: Mapping[str, Any] | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[pa.RecordBatchReader]:
    """The rows that a SELECT over the tables gives, batch by batch, read while the context lasts.

    Args:
        sql: one SELECT (or WITH, FROM, VALUES, DESCRIBE, SHOW TABLES); each Delta table is a view of its own name.
        parameters: the values of `$name` in the SQL.
        timeout_s: from now until the last row is read.

    Raises:
        ServiceError: there is no table yet, the SQL is not a single SELECT, names what is not there, or needs more time
            or memory than it may have; also while the rows are read.
    """
    connection = duckdb.connect(":memory:")
    limit = _TimeLimit(connection, timeout_s)
    try:
        connection.execute(CONFINEMENT)
        tables = _open_tables(connection, settings.tables_dir)
        statement = _only_select(sql)
        with _errors_in_one_line(tables, limit):
            rows = connection.sql(statement, params=dict(parameters or {})).to_arrow_reader(BATCH_ROWS)
        yield pa.RecordBatchReader.from_batches(rows.schema, _guarded(rows, tables, limit))
    finally:
        limit.cancel()
        connection.close()


class _TimeLimit:
    """Interrupts what a connection is doing when its time is up."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.passed = False
        self._connection = connection
        self._timer = threading.Timer(timeout_s, self._interrupt)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()
        self._timer.join()  # an interrupt must not meet a connection that is being closed

    def _interrupt(self) -> None:
        self.passed = True
        self._connection.interrupt()


def _open_tables(connection: duckdb.DuckDBPyConnection, tables_dir: Path) -> list[str]:
    """Make each Delta table a view over its current files, then shut the connection off from everything else."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    names = sorted(log.parent.name for log in tables_dir.glob("*/_delta_log"))
    if not names:
        raise ServiceError(
            f"no tables yet in {tables_dir}: run `imagestream demo`, or publish images and run `imagestream stream`"
        )
    readable: list[str] = []
    for name in names:
        try:
            table = DeltaTable(tables_dir / name)
            # The names come percent-encoded, as in a URL; on the disk they are plain.
            files = [unquote(uri) for uri in table.file_uris()]
            _make_view(connection, name, pa.schema(table.schema()), files)
        except (DeltaError, duckdb.Error, OSError) as error:
            raise ServiceError(f"table {name} in {tables_dir} cannot be read: {_condensed(error)}") from error
        readable += files
    connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, readable))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return names


def _make_view(connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, files: list[str]) -> None:
    if files:
        # By name: a file from before a column was added gives NULL there. A partition column is in the paths alone.
        connection.read_parquet(files, hive_partitioning=True, union_by_name=True).create_view(name)
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


def _guarded(rows: pa.RecordBatchReader, tables: list[str], limit: _TimeLimit) -> Iterator[pa.RecordBatch]:
    with _errors_in_one_line(tables, limit):
        yield from rows


@contextmanager
def _errors_in_one_line(tables: list[str], limit: _TimeLimit) -> Iterator[None]:
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
