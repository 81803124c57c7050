"""The Delta tables for many small questions: handles stay open and follow the log, DuckDB reads the files.

`streaming.query` opens every table anew for each query of a user, whose SQL it confines. Here the SQL is the
dashboard's own, with values as parameters only, so what has been read of the log and of the files' footers is kept
between questions: with a million rows a page comes in a moment.
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
from streaming.storage.store_errors import StoreAwayError
from streaming.storage.table_files import local_copies
from streaming.storage.table_log import answers, open_delta
from streaming.storage.tables import SCHEMAS, data_files

TIMEOUT_S = 20.0
FRESH_IN_BUCKET_S = 1.0  # for so long a table in a bucket is not asked for its version again
SETTINGS = """
SET memory_limit = '1GB';
SET temp_directory = '';
SET autoinstall_known_extensions = false;
SET autoload_known_extensions = false;
SET python_enable_replacements = false;
SET TimeZone = 'UTC';
SET parquet_metadata_cache = true;
"""  # a file of a Delta table never changes, so what its footer says may be kept


class Reader:
    """Answers SQL over the tables of a home, each a view of its name; a table that is not there is empty.

    Threads may share one.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._asked: dict[str, float] = {}  # when the log was read last
        self._lock = threading.Lock()
        self._handles: dict[str, tuple[DeltaTable, int]] = {}
        self._viewed: dict[str, tuple[str, int]] = {}  # table → (which table, the version that its view shows)
        self._database = duckdb.connect(":memory:")
        self._database.execute(SETTINGS)
        for name, (schema, _) in SCHEMAS.items():
            self._view_nothing(name, schema)

    def version(self, *names: str) -> tuple[tuple[str, int], ...]:
        """What changes whenever one of these tables does; their views show this version from now on.

        Raises:
            ServiceError: a table cannot be read.
        """
        with self._lock:
            return tuple(self._follow(name) for name in names)

    def rows(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows of a SELECT over the tables as `version` last saw them; `parameters` are the values of `$name`.

        Raises:
            ServiceError: a table cannot be read, or the answer takes longer than TIMEOUT_S.
        """
        found: list[dict[str, Any]] = self.table(sql, **parameters).to_pylist()
        return found

    def table(self, sql: str, **parameters: Any) -> pa.Table:
        """As `rows`, but as an Arrow table."""
        cursor = self._database.cursor()
        limit = threading.Timer(TIMEOUT_S, cursor.interrupt)
        limit.daemon = True
        limit.start()
        try:
            return cursor.sql(sql, params=parameters).to_arrow_table()
        except duckdb.InterruptException as error:
            raise UnavailableError(
                f"the tables did not answer within {TIMEOUT_S:g} s: compact them with maintain"
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
            made = self._made(name)
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
                with answers(place):
                    table.update_incremental()
            seen = (f"{made}", table.version())
            if self._viewed.get(name) != seen:
                self._view(name, table)
                self._viewed[name] = seen
        except (DeltaError, duckdb.Error, OSError, StoreAwayError) as error:
            self._handles.pop(name, None)  # created again under its name, perhaps: the next question opens it again
            raise UnavailableError(f"table {name} in {self.home.tables} cannot be read: {_line(error)}") from error
        return seen

    def _made(self, name: str) -> int | None:
        """What another table under this name would not share, which its handle would miss; None if there is no table.

        In a bucket nothing of the kind is known without opening the table.
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
        # By name: a file from before a column was added gives NULL there. A partition column is in the paths alone.
        relation = self._database.read_parquet(files, hive_partitioning=True, union_by_name=True)
        relation.create_view(name, replace=True)

    def _view_nothing(self, name: str, schema: pa.Schema) -> None:
        empty = f"no_{name}"
        self._database.execute(f"DROP TABLE IF EXISTS {empty}")
        self._database.from_arrow(pa.Table.from_batches([], schema)).create(empty)
        self._database.table(empty).create_view(name, replace=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\nLINE ")[0].split())[:300]
