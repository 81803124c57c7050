"""Rows as people and programs read them: a table on the terminal, CSV, JSON or Parquet."""

import base64
import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_ROWS = 50  # rows that a table on the terminal shows
CELL_CHARS = 60
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # what a cell with a formula begins with


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


def write_rows(
    reader: "pa.RecordBatchReader", format_: Format, output: Path | None, *, spreadsheet: bool = False
) -> int:
    """Write every row in the format to `output`, or to standard output; the number of rows.

    A file appears whole or not at all.

    Args:
        spreadsheet: in CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    writers = WRITERS | ({Format.CSV: partial(_write_csv, spreadsheet=True)} if spreadsheet else {})
    if output is None:
        return writers[format_](reader, sys.stdout)
    with _whole(output) as unfinished:
        if format_ is Format.PARQUET:
            return _write_parquet(reader, unfinished)
        with unfinished.open("w", encoding="utf-8", newline="") as stream:
            return writers[format_](reader, stream)


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_table(reader: "pa.RecordBatchReader", stream: IO[str]) -> int:
    """The first TABLE_ROWS rows, each cell cut at CELL_CHARS, and how many more there are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for field in reader.schema:
        table.add_column(Text(field.name), no_wrap=True, justify="right" if _is_number(field.type) else "left")
    rows = 0
    for batch in reader:
        for row in _rows(batch.slice(0, max(0, TABLE_ROWS - rows))):
            table.add_row(*(Text(_cell(value)) for value in row))
        rows += batch.num_rows
    # As wide as its cells ask for: a table squeezed into the terminal loses what it should show.
    console = Console(file=stream, width=10_000)
    console.print(table)
    more = f", {rows - TABLE_ROWS:,} more not shown (--format csv shows all)" if rows > TABLE_ROWS else ""
    console.print(f"{rows:,} row{'' if rows == 1 else 's'}{more}", highlight=False)
    return rows


def _write_csv(reader: "pa.RecordBatchReader", stream: IO[str], *, spreadsheet: bool = False) -> int:
    """RFC 4180 with a header line: NULL is empty, a list or struct is JSON, bytes are base64."""
    writer = csv.writer(stream, lineterminator="\n")
    shown = _without_formula if spreadsheet else _text
    writer.writerow(map(shown, reader.schema.names))
    rows = 0
    for batch in reader:
        for row in _rows(batch):
            writer.writerow([shown(value) for value in row])
        rows += batch.num_rows
    return rows


def _write_json(reader: "pa.RecordBatchReader", stream: IO[str]) -> int:
    """One array of objects, a line each: times are ISO 8601, bytes base64, NaN and infinity null."""
    names = reader.schema.names
    rows = 0
    stream.write("[")
    for batch in reader:
        for row in _rows(batch):
            stream.write(",\n" if rows else "\n")
            stream.write(json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False))
            rows += 1
    stream.write("\n]\n")
    return rows


def _write_parquet(reader: "pa.RecordBatchReader", path: Path) -> int:
    import pyarrow.parquet as pq

    rows = 0
    with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


WRITERS = {Format.TABLE: _write_table, Format.CSV: _write_csv, Format.JSON: _write_json}


def _rows(batch: "pa.RecordBatch") -> Iterable[tuple[Any, ...]]:
    # By column, not by name: a SELECT may give two columns the same name.
    return zip(*map(_values, batch.columns), strict=True)


def _values(column: "pa.Array") -> list[Any]:
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "us":
        # For a timestamp `to_pylist` imports pandas, which takes longer than most queries.
        epoch = datetime(1970, 1, 1, tzinfo=UTC if column.type.tz else None)
        return [None if us is None else epoch + timedelta(microseconds=us) for us in column.view("int64").to_pylist()]
    return list(column.to_pylist(maps_as_pydicts="lossy"))


def _is_number(type_: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_))


def _plain(value: Any) -> Any:
    """The value as JSON knows it."""
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
    """Text as a spreadsheet shows it and does not compute it (OWASP, CSV Injection)."""
    text = _text(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(FORMULA) else text


def _cell(value: Any) -> str:
    match value:
        case bytes():
            text = f"<{len(value):,} bytes>"
        case float():
            text = f"{value:.6g}"
        case datetime():
            text = value.strftime("%Y-%m-%d %H:%M:%S")
        case _:
            text = _text(value)
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…"
