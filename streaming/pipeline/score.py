"""The iterator UDF: takes the messages of one partition and returns scored rows, in one pass.

It runs in Python workers. The bundle is broadcast and loaded once per worker process, and reloaded only when its hash
changes. Scored rows are small and are returned to the driver. Large values stay on the worker: features and quarantined
messages are written to Parquet files in their table's directory, and only the names of the files are returned.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.arrays import Features
from models.bundle import Bundle
from models.decode import DEFAULT_LIMITS, BadImage, Limits, Reason, Stage
from models.drift import DriftReference, DriftSums
from models.errors import ModelError
from models.scorer import Decoded, Scorer, load_reference, load_scorer
from streaming.pipeline.decisions import ModelVersion
from streaming.pipeline.messages import (
    MessageValues,
    bounded_headers,
    unreadable,
    with_envelopes_named,
    without_envelopes,
)
from streaming.pipeline.payload import RAW, Payload
from streaming.pipeline.reconcile import OffsetRun, ReadCounter
from streaming.pipeline.score_columns import answer_columns, feature_rows, identity_columns, quarantined_rows, sha256_of
from streaming.platform.engines import EngineChoice
from streaming.storage.files import DataFile, FileSink
from streaming.storage.tables import ANSWER, DAMAGED, FEATURES, IDENTITY, QUARANTINE, TRACEPARENT
from streaming.tracing import valid

NOTHING: Mapping[tuple[str, int, int], str] = MappingProxyType({})
MAX_ERROR_CHARS = 300  # of the challenger's error
MAX_TRACED = 100  # messages per partition whose traces get a span for scoring
REPORT = pa.field("report", pa.string())
SHADOW_ANSWER = [pa.field("shadow_label", pa.string()), pa.field("shadow_confidence", pa.float32())]
OUTPUT = pa.schema([*IDENTITY, *ANSWER, DAMAGED, TRACEPARENT, *SHADOW_ANSWER, REPORT])


@dataclass(frozen=True)
class ScoreTask:
    """The parameters of scoring a micro-batch, apart from the bundles; all of its rows have the same lineage."""

    model: ModelVersion
    challenger: ModelVersion | None
    engine: EngineChoice
    challenger_engine: EngineChoice | None
    query_id: str
    batch_id: int
    topics: dict[str, str]  # name in Kafka → name in the tables
    quarantine_dir: str
    features_dir: str | None
    payload: Payload = RAW
    limits: Limits = DEFAULT_LIMITS

    @property
    def lineage(self) -> tuple[int, str, str, int]:
        """The values of the columns `LINEAGE`."""
        return self.model.version, self.model.sha256, self.query_id, self.batch_id


@dataclass
class PartitionReport:
    """The report of one Spark partition to the driver, sent after its last row.

    Attributes:
        read: the messages that were read; topics by their names in the tables.
        quarantined_at: (topic, partition, messages) of each topic partition with quarantined messages; likewise.
        input_bytes: size of the images, in bytes.
        quarantined: reason → messages.
        seconds: stage → seconds.
        quarantine_file: None if no message was quarantined.
        features_file: None if no image was scored, or features are not stored.
        challenger_error: the last error of the challenger, None if there was none.
        drift: `DriftSums` as JSON; None without a reference.
        traced: W3C trace contexts of the first `MAX_TRACED` messages that have one.
    """

    read: list[OffsetRun] = field(default_factory=list)
    quarantined_at: list[tuple[str, int, int]] = field(default_factory=list)
    input_bytes: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    quarantine_file: DataFile | None = None
    features_file: DataFile | None = None
    challenger_error: str | None = None
    drift: dict[str, Any] | None = None
    traced: list[str] = field(default_factory=list)

    def timed(self, stage: str, since: float) -> float:
        """Add the time since `since` to a stage, and return the current time."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now

    def as_batch(self) -> pa.RecordBatch:
        """A row of the output schema that holds only the report."""
        text = json.dumps(self, default=lambda value: value.__dict__)
        return pa.RecordBatch.from_pylist([{"report": text}], OUTPUT)

    @property
    def input_rows(self) -> int:
        return sum(run.rows for run in self.read)

    def counted(self, counter: ReadCounter, topics: Mapping[str, str]) -> None:
        """Add the counts of messages.

        Args:
            counter: counts by the topics' names in Kafka.
            topics: name in Kafka → name in the tables.
        """
        self.read = [replace(run, topic=topics.get(run.topic, run.topic)) for run in counter.runs]
        self.quarantined_at = [(topics.get(one, one), place, n) for (one, place), n in counter.quarantined.items()]

    @classmethod
    def from_json(cls, text: str) -> Self:
        content: dict[str, Any] = json.loads(text)
        content["read"] = [OffsetRun(**one) for one in content["read"]]
        content["quarantined_at"] = [tuple(one) for one in content["quarantined_at"]]
        for name in ("quarantine_file", "features_file"):
            content[name] = DataFile(**content[name]) if content[name] else None
        return cls(**content)


@dataclass(frozen=True)
class _Loaded:
    """A model that this worker process has loaded."""

    sha256: str
    backbone_sha256: str
    scorer: Scorer
    reference: DriftReference | None


class _Worker:
    """The models of this worker process; PySpark reuses the process for later tasks."""

    champion: _Loaded | None = None
    challenger: _Loaded | None = None


def _load(
    cached: _Loaded | None,
    wanted: ModelVersion | None,
    engine: EngineChoice | None,
    bundle: Callable[[], Bundle | None],
    limits: Limits,
) -> _Loaded | None:
    """The wanted model: the cached one if it is the same, else loaded from its bundle."""
    if wanted is None or engine is None:
        return None
    if cached is not None and cached.sha256 == wanted.sha256:
        return cached
    content = bundle()
    if content is None:
        return None
    scorer = load_scorer(content, limits=limits, engine=engine.engine, providers=engine.providers)
    return _Loaded(wanted.sha256, content.backbone_sha256, scorer, load_reference(content))


@dataclass(frozen=True)
class _Pass:
    """The state of one pass over a partition."""

    task: ScoreTask
    champion: _Loaded
    challenger: _Loaded | None
    report: PartitionReport
    counter: ReadCounter
    quarantine: FileSink
    features: FileSink
    drift: DriftSums | None
    refused: Mapping[tuple[str, int, int], str]


def score_partition(
    batches: Iterator[pa.RecordBatch],
    champion: Callable[[], Bundle],
    challenger: Callable[[], Bundle | None],
    task: ScoreTask,
    refused: Mapping[tuple[str, int, int], str] = NOTHING,
) -> Iterator[pa.RecordBatch]:
    """Score the messages of one partition.

    Args:
        batches: Arrow batches of the columns that `streaming.pipeline.ingest` selects.
        champion: returns the broadcast bundle; called only if this worker has not loaded it yet.
        challenger: likewise, for the challenger.
        task: models, lineage and destinations.
        refused: (topic, partition, offset) → reason, of messages in `batches` that could not be read; it may grow while
            `batches` is consumed.

    Yields:
        Batches of `OUTPUT`: one row per scored message, and at the end one row that holds only the report.

    Raises:
        ModelError: the champion's bundle did not reach the worker, or is rejected.
    """
    report = PartitionReport()
    clock = time.perf_counter()
    loaded = _Worker.champion = _load(_Worker.champion, task.model, task.engine, champion, task.limits)
    if loaded is None:
        raise ModelError(f"model version {task.model.version} has not reached the worker")
    _Worker.challenger = _load(_Worker.challenger, task.challenger, task.challenger_engine, challenger, task.limits)
    clock = report.timed("load", clock)
    with FileSink(task.quarantine_dir, QUARANTINE) as quarantine, FileSink(task.features_dir, FEATURES) as features:
        drift = DriftSums.empty(loaded.reference.components) if loaded.reference else None
        counter = ReadCounter()
        one_pass = _Pass(task, loaded, _Worker.challenger, report, counter, quarantine, features, drift, refused)
        for batch in batches:
            report.timed("fetch", clock)
            counter.read(batch)
            for scored in _score_batch(batch, one_pass):
                clock = time.perf_counter()
                yield scored  # Spark serialises the batch before it asks for the next one
                report.timed("serialise", clock)
            clock = time.perf_counter()
        clock = report.timed("fetch", clock)
        report.quarantine_file = quarantine.close()
        report.features_file = features.close()
        report.timed("write", clock)
    report.counted(counter, task.topics)
    report.drift = drift.as_json() if drift else None
    yield report.as_batch()


def _score_batch(batch: pa.RecordBatch, on: _Pass) -> Iterator[pa.RecordBatch]:
    report, scorer = on.report, on.champion.scorer
    clock = time.perf_counter()
    headers = bounded_headers(batch.column("headers"))
    if on.refused:
        headers.refused.update(unreadable(batch, on.refused))
    images = without_envelopes(batch.column("value"), on.task.payload, headers.refused)
    values = MessageValues(images, headers.refused)
    report.input_bytes += pc.sum(pc.binary_length(values.column)).as_py() or 0

    decoded = scorer.decode(values)
    decoded.bad.update(headers.refused)
    clock = report.timed("decode", clock)
    features, good, bad = features_of(scorer, decoded)
    clock = report.timed("backbone", clock)

    hashes = pa.array([sha256_of(value) for value in values.column], pa.string())
    report.traced += [one.traceparent for one in headers.read if one.traceparent and valid(one.traceparent)]
    del report.traced[MAX_TRACED:]
    identity = pa.Table.from_batches([identity_columns(batch, headers.read, hashes, on.task.topics)])
    clock = report.timed("identity", clock)
    if bad:
        bad = with_envelopes_named(values, bad)
        on.quarantine.write(
            quarantined_rows(batch, identity, headers.without, with_envelopes_named(values, bad), on.task.lineage)
        )
        on.counter.quarantine(batch, bad)
        for image in bad.values():
            report.quarantined[image.reason] = report.quarantined.get(image.reason, 0) + 1
        clock = report.timed("write", clock)
    if good:
        rows = identity.take(good)
        on.features.write(feature_rows(rows, features, on.champion.backbone_sha256, hashes.take(pa.array(good))))
        clock = report.timed("write", clock)
        projected = scorer.head.projection.transform(features)
        clock = report.timed("projection", clock)
        probabilities = scorer.head.classifier.probabilities(projected)
        answers = answer_columns(probabilities, scorer.head)
        clock = report.timed("classifier", clock)
        if on.drift is not None and on.champion.reference is not None:
            on.drift.add(on.champion.reference, projected, probabilities.max(axis=1))
            clock = report.timed("drift", clock)
        shadow = _shadow_answers(values, good, features, on)
        report.timed("shadow", clock)
        damaged = pa.array([row in decoded.damage for row in good], DAMAGED.type)
        traces = pa.array([headers.read[row].traceparent for row in good], TRACEPARENT.type)
        columns = [*rows.columns, *answers, damaged, traces, *shadow, pa.nulls(len(good), REPORT.type)]
        yield from pa.table(columns, schema=OUTPUT).to_batches()


def _shadow_answers(values: MessageValues, good: list[int], features: Features, on: _Pass) -> list[pa.Array]:
    """The challenger's answers for the good messages; nulls if there is no challenger, or if it fails.

    The backbone runs again only if the models have different ones. A challenger is on trial, so its errors must not
    affect the champion's answers.
    """
    n = len(good)
    nothing = [pa.nulls(n, field.type) for field in SHADOW_ANSWER]
    if on.challenger is None:
        return nothing
    scorer = on.challenger.scorer
    try:
        if on.challenger.backbone_sha256 != on.champion.backbone_sha256:
            decoded = scorer.decode([values[row] for row in good])
            if decoded.bad:
                return nothing
            features = scorer.features(decoded.images)
        label, confidence = answer_columns(scorer.probabilities(features), scorer.head)[:2]
    except Exception as error:  # noqa: BLE001  no error of a challenger may stop the stream
        on.report.challenger_error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_ERROR_CHARS]
        return nothing
    return [label, confidence]


def features_of(scorer: Scorer, decoded: Decoded) -> tuple[Features, list[int], dict[int, BadImage]]:
    """Compute the features of decoded images.

    Returns:
        (N, D) float32 features, the N rows that they belong to, and the bad images by row: those that did not decode,
        and those whose features are not finite.
    """
    if not decoded.rows:
        return np.empty((0, 0), np.float32), [], decoded.bad
    features = scorer.features(decoded.images)
    finite = np.isfinite(features).all(axis=1)
    detail = "the backbone's features of this image are not finite"
    not_finite = BadImage(Stage.SCORE, Reason.NON_FINITE_FEATURES, detail)
    bad = decoded.bad | {decoded.rows[row]: not_finite for row in np.flatnonzero(~finite)}
    return features[finite], [decoded.rows[row] for row in np.flatnonzero(finite)], bad
