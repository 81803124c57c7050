"""A task of a batch featurization, run in a Python worker: encoded images to a committed Parquet file."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import Accumulator, TaskContext

from models.augment import Augmentation, augment
from models.bundle import BackboneEntry
from models.decode import DEFAULT_LIMITS, Limits, Reason
from models.scorer import Engine, Images, decode_all, load_engine
from streaming.images.model_cache import cached_model
from streaming.images.sources import read_source
from streaming.storage.files import FileSink, list_array
from streaming.storage.tables import FEATURES, TIMESTAMP, Table

IMAGES_PER_READ = 64
BAD_PER_TASK = 100  # maximum number of bad images reported by name
REPORT = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("why", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("reused", pa.int64()),
        pa.field("copies", pa.int64()),
        pa.field("bad", pa.int64()),
    ]
)
REPORT_DDL = "path string, why string, rows long, reused long, copies long, bad long"


@dataclass(frozen=True)
class FeaturizeTask:
    """Parameters of a task besides the network's file; the same for all tasks of a run."""

    run: str
    started_at: datetime
    tables: str  # a path or a URI
    table: str  # name of the table of features
    from_files: bool  # whether the sources are paths of files that the worker reads
    backbone_sha256: str
    entry: BackboneEntry
    copies: int
    augmentation: Augmentation
    limits: Limits = DEFAULT_LIMITS


@dataclass
class _Report:
    """A task's report to the driver: counts, and the first bad images by name."""

    rows: int = 0
    reused: int = 0
    copies: int = 0
    bad: int = 0
    named: dict[str, str] = field(default_factory=dict)

    def add_bad(self, path: str, reason: str, detail: str) -> None:
        self.bad += 1
        if len(self.named) < BAD_PER_TASK:
            self.named[path] = f"{reason}: {detail}"

    def as_batch(self) -> pa.RecordBatch:
        counts = {"rows": self.rows, "reused": self.reused, "copies": self.copies, "bad": self.bad}
        named = [{"path": path, "why": why} for path, why in self.named.items()]
        return pa.RecordBatch.from_pylist([counts, *named], REPORT)


@dataclass(frozen=True)
class _Image:
    """An encoded image; `content` is None if it cannot be read, `known` if its features are already in the table."""

    source: str
    label: str | None
    content: bytes | None
    image_id: str
    known: bool


@dataclass(frozen=True)
class _Pass:
    """The state of one pass over a partition."""

    task: FeaturizeTask
    engine: Engine
    sink: FileSink
    report: _Report


def featurize_partition(
    batches: Iterator[pa.RecordBatch], network: Callable[[], bytes], task: FeaturizeTask, done: "Accumulator[int]"
) -> Iterator[pa.RecordBatch]:
    """Featurize a partition's images into one Parquet file, commit it, and yield the report, of the schema `REPORT`.

    Args:
        batches: columns source, label, content and, if the table is not empty, known_id and known_label.
        network: returns the content of the network's file.
    """
    context = TaskContext.get()
    part = context.partitionId() if context is not None else 0
    engine = cached_model("engine", task.backbone_sha256, lambda: load_engine(task.entry, network()))
    report = _Report()
    with FileSink(f"{task.tables}/{task.table}", FEATURES) as sink:
        for batch in batches:
            for start in range(0, batch.num_rows, IMAGES_PER_READ):
                images = batch.slice(start, IMAGES_PER_READ)
                _featurize(images.to_pylist(), _Pass(task, engine, sink, report))
                done += images.num_rows
        written = sink.close()
    if written is not None:
        # The transaction id makes a retry a no-op if the first attempt committed before it was lost.
        Table(task.tables, task.table).append_files([written], f"featurize:{task.run}:{part}", 0)
    yield report.as_batch()


def _featurize(rows: list[dict[str, Any]], on: _Pass) -> None:
    """Featurize images that are not known yet, and the augmented copies of all."""
    images = [_read(row, on) for row in rows]
    wanted = [image for image in images if image.content is not None and (on.task.copies or not image.known)]
    on.report.reused += sum(image.known for image in images)
    task = on.task
    contents = [image.content for image in wanted]
    decoded = decode_all(contents, on.engine.input_size, task.entry.fitting, task.limits)
    for row, bad in decoded.bad.items():
        on.report.add_bad(wanted[row].source, bad.reason, bad.detail)
    good = [wanted[row] for row in decoded.rows]
    new = [at for at, image in enumerate(good) if not image.known]
    on.report.rows += _write([good[at] for at in new], decoded.images[new], on)
    for copy in range(1, on.task.copies + 1):
        altered = [
            augment(pixels, image.image_id, copy, on.task.augmentation)
            for image, pixels in zip(good, np.rint(decoded.images).astype(np.uint8), strict=True)
        ]
        on.report.copies += _write(good, np.array(altered, np.uint8), on, copy)


def _read(row: dict[str, Any], on: _Pass) -> _Image:
    source, content = row["source"], row["content"]
    if on.task.from_files:
        try:
            content = read_source(source)
        except OSError as error:
            on.report.add_bad(source, Reason.MISSING, os.strerror(error.errno or 0))
            return _Image(source, row["label"], None, "", known=False)
    elif content is None:
        on.report.add_bad(source, Reason.MISSING, "the row contains no image")
    image_id = hashlib.sha256(content or b"").hexdigest()
    known = row.get("known_id") == image_id and row["known_label"] == row["label"]
    return _Image(source, row["label"], content, image_id, known)


def _write(images: list[_Image], pixels: Images, on: _Pass, copy: int | None = None) -> int:
    """Write a row of features per image, report those that are not finite, and return the number written."""
    if not images:
        return 0
    features = on.engine(pixels)
    finite = np.isfinite(features).all(axis=1)
    for at in np.flatnonzero(~finite):
        detail = "the backbone's features of this image are not finite"
        on.report.add_bad(images[at].source, Reason.NON_FINITE_FEATURES, detail)
    images, features = [images[at] for at in np.flatnonzero(finite)], features[finite]
    n = len(images)
    given = {
        "image_id": pa.array([image.image_id for image in images], pa.string()),
        "published_at": pa.repeat(pa.scalar(on.task.started_at, TIMESTAMP), n),
        "source": pa.array([image.source for image in images], pa.string()),
        "label_true": pa.array([image.label for image in images], pa.string()),
        "backbone_sha256": pa.repeat(on.task.backbone_sha256, n),
        "features": list_array(features),
        "augmentation": pa.repeat(pa.scalar(copy, pa.int32()), n),
        "content_sha256": pa.array([image.image_id for image in images], pa.string()),
    }
    columns = [given.get(one.name, pa.nulls(n, one.type)) for one in FEATURES]
    on.sink.write(pa.table(columns, schema=FEATURES))
    return n
