"""Rescoring: scores past images with another version, from stored features, without CNN, Spark and JVM.

    1. Plan: divide the files of `features` into chunks of limited size, oldest first, and find rows that have been
    scored. 2. Worker threads read a chunk a few thousand rows at a time, and apply the version's projection and
    classifier;
       Parquet and NumPy release Python's GIL.
    3. The chunk's answers are committed to `rescored`, with the chunk's id as the application of the transaction.

A chunk whose transaction the table has is skipped. Rows that have been scored are skipped as well, even if compaction
has moved them to other files. So an interrupted run resumes where it stopped, and a second run adds new rows.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.bundle import Bundle
from models.scorer import Head, check_golden, load_head, load_scorer
from streaming.errors import DamagedError, NotFoundError
from streaming.pipeline.score_columns import answer_columns
from streaming.query import query
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.files import as_matrix, local_copy
from streaming.storage.home import make_dir, try_lock
from streaming.storage.table_log import open_log
from streaming.storage.tables import ANSWER, IDENTITY, RESCORED, Table

ROWS_AT_ONCE = 2_048  # 10 MB of features of length 1,280
CHUNK_BYTES = 64 * 1024**2  # of files per commit
IN_FLIGHT = 2  # chunks per worker, so that no worker waits for a commit
TIMEOUT_S = 3_600.0
ON_ROWS = Callable[[int], None]

OF_BACKBONE = "backbone_sha256 = $backbone AND projection_sha256 IS NULL AND topic IS NOT NULL"
STORED = f"""
SELECT count(*) FILTER ({OF_BACKBONE}) AS usable, count(*) FILTER (topic IS NOT NULL) AS stored FROM features
"""  # noqa: S608  a constant
WITHOUT_FEATURES = f"""
SELECT count(*) AS predicted, count(*) FILTER (f.topic IS NULL) AS missing
FROM predictions p
LEFT JOIN (SELECT topic, "partition", "offset" FROM features WHERE {OF_BACKBONE}) f
USING (topic, "partition", "offset")
"""  # noqa: S608
# Runs of consecutive offsets, whose number depends on the gaps and not on the messages.
DONE = """
WITH numbered AS (
    SELECT topic, "partition", "offset",
           "offset" - row_number() OVER (PARTITION BY topic, "partition" ORDER BY "offset") AS run
    FROM rescored WHERE bundle_sha256 = $bundle
)
SELECT topic, "partition", min("offset") AS first, max("offset") AS last, count(*) AS rows
FROM numbered GROUP BY topic, "partition", run ORDER BY topic, "partition", first
"""


@dataclass(frozen=True)
class Rescored:
    """The result of a run.

    Attributes:
        rows: answers that this run added.
        there_before: answers of this version that existed before.
        missing: predictions without stored features of this backbone, which were not rescored.
    """

    version: int
    bundle_sha256: str
    rows: int
    there_before: int
    missing: int


@dataclass(frozen=True)
class _Chunk:
    """Files that are scored in one commit; `id` identifies them and the model."""

    id: str
    files: list[str]


@dataclass
class _ScoredOffsets:
    """The messages that have been scored: per (topic, partition), the first and last offsets of runs, in order."""

    rows: int = 0
    runs: dict[tuple[str, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)

    def holds(self, topic: str, partition: int, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        if (topic, partition) not in self.runs:
            return np.zeros(len(offsets), bool)
        firsts, lasts = self.runs[topic, partition]
        place = np.searchsorted(firsts, offsets, side="right") - 1
        return (place >= 0) & (offsets <= lasts[place])


def rescore(
    settings: Settings,
    version: int,
    *,
    allow_missing: bool = False,
    workers: int | None = None,
    on_rows: ON_ROWS = lambda _: None,
) -> Rescored:
    """Score every message with stored features with model `version`, and add the answers to the table `rescored`.

    Args:
        allow_missing: whether to continue if some predictions have no features.
        workers: the number of threads; by default one per core.
        on_rows: called with the number of rows read, repeatedly.

    Raises:
        ServiceError: no features are stored, they are of another backbone, some predictions have none (unless
            allowed), or another rescoring is running in this home.
        ModelError: the version does not exist, or is rejected.
    """
    bundle = open_registry(settings.home).read(version)
    check_golden(bundle, load_scorer(bundle))
    missing = check_features(settings, bundle, version, allow_missing=allow_missing)
    lock = make_dir(settings.work_dir) / "rescore.lock"
    with try_lock(lock, "another rescoring is running in this home: wait until it has ended"):
        table = Table(settings.place.tables, "rescored")
        done = _done(settings, bundle.sha256)
        chunks = [chunk for chunk in _chunks(settings, bundle.sha256) if not table.committed(chunk.id, 0)]
        added = 0
        lineage = {"model_version": version, "bundle_sha256": bundle.sha256, "query_id": f"rescore-{uuid4()}"}
        work = _Work(load_head(bundle), bundle, done, on_rows, settings.place.table("features"))
        for number, (chunk, rows) in enumerate(_scored(chunks, work, workers or os.cpu_count() or 1)):
            answers = _with_lineage(rows, lineage | {"batch_id": number})
            if table.append(answers, chunk.id, 0):
                added += answers.num_rows
    return Rescored(version, bundle.sha256, added, done.rows, missing)


def check_features(settings: Settings, bundle: Bundle, version: int, *, allow_missing: bool) -> int:
    """Check that a version can rescore the stored features; return the number of predictions without features.

    Args:
        version: of the model, for errors.
        allow_missing: whether some predictions may have no features.

    Raises:
        ServiceError: see `rescore`.
    """
    there = set(settings.place.table_names())
    if "features" not in there:
        raise NotFoundError(
            f"no features are stored in {settings.place.tables}: run `imagestream stream` with --features, then rescore"
        )
    backbone = {"backbone": bundle.backbone_sha256}
    (stored,) = query(settings, STORED, parameters=backbone, timeout_s=TIMEOUT_S).to_pylist()
    name = bundle.manifest.backbone.name
    if not stored["stored"]:
        raise NotFoundError(
            f"only features of training images are stored in {settings.place.tables}: run `imagestream stream` with "
            "--features, then rescore"
        )
    if not stored["usable"]:
        raise NotFoundError(
            f"version {version} needs features of its backbone {name} ({bundle.backbone_sha256[:12]}), but all "
            f"{stored['stored']:,} stored rows are of another backbone; computing new features requires the images"
        )
    if "predictions" not in there:
        return 0
    (found,) = query(settings, WITHOUT_FEATURES, parameters=backbone, timeout_s=TIMEOUT_S).to_pylist()
    if found["missing"] and not allow_missing:
        raise NotFoundError(
            f"{found['missing']:,} of {found['predicted']:,} predictions have no stored features of backbone {name} "
            f"({bundle.backbone_sha256[:12]}); use --allow-missing to rescore the others"
        )
    return int(found["missing"])


def rows_to_read(settings: Settings) -> int:
    """The number of rows in the table `features`, for a progress bar."""
    (found,) = query(settings, "SELECT count(*) AS n FROM features", timeout_s=TIMEOUT_S).to_pylist()
    return int(found["n"])


def _chunks(settings: Settings, bundle_sha256: str) -> Iterator[_Chunk]:
    """The files of `features` in chunks, oldest first, so that new files do not change earlier chunks."""
    files = open_log(settings.place.table("features")).files()
    gathered: list[str] = []
    size = 0
    for file in sorted(files, key=lambda one: (one.modified, one.path)):
        if gathered and size + file.bytes > CHUNK_BYTES:
            yield _chunk(gathered, bundle_sha256)
            gathered, size = [], 0
        gathered.append(file.path)
        size += file.bytes
    if gathered:
        yield _chunk(gathered, bundle_sha256)


def _chunk(files: list[str], bundle_sha256: str) -> _Chunk:
    names = "\n".join(Path(file).name for file in files)
    return _Chunk(f"rescore:{bundle_sha256}:{hashlib.sha256(names.encode()).hexdigest()}", files)


def _done(settings: Settings, bundle_sha256: str) -> _ScoredOffsets:
    found = query(settings, DONE, parameters={"bundle": bundle_sha256}, timeout_s=TIMEOUT_S)
    done = _ScoredOffsets(rows=int(pc.sum(found.column("rows")).as_py() or 0))
    keys = found.select(["topic", "partition"]).group_by(["topic", "partition"]).aggregate([]).to_pylist()
    for key in keys:
        mask = pc.and_(
            pc.equal(found.column("topic"), key["topic"]), pc.equal(found.column("partition"), key["partition"])
        )
        runs = found.filter(mask)
        done.runs[key["topic"], key["partition"]] = runs.column("first").to_numpy(), runs.column("last").to_numpy()
    return done


@dataclass(frozen=True)
class _Work:
    """The shared, read-only state of the workers."""

    head: Head
    bundle: Bundle
    done: _ScoredOffsets
    on_rows: ON_ROWS
    features: str  # the place of the table


def _scored(chunks: list[_Chunk], work: _Work, workers: int) -> Iterator[tuple[_Chunk, pa.Table]]:
    """Chunks with their answers, in order; at most `IN_FLIGHT` per worker are in progress or waiting."""
    waiting: deque[tuple[_Chunk, Future[pa.Table]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_score_chunk, chunk, work)))
            if len(waiting) >= IN_FLIGHT * workers:
                first, scored = waiting.popleft()
                yield first, scored.result()
        for chunk, scored in waiting:
            yield chunk, scored.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _score_chunk(chunk: _Chunk, work: _Work) -> pa.Table:
    wanted = ["backbone_sha256", "projection_sha256", "features", *(one.name for one in IDENTITY)]
    parts = []
    for file in chunk.files:
        with local_copy(work.features, file) as copy, pq.ParquetFile(copy) as parquet:
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=wanted):
                parts.append(_score_batch(batch, work, file))
                work.on_rows(batch.num_rows)
    return pa.concat_tables(parts)


def _score_batch(batch: pa.RecordBatch, work: _Work, file: str) -> pa.Table:
    usable = _usable(batch, work)
    if not usable.all():
        batch = batch.filter(pa.array(usable))
    if not batch.num_rows:
        return pa.schema([*IDENTITY, *ANSWER]).empty_table()
    features = as_matrix(batch.column("features"))
    if features.shape[1] != work.head.projection.n_in:
        raise DamagedError(
            f"{file} has features of length {features.shape[1]}, but the model expects {work.head.projection.n_in}"
        )
    answers = answer_columns(work.head.probabilities(features), work.head)
    there = set(batch.schema.names)
    identity = [
        batch.column(one.name).cast(one.type) if one.name in there else pa.nulls(batch.num_rows, one.type)
        for one in IDENTITY
    ]
    return pa.table([*identity, *answers], schema=pa.schema([*IDENTITY, *ANSWER]))


def _usable(batch: pa.RecordBatch, work: _Work) -> NDArray[np.bool_]:
    """A mask of the rows of the stream, of this backbone, that have not been scored."""
    of_backbone = pc.equal(batch.column("backbone_sha256"), work.bundle.backbone_sha256)
    raw = pc.is_null(batch.column("projection_sha256"))
    usable = pc.and_(pc.and_(of_backbone, raw), pc.is_valid(batch.column("topic"))).to_numpy(zero_copy_only=False)
    if not work.done.runs:
        return np.asarray(usable, bool)
    topics = pc.dictionary_encode(batch.column("topic"))
    partitions = batch.column("partition").fill_null(-1).to_numpy()
    offsets = batch.column("offset").fill_null(-1).to_numpy()
    numbers = topics.indices.fill_null(-1).to_numpy()
    for number, topic in enumerate(topics.dictionary.to_pylist()):
        for partition in np.unique(partitions[numbers == number]):
            rows = (numbers == number) & (partitions == partition)
            usable[rows] &= ~work.done.holds(topic, int(partition), offsets[rows])
    return np.asarray(usable, bool)


def _with_lineage(rows: pa.Table, lineage: dict[str, Any]) -> pa.Table:
    for name, value in lineage.items():
        one = RESCORED.field(name)
        rows = rows.append_column(one, pa.repeat(pa.scalar(value, one.type), rows.num_rows))
    return rows.select(RESCORED.names)
