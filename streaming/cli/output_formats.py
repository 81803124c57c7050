"""Writers of rows: a table for people; CSV, JSON, NDJSON or Parquet for programs."""

import base64
import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streaming.cli.console import claim_stdout, draw, new_table, out, printable
from streaming.errors import UsageError
from streaming.storage.atomic_file import replacement
from streaming.wording import counted

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_ROWS = 50  # maximum number of rows of a table on a terminal; a pipe or file gets all
CELL_CHARS = 64  # maximum length of a cell on a terminal: an image id fits
STDOUT = Path("-")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # first characters of a spreadsheet formula


class Format(StrEnum):
    """An output format of rows."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    NDJSON = "ndjson"
    PARQUET = "parquet"


@dataclass(frozen=True)
class Rows:
    """Rows of one query or listing; can be iterated once.

    Attributes:
        names: column names, not necessarily unique.
        arrow: the same rows as Arrow record batches, for Parquet.
        numbers: indices of the columns that a table aligns to the right.
    """

    names: Sequence[str]
    values: Iterable[tuple[Any, ...]]
    arrow: "pa.RecordBatchReader | _Listed"
    numbers: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of_arrow(cls, reader: "pa.RecordBatchReader") -> "Rows":
        numbers = frozenset(place for place, one in enumerate(reader.schema) if _is_number(one.type))
        # By index: a SELECT may give two columns the same name.
        values = (row for batch in reader for row in zip(*map(_values, batch.columns), strict=True))
        return cls(reader.schema.names, values, reader, numbers)

    @classmethod
    def of_mappings(cls, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, type]) -> "Rows":
        """Return the rows of a listing.

        Arrow is imported only if Parquet is written.

        Args:
            rows: a mapping from column name to value per row; missing values are None.
            columns: the type of each column: `int`, `float`, `bool`, `str`, `datetime`, or `list` for a list of
                strings.
        """
        values = [tuple(row.get(name) for name in columns) for row in rows]
        numbers = frozenset(place for place, type_ in enumerate(columns.values()) if type_ in {int, float})
        return cls(list(columns), values, _Listed(rows, columns), numbers)


@dataclass(frozen=True)
class _Listed:
    """Rows of a listing that are converted to Arrow record batches on iteration."""

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, type]

    @property
    def schema(self) -> "pa.Schema":
        import pyarrow as pa

        types = {
            int: pa.int64(),
            float: pa.float64(),
            bool: pa.bool_(),
            str: pa.string(),
            datetime: pa.timestamp("us", "UTC"),
            list: pa.list_(pa.string()),
        }
        return pa.schema([(name, types[type_]) for name, type_ in self.columns.items()])

    def __iter__(self) -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        rows = [{name: row.get(name) for name in self.columns} for row in self.rows]
        yield from pa.Table.from_pylist(rows, schema=self.schema).to_batches()


def write_rows(
    rows: "Rows | pa.RecordBatchReader", format_: Format, output: Path | None, *, spreadsheet: bool = False
) -> int:
    """Write all rows and return their number. A file is written atomically.

    Args:
        rows: the rows; consumed.
        output: the file; None or `-` for standard output. Parquet, which is binary, requires a file or `-`.
        spreadsheet: prefix text that a spreadsheet would evaluate as a formula with an apostrophe; CSV only.

    Raises:
        UsageError: the options contradict each other.
    """
    check_format(format_, output, spreadsheet=spreadsheet)
    if not isinstance(rows, Rows):
        rows = Rows.of_arrow(rows)
    writers = WRITERS | ({Format.CSV: partial(_write_csv, spreadsheet=True)} if spreadsheet else {})
    if output is None or output == STDOUT:
        if format_ is Format.TABLE:
            return _write_table(rows, out.file)
        claim_stdout("rows")
        if format_ is Format.PARQUET:
            return _write_parquet(rows, sys.stdout.buffer)
        return writers[format_](rows, sys.stdout)
    with replacement(output) as unfinished:
        if format_ is Format.PARQUET:
            with unfinished.open("wb") as file:
                return _write_parquet(rows, file)
        with unfinished.open("w", encoding="utf-8", newline="") as stream:
            return writers[format_](rows, stream)


def check_format(format_: Format, output: Path | None, *, spreadsheet: bool = False) -> None:
    """Check the options of `write_rows` before any row is read.

    Args:
        output: the file; None for standard output.
        spreadsheet: whether formulas are prefixed with an apostrophe.

    Raises:
        UsageError: the options contradict each other.
    """
    if spreadsheet and format_ is not Format.CSV:
        raise UsageError(f"--spreadsheet requires --format csv, got --format {format_}")
    if format_ is Format.PARQUET and output is None:
        raise UsageError("--format parquet is binary: give a file with --output FILE, or --output - for a pipe")


def _write_table(rows: Rows, stream: IO[str]) -> int:
    """Write all rows; on a terminal only the first TABLE_ROWS, with cells cut at CELL_CHARS, and the number of
    others."""
    from rich.text import Text

    table = new_table(lined=True)
    limit = TABLE_ROWS if stream.isatty() else None
    for place, name in enumerate(rows.names):
        table.add_column(Text(printable(name)), no_wrap=True, justify="right" if place in rows.numbers else "left")
    count = 0
    for row in rows.values:
        count += 1
        if limit is None or count <= limit:
            table.add_row(*(Text(_cell(value, None if limit is None else CELL_CHARS)) for value in row))
    draw(table, stream)
    more = f", {count - limit:,} more not shown (--format csv shows all)" if limit and count > limit else ""
    stream.write(f"{counted(count, 'row')}{more}\n")
    return count


def _write_csv(rows: Rows, stream: IO[str], *, spreadsheet: bool = False) -> int:
    """RFC 4180 with a header line: NULL is empty, a list or struct is JSON, bytes are base64."""
    writer = csv.writer(stream, lineterminator="\n")
    shown = _without_formula if spreadsheet else _text
    writer.writerow(map(shown, rows.names))
    count = 0
    for row in rows.values:
        writer.writerow([shown(value) for value in row])
        count += 1
    return count


def _write_json(rows: Rows, stream: IO[str]) -> int:
    """Write an array with one object per line: times are ISO 8601, bytes base64, NaN and infinity null."""
    count = 0
    stream.write("[")
    for row in rows.values:
        stream.write((",\n" if count else "\n") + _object(rows.names, row))
        count += 1
    stream.write("\n]\n")
    return count


def _write_ndjson(rows: Rows, stream: IO[str]) -> int:
    """Write one JSON object per line."""
    count = 0
    for row in rows.values:
        stream.write(_object(rows.names, row) + "\n")
        count += 1
    return count


def _object(names: Sequence[str], row: tuple[Any, ...]) -> str:
    return json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False)


def _write_parquet(rows: Rows, stream: IO[bytes]) -> int:
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(stream, rows.arrow.schema, compression="zstd") as writer:
        for batch in rows.arrow:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


WRITERS = {Format.TABLE: _write_table, Format.CSV: _write_csv, Format.JSON: _write_json, Format.NDJSON: _write_ndjson}


def _values(column: "pa.Array") -> list[Any]:
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "us":
        # For timestamps, `to_pylist` imports pandas, which takes longer than most queries.
        epoch = datetime(1970, 1, 1, tzinfo=UTC if column.type.tz else None)
        return [None if us is None else epoch + timedelta(microseconds=us) for us in column.view("int64").to_pylist()]
    return list(column.to_pylist(maps_as_pydicts="lossy"))


def _is_number(type_: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_))


def _plain(value: Any) -> Any:
    """Convert a value to one that JSON can represent."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else _spelled(value)


def _spelled(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if isinstance(value, date | time) else str(value)  # a datetime is a date


def _text(value: Any) -> str:
    plain = _plain(value)
    if plain is None:
        return "" if value is None else str(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _without_formula(value: Any) -> str:
    """Return text that a spreadsheet displays and does not evaluate (OWASP, CSV Injection)."""
    text = _text(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(FORMULA) else text


def _cell(value: Any, limit: int | None) -> str:
    match value:
        case bytes():
            text = f"<{len(value):,} bytes>"
        case float():
            text = f"{value:.6g}"
        case datetime():
            text = value.strftime("%Y-%m-%d %H:%M:%S")
        case _:
            text = _text(value)
    text = printable(text)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
