"""Writes projected features, in order of path, as a CSV file, a Parquet file or a Delta table.

The workers write the parts, and the driver joins them: CSV by copying bytes, Parquet by row groups.
"""

import csv
import io
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from pyspark import TaskContext
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.projection import Projection
from streaming.errors import reported
from streaming.jobs.output import FileFormat
from streaming.storage.atomic_file import replacement
from streaming.storage.files import DataFile, as_matrix, list_array
from streaming.storage.store import Store, open_store
from streaming.storage.table_log import storage_options
from streaming.storage.tables import added

SCHEMA = pa.schema(
    [("path", pa.string()), ("label", pa.string()), ("image_id", pa.string()), ("features", pa.list_(pa.float32()))]
)
ROWS_DDL = "path string, label string, image_id string, features array<float>"
BYTES_PER_PART = 64 * 1024**2
COLUMN = {"pca": "pca", "random": "random", "none": "feature"}  # kind of projection → its columns in a CSV


def write_feature_files(
    rows: DataFrame, n: int, projection: Projection, output: Path | str, format_: FileFormat
) -> int:
    """Project the rows, write them to `output` in order of path, replacing it atomically, and return their number.

    Args:
        rows: source, image_id, label, features (array<float>).
        n: approximate number of rows.
        output: a path, or a URI.
    """
    if isinstance(output, str):
        return _write_in_bucket(rows, n, projection, output, format_)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as staging:
        parts = _write_parts(rows, n, projection, staging, format_)
        paths = [Path(staging, part) for part, _ in parts]
        match format_:
            case "csv":
                with replacement(output) as unfinished, unfinished.open("wb") as whole:
                    _join_csv(paths, _header(projection), whole)
            case "parquet":
                with replacement(output) as unfinished, unfinished.open("wb") as whole:
                    _join_parquet(paths, whole)
            case "delta":
                _commit_delta(parts, output, Path(staging))
    return sum(count for _, count in parts)


def _write_in_bucket(rows: DataFrame, n: int, projection: Projection, output: str, format_: FileFormat) -> int:
    """Write to a bucket: the parts are objects next to the output, which the driver joins, or files of the table."""
    if format_ == "delta":
        parts = _write_parts(rows, n, projection, output, format_)
        _commit_delta(parts, output)
        return sum(count for _, count in parts)
    folder, _, name = output.rpartition("/")
    staging = f"{output}.{uuid.uuid4().hex}"
    store = open_store(staging)
    try:
        parts = _write_parts(rows, n, projection, staging, format_)
        with open_store(folder).open_output(name) as whole, tempfile.TemporaryDirectory() as scratch:
            paths = _fetched(store, [part for part, _ in parts], Path(scratch))
            if format_ == "csv":
                _join_csv(paths, _header(projection), whole)
            else:
                _join_parquet(paths, whole)
    finally:
        store.delete([one.key for one in store.list()])
    return sum(count for _, count in parts)


def _fetched(store: Store, names: Iterable[str], scratch: Path) -> Iterator[Path]:
    """Local copies, each fetched when it is needed."""
    for name in names:
        store.fetch(name, scratch / name)
        yield scratch / name


def _commit_delta(parts: Sequence[tuple[str, int]], output: Path | str, staging: Path | None = None) -> None:
    """Replace the table's content by the parts in one commit; they are in its folder, or moved there from `staging`."""
    table = DeltaTable.create(output, SCHEMA, mode="ignore", storage_options=storage_options(str(output)))
    store = open_store(output)
    actions: list[AddAction | RemoveAction] = []
    for name, rows in parts:
        if rows:
            if staging is not None:
                (staging / name).rename(Path(output, name))
            actions.append(added(DataFile(name, store.size(name) or 0, rows)))
    table.create_write_transaction(actions, "overwrite", table.schema())


def _write_parts(
    rows: DataFrame, n: int, projection: Projection, staging: str, format_: FileFormat
) -> list[tuple[str, int]]:
    """(name, rows) of the files that the workers write, in order of path."""
    spark = rows.sparkSession
    tasks = max(spark.sparkContext.defaultParallelism, n * projection.n_out * 4 // BYTES_PER_PART)
    shared = spark.sparkContext.broadcast(projection)
    suffix = "csv" if format_ == "csv" else "parquet"

    def project(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                projected = list_array(shared.value.transform(as_matrix(batch.column("features"))))
                columns = [batch.column(name) for name in ("source", "label", "image_id")]
                yield pa.RecordBatch.from_arrays([*columns, projected], schema=SCHEMA)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        part = context.partitionId() if context is not None else 0
        name = f"part-{part:05d}-{uuid.uuid4()}.{suffix}"
        with open_store(staging).open_output(name) as file:
            written = _write_part(batches, file, format_)
        yield pa.RecordBatch.from_pydict({"part": [part], "name": [name], "rows": [written]})

    # The part of each path is computed from the paths alone, so that the wide rows are shuffled only once.
    place = F.ntile(tasks).over(Window.orderBy("source")) - 1
    places = rows.select("source").withColumn("part", place)
    narrow = rows.select("source", "label", "image_id", "features").mapInArrow(reported(project), ROWS_DDL)
    placed = narrow.join(F.broadcast(places.withColumnRenamed("source", "path")), "path")
    ordered = placed.repartitionById(tasks, "part").sortWithinPartitions("path").select(*SCHEMA.names)
    found = ordered.mapInArrow(reported(write), "part long, name string, rows long").toArrow().to_pylist()
    shared.unpersist()
    return [(one["name"], one["rows"]) for one in sorted(found, key=lambda one: one["part"])]


def _write_part(batches: Iterator[pa.RecordBatch], output: BinaryIO, format_: FileFormat) -> int:
    count = 0
    if format_ == "csv":
        file = io.TextIOWrapper(output, encoding="utf-8", newline="")
        writer = csv.writer(file, lineterminator="\n")
        for batch in batches:
            if batch.num_rows:
                # NumPy prints float32 with few digits; as Python floats, the values would have the digits of float64.
                values = np.asarray(as_matrix(batch.column("features"))).astype(str).tolist()
                names = zip(batch.column("path").to_pylist(), batch.column("label").to_pylist(), strict=True)
                writer.writerows([*name, *row] for name, row in zip(names, values, strict=True))
                count += batch.num_rows
        file.flush()
        file.detach()
        return count
    with pq.ParquetWriter(output, SCHEMA, compression="zstd", use_dictionary=["label"]) as parquet:
        for batch in batches:
            parquet.write_batch(batch.cast(SCHEMA))
            count += batch.num_rows
    return count


def _header(projection: Projection) -> bytes:
    names = [f"{COLUMN[projection.kind]}_{number}" for number in range(1, projection.n_out + 1)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["path", "label", *names])
    return text.getvalue().encode()


def _join_csv(parts: Iterable[Path], header: bytes, whole: BinaryIO) -> None:
    whole.write(header)
    for part in parts:
        with part.open("rb") as file:
            shutil.copyfileobj(file, whole)
        part.unlink()


def _join_parquet(parts: Iterable[Path], output: BinaryIO) -> None:
    with pq.ParquetWriter(output, SCHEMA, compression="zstd", use_dictionary=["label"]) as whole:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches():
                    whole.write_batch(batch)
            part.unlink()
