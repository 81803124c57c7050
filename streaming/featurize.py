"""Batch featurization: labelled files in, rows of the table `features` out, on the workers and without the driver."""

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from models.backbone import ExportedBackbone
from models.decode import Reason
from models.engine import LiteRTEngine
from models.scorer import decode_all
from streaming.dataset import LabelledFile
from streaming.files import DataFile, FileSink, list_array
from streaming.tables import FEATURES, Table

IMAGES_PER_READ = 64
IMAGES_PER_TASK = 512  # long enough that starting a task costs little, short enough that the cores end together
REPORT_DDL = "path string, reason string, detail string, file string, bytes long, rows long"


@dataclass(frozen=True)
class Featurized:
    """What became of a list of files."""

    rows: int
    bad: dict[str, str]  # path → why it is not in the table


def featurize(
    spark: SparkSession,
    files: Sequence[LabelledFile],
    backbone: ExportedBackbone,
    table: Table,
    max_bad_shown: int = 100,
) -> Featurized:
    """Append the backbone's features of every image to `table` in one commit.

    Partitions are sized from the number of files and cores. A file that does not decode is left out and reported.
    """
    tasks = task_count(len(files), spark.sparkContext.defaultParallelism)
    flatbuffer = spark.sparkContext.broadcast(backbone.flatbuffer.read_bytes())
    directory, sha256 = str(table.directory), backbone.sha256

    def work(batches: Any) -> Any:
        return featurize_partition(batches, lambda: flatbuffer.value, sha256, directory)

    frame = spark.createDataFrame(
        pa.table({"path": [file.path for file in files], "label": [file.label for file in files]})
    ).repartition(tasks)
    reports = frame.mapInArrow(work, REPORT_DDL).toArrow().to_pylist()
    written = [DataFile(one["file"], one["bytes"], one["rows"]) for one in reports if one["file"]]
    bad = {one["path"]: f"{one['reason']}: {one['detail']}" for one in reports if one["path"]}
    table.append_files(written, app_id=f"featurize:{uuid.uuid4()}", version=0)
    flatbuffer.unpersist()
    return Featurized(sum(file.rows for file in written), dict(sorted(bad.items())[:max_bad_shown]))


def task_count(files: int, cores: int) -> int:
    """How many tasks to cut the files into: a whole number of rounds over the cores, so that they end together."""
    rounds = math.ceil(files / (cores * IMAGES_PER_TASK))
    return max(1, min(files, cores * rounds))


def featurize_partition(
    batches: Iterator[pa.RecordBatch], flatbuffer: Callable[[], bytes], backbone_sha256: str, directory: str
) -> Iterator[pa.RecordBatch]:
    """Featurize the files named in (path, label) batches into one Parquet file; yields what to report of it."""
    engine = LiteRTEngine(flatbuffer())
    reports: list[dict[str, Any]] = []
    with FileSink(directory, FEATURES) as sink:
        for batch in batches:
            for start in range(0, batch.num_rows, IMAGES_PER_READ):
                part = batch.slice(start, IMAGES_PER_READ)
                reports += _featurize_files(part, engine, backbone_sha256, sink)
        written = sink.close()
    if written:
        reports.append({"file": written.path, "bytes": written.bytes, "rows": written.rows})
    names = [field.split()[0] for field in REPORT_DDL.split(", ")]
    kinds = [pa.string(), pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64()]
    yield pa.RecordBatch.from_pylist(reports, pa.schema(list(zip(names, kinds, strict=True))))


def _featurize_files(
    files: pa.RecordBatch, engine: LiteRTEngine, backbone_sha256: str, sink: FileSink
) -> list[dict[str, Any]]:
    paths, labels = files.column("path").to_pylist(), files.column("label").to_pylist()
    reports: list[dict[str, Any]] = []
    values: list[bytes | None] = []
    for path in paths:
        try:
            values.append(Path(path).read_bytes())
        except OSError as error:
            values.append(None)
            reports.append({"path": path, "reason": Reason.MISSING, "detail": os.strerror(error.errno or 0)})
    decoded = decode_all(values, engine.input_size)
    for row, image in decoded.bad.items():
        if values[row] is not None:
            reports.append({"path": paths[row], "reason": image.reason, "detail": image.detail})
    if decoded.rows:
        n = len(decoded.rows)
        ids = [hashlib.sha256(values[row] or b"").hexdigest() for row in decoded.rows]
        given = {
            "image_id": pa.array(ids),
            "source": pa.array([paths[row] for row in decoded.rows]),
            "label_true": pa.array([labels[row] for row in decoded.rows]),
            "backbone_sha256": pa.repeat(backbone_sha256, n),
            "features": list_array(engine(decoded.images)),
        }
        columns = [given.get(field.name, pa.nulls(n, field.type)) for field in FEATURES]
        sink.write(pa.table(columns, schema=FEATURES))
    return reports
