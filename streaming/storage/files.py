"""Parquet files that workers write into a table's directory and the driver commits.

Large values (features, quarantined messages) are not sent to the driver: a worker writes them and returns the file's
name. A file becomes part of its table by a commit; files of failed attempts never do, and are vacuumed later.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.arrays import Features
from streaming.errors import DataError
from streaming.storage.store import check_key, is_uri, open_store

BYTES_AT_A_TIME = 16 * 1024**2
MAX_ROWS_AT_A_TIME = 1024
RAW = "value"  # the column of encoded images
STRICT = {"extra": "forbid", "strict": True}  # pydantic's configuration of dataclasses that are read from a store


@dataclass(frozen=True)
class DataFile:
    """A Parquet file in a table's directory, not yet part of the table.

    Attributes:
        path: relative to the table's directory, parts joined by `/`.
        partition: partition column → value, None for null.
        stats: statistics in JSON for the table's log; by default, the log has only the number of rows.
    """

    path: str
    bytes: int
    rows: int
    partition: dict[str, str | None] = field(default_factory=dict)
    stats: str | None = None

    __pydantic_config__: ClassVar = STRICT


class FileSink:
    """Writes a Parquet file, created with its first row, into a table's directory; None discards the rows."""

    def __init__(self, directory: str | None, schema: pa.Schema) -> None:
        self._directory = directory
        self._schema = schema
        self._name = f"part-{uuid.uuid4()}.zstd.parquet"  # each attempt of a task writes its own file
        self._writer: pq.ParquetWriter | None = None
        self._output: BinaryIO | None = None
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._output is not None and not self._output.closed:
            try:
                if self._writer is not None:
                    self._writer.close()
            finally:
                self._output.__exit__(kind, error, at)

    def write(self, rows: pa.Table) -> None:
        if self._directory is None or not rows.num_rows:
            return
        if self._writer is None:
            self._output = open_store(self._directory).open_output(self._name)
            # Encoded images do not compress. Dictionary encoding of floats takes a hundred times as long as plain
            # encoding. Minimum and maximum of a binary column would be copies of whole images.
            with_statistics = [field.name for field in self._schema if not pa.types.is_binary(field.type)]
            raw = RAW in self._schema.names
            self._writer = pq.ParquetWriter(
                self._output,
                self._schema,
                compression="none" if raw else "zstd",
                use_dictionary=[field.name for field in self._schema if pa.types.is_string(field.type)],
                write_statistics=with_statistics,
            )
        self._writer.write_table(rows.cast(self._schema))
        self._rows += rows.num_rows

    def close(self) -> DataFile | None:
        """Finish the file; None if no row was written."""
        if self._writer is None or self._output is None:
            return None
        self._writer.close()
        size = self._output.tell()
        self._output.close()
        self._writer = None
        return DataFile(self._name, size, self._rows)


def read_batches(
    file: Path, columns: Sequence[str] | None = None, max_rows: int = MAX_ROWS_AT_A_TIME
) -> Iterator[pa.RecordBatch]:
    """Read a Parquet file in batches of about BYTES_AT_A_TIME, if its rows are of similar size.

    A batch is at most a row group; the stream and compaction write groups of about 64 MB.

    Args:
        columns: to read; by default all.
        max_rows: the maximum number of rows in a batch.
    """
    with pq.ParquetFile(file, buffer_size=1024**2) as parquet:
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            rows = max(1, min(max_rows, BYTES_AT_A_TIME // row_bytes))
            yield from parquet.iter_batches(batch_size=rows, row_groups=[number], columns=columns)


def read_as(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read the columns of a schema, as `read_batches` and `conformed` do."""
    return (conformed(batch, schema) for batch in read_batches(file, schema.names))


def conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Rows with the columns of a schema; columns that an older file lacks are null."""
    there = set(batch.schema.names)
    columns = [
        batch.column(field.name).cast(field.type) if field.name in there else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


@contextmanager
def local_copy(place: str, path: str) -> Iterator[Path]:
    """A local path of a table's file: the file itself, or a temporary copy of an object in a bucket.

    Args:
        place: of the table, a path or a URI.
        path: relative to the table.
    """
    if not is_uri(place):
        yield Path(place) / check_key(path)
        return
    with TemporaryDirectory(prefix="imagestream-") as scratch:
        copy = Path(scratch) / "part.parquet"
        open_store(place).fetch(path, copy)
        yield copy


def list_array(rows: Features) -> pa.ListArray:
    """Convert (N, D) float32 to an Arrow list column of N rows, without a Python object per number."""
    n, width = rows.shape
    offsets = pa.array(np.arange(0, (n + 1) * width, width, dtype=np.int32) if width else np.zeros(n + 1, np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rows).reshape(-1)))


def as_matrix(column: Any) -> Features:
    """Convert an Arrow list column of N rows of length D to (N, D) float32.

    Raises:
        ServiceError: the rows have different lengths.
    """
    width = len(column[0])
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(flat) != width * len(column):
        raise DataError(f"features of different widths: {len(column)} rows hold {len(flat)} values, first {width}")
    return np.asarray(flat, np.float32).reshape(len(column), width)
