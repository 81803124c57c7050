"""The iterator UDF: messages of one partition in, scored rows out, in one pass.

Runs in Python workers. The bundle comes by broadcast and is loaded once per worker process, then kept for as long as
its hash stays the same. Scored rows are small and go back to the driver. What is large stays on the worker: features
and quarantined bytes go straight into Parquet files in their table's directory, and only the files' names travel.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.arrays import Features
from models.bundle import Bundle
from models.decode import DEFAULT_LIMITS, BadImage, Limits, Reason, Stage
from models.drift import DriftReference, DriftSums
from models.errors import ModelError
from models.scorer import Decoded, Head, Scorer, load_reference, load_scorer
from producer.message import MessageHeaders, read_headers
from streaming.pipeline.account import Piece, ReadCounter
from streaming.pipeline.decisions import ModelVersion
from streaming.pipeline.payload import RAW, FrameError, Payload, frame_of, unwrapping
from streaming.platform.engines import EngineChoice
from streaming.storage.files import DataFile, FileSink, list_array
from streaming.storage.tables import ANSWER, DAMAGED, FEATURES, IDENTITY, LINEAGE, QUARANTINE, TRACEPARENT
from streaming.tracing import valid

TOP_K = 3
NOTHING: Mapping[tuple[str, int, int], str] = MappingProxyType({})
MAX_KEY_BYTES = 1024  # a longer key is cut; `quarantine` has it whole
MAX_ID_CHARS = 256
MAX_ERROR_CHARS = 300  # of why the challenger failed
MAX_TRACED = 100  # messages of a partition whose scoring becomes a span of their traces
MAX_HEADERS, MAX_HEADERS_BYTES = 1_000, 1024**2  # of a message
# Times that are taken as such, in milliseconds: 1971, so that seconds are not, to 2200.
FIRST_MS, LAST_MS = 365 * 86_400_000, 7_258_118_400_000
NOT_UTF_8 = "\ufffd"
REPORT = pa.field("report", pa.string())
SHADOW_ANSWER = [pa.field("shadow_label", pa.string()), pa.field("shadow_confidence", pa.float32())]
OUTPUT = pa.schema([*IDENTITY, *ANSWER, DAMAGED, TRACEPARENT, *SHADOW_ANSWER, REPORT])


@dataclass(frozen=True)
class ScoreTask:
    """What a worker needs to know beside the bundle; every row of one micro-batch has the same lineage."""

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


@dataclass
class PartitionReport:
    """What one partition tells the driver after its last row.

    Attributes:
        read: what was read, topics by their names in the tables.
        quarantined_at: likewise, (topic, partition, messages) of each place with quarantined messages.
        traced: W3C trace contexts of its messages, of the first `MAX_TRACED`.
    """

    read: list[Piece] = field(default_factory=list)
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
        """Add the time since `since` to a stage; returns now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now

    def as_batch(self) -> pa.RecordBatch:
        """One row of the output schema, with nothing but the report."""
        text = json.dumps(self, default=lambda value: value.__dict__)
        return pa.RecordBatch.from_pylist([{"report": text}], OUTPUT)

    @property
    def input_rows(self) -> int:
        return sum(piece.rows for piece in self.read)

    def counted(self, counter: ReadCounter, topics: Mapping[str, str]) -> None:
        """Take over what was counted.

        Args:
            topics: name in Kafka → name in the tables.
        """
        self.read = [replace(piece, topic=topics.get(piece.topic, piece.topic)) for piece in counter.pieces]
        self.quarantined_at = [(topics.get(one, one), place, n) for (one, place), n in counter.quarantined.items()]

    @classmethod
    def from_json(cls, text: str) -> Self:
        content: dict[str, Any] = json.loads(text)
        content["read"] = [Piece(**one) for one in content["read"]]
        content["quarantined_at"] = [tuple(one) for one in content["quarantined_at"]]
        for name in ("quarantine_file", "features_file"):
            content[name] = DataFile(**content[name]) if content[name] else None
        return cls(**content)


@dataclass(frozen=True)
class _Loaded:
    """A model in this worker, and which features it takes."""

    sha256: str
    backbone_sha256: str
    scorer: Scorer
    reference: DriftReference | None


class _Worker:
    """The models that this worker process holds."""

    champion: _Loaded | None = None
    challenger: _Loaded | None = None


def _load(
    held: _Loaded | None,
    wanted: ModelVersion | None,
    engine: EngineChoice | None,
    bundle: Callable[[], Bundle | None],
    limits: Limits,
) -> _Loaded | None:
    """The model held, if it is the one wanted; else the one wanted, from its bundle."""
    if wanted is None or engine is None:
        return None
    if held is not None and held.sha256 == wanted.sha256:
        return held
    content = bundle()
    if content is None:
        return None
    scorer = load_scorer(content, limits=limits, engine=engine.engine, providers=engine.providers)
    return _Loaded(wanted.sha256, content.backbone_sha256, scorer, load_reference(content))


class _Values(Sequence[bytes | None]):
    """The messages' bytes, each made a Python object only while it is looked at: one may have 20 MB."""

    def __init__(self, column: pa.Array, hidden: Collection[int] = ()) -> None:
        self.column = column
        self._hidden = hidden  # rows that are not looked at

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: Any) -> Any:
        return None if row in self._hidden else self.column[row].as_py()


@dataclass(frozen=True)
class _Pass:
    """What one pass over a partition works with."""

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
        champion: gives the broadcast bundle; called only if this worker has not loaded it yet.
        challenger: likewise, for the model that is scored beside it.
        task: models, lineage, and where files go.
        refused: (topic, partition, offset) → why it could not be read, of the batches given so far.

    Yields:
        Batches of `OUTPUT`: one row per good message, and at the end one row that holds only the report.
    """
    report = PartitionReport()
    clock = time.perf_counter()
    loaded = _Worker.champion = _load(_Worker.champion, task.model, task.engine, champion, task.limits)
    if loaded is None:
        raise ModelError(f"model version {task.model.version} has not reached the worker")
    _Worker.challenger = _load(_Worker.challenger, task.challenger, task.challenger_engine, challenger, task.limits)
    clock = report.timed("load", clock)
    with (
        FileSink(task.quarantine_dir, QUARANTINE) as quarantine,
        FileSink(task.features_dir, FEATURES) as features,
    ):
        drift = DriftSums.empty(loaded.reference.components) if loaded.reference else None
        counter = ReadCounter()
        one_pass = _Pass(task, loaded, _Worker.challenger, report, counter, quarantine, features, drift, refused)
        for batch in batches:
            report.timed("fetch", clock)
            counter.read(batch)
            for scored in _score_batch(batch, one_pass):
                clock = time.perf_counter()
                yield scored  # until Spark asks for the next one, it serialises this one and takes it over
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
    headers = _bounded_headers(batch.column("headers"))
    if on.refused:
        headers.refused.update(_not_read(batch, on.refused))
    images = _unwrapped(batch.column("value"), on.task.payload, headers.refused)
    values = _Values(images, headers.refused)
    report.input_bytes += pc.sum(pc.binary_length(values.column)).as_py() or 0

    decoded = scorer.decode(values)
    decoded.bad.update(headers.refused)
    clock = report.timed("decode", clock)
    features, good, bad = features_of(scorer, decoded)
    clock = report.timed("backbone", clock)

    hashes = pa.array([_sha256(value) for value in values.column], pa.string())
    report.traced += [one.traceparent for one in headers.read if one.traceparent and valid(one.traceparent)]
    del report.traced[MAX_TRACED:]
    identity = pa.Table.from_batches([_identity(batch, headers.read, hashes, on.task.topics)])
    clock = report.timed("identity", clock)
    if bad:
        on.quarantine.write(_quarantined(batch, identity, headers.without, _framed(values, bad), on.task))
        on.counter.quarantine(batch, bad)
        for image in bad.values():
            report.quarantined[image.reason] = report.quarantined.get(image.reason, 0) + 1
        clock = report.timed("write", clock)
    if good:
        rows = identity.take(good)
        on.features.write(_with_features(rows, features, on.champion.backbone_sha256, hashes.take(pa.array(good))))
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


def _shadow_answers(values: _Values, good: list[int], features: Features, on: _Pass) -> list[pa.Array]:
    """The challenger's answers for the good messages; nulls where there is none, or where it fails.

    The backbone does not run again where both models have the same. A challenger is on trial: what it raises must not
    touch the champion's answers.
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
    except Exception as error:  # noqa: BLE001  whatever it is
        on.report.challenger_error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_ERROR_CHARS]
        return nothing
    return [label, confidence]


def features_of(scorer: Scorer, decoded: Decoded) -> tuple[Features, list[int], dict[int, BadImage]]:
    """Features of the images that decoded, with those that are not finite moved to the bad ones."""
    if not decoded.rows:
        return np.empty((0, 0), np.float32), [], decoded.bad
    features = scorer.features(decoded.images)
    finite = np.isfinite(features).all(axis=1)
    detail = "the backbone's features of this image are not finite"
    not_finite = BadImage(Stage.SCORE, Reason.NON_FINITE_FEATURES, detail)
    bad = decoded.bad | {decoded.rows[row]: not_finite for row in np.flatnonzero(~finite)}
    return features[finite], [decoded.rows[row] for row in np.flatnonzero(finite)], bad


@dataclass(frozen=True)
class _Headers:
    """The headers of messages.

    Attributes:
        read: of each message; without anything where there are too many.
        without: rows of messages that have too many.
        refused: row → why, of messages that are not decoded.
    """

    read: list[MessageHeaders]
    without: frozenset[int]
    refused: dict[int, BadImage]


def _bounded_headers(column: pa.ListArray) -> _Headers:
    """The headers of each message, made Python objects only where they are few and small."""
    entries = column.values
    sizes = [pc.binary_length(entries.field(name)).fill_null(0).to_numpy() for name in ("key", "value")]
    before = np.concatenate([[0], np.cumsum(sizes[0].astype(np.int64) + sizes[1])])
    ends = column.offsets.to_numpy()
    counts, total = np.diff(ends), np.diff(before[ends])
    refused = {
        int(row): BadImage(
            Stage.READ,
            Reason.TOO_MANY_HEADERS,
            f"expected at most {MAX_HEADERS:,} headers of {MAX_HEADERS_BYTES:,} bytes together, got {counts[row]:,} of "
            f"{total[row]:,}",
        )
        for row in np.flatnonzero((counts > MAX_HEADERS) | (total > MAX_HEADERS_BYTES))
    }
    if not refused:
        return _Headers([read_headers(one) for one in column.to_pylist()], frozenset(), refused)
    return _Headers(
        [read_headers(None if row in refused else column[row].as_py()) for row in range(len(column))],
        frozenset(refused),
        refused,
    )


def _unwrapped(column: pa.Array, payload: Payload, refused: dict[int, BadImage]) -> pa.Array:
    """The images without the frames around them; what is not in the frame is refused."""
    unwrap = unwrapping(payload)
    if unwrap is None:
        return column
    images: list[bytes | None] = []
    for row, value in enumerate(column):
        data = value.as_py()
        try:
            images.append(None if data is None or row in refused else unwrap(data))
        except FrameError as error:
            refused[row] = BadImage(Stage.READ, Reason.WRONG_FRAME, str(error))
            images.append(None)
    return pa.array(images, pa.binary())


def _framed(values: _Values, bad: dict[int, BadImage]) -> dict[int, BadImage]:
    """The bad images, with the frame in the detail of those that are in one."""
    named = {
        row: replace(image, detail=f"{image.detail}; it is {frame}")
        for row, image in bad.items()
        if image.reason == Reason.NOT_AN_IMAGE and (frame := frame_of(values[row] or b""))
    }
    return {**bad, **named}


def _not_read(batch: pa.RecordBatch, refused: Mapping[tuple[str, int, int], str]) -> Iterator[tuple[int, BadImage]]:
    places = zip(*(batch.column(name).to_pylist() for name in ("topic", "partition", "offset")), strict=True)
    for row, place in enumerate(places):
        if place in refused:
            yield row, BadImage(Stage.READ, Reason.MESSAGE_BOMB, refused[place])


def _identity(
    batch: pa.RecordBatch, headers: list[MessageHeaders], hashes: pa.Array, topics: Mapping[str, str]
) -> pa.RecordBatch:
    """The identity columns of messages.

    The image id is the `ce_id`, or the hash of the bytes where there is none that can be told from others. The key is
    the producer's: several images of one camera or tenant may have the same.
    """
    millis = _milliseconds(batch)
    is_time = pc.and_(pc.greater_equal(millis, FIRST_MS), pc.less(millis, LAST_MS))
    times = pc.if_else(is_time, millis, pa.scalar(None, pa.int64())).cast(pa.timestamp("ms", "UTC"))
    columns = [
        pc.coalesce(pa.array([_usable_id(one.id) for one in headers], pa.string()), hashes),
        _named(batch.column("topic"), topics),
        batch.column("partition"),
        batch.column("offset"),
        times,
        pa.array([one.source for one in headers], pa.string()),
        pa.array([one.label for one in headers], pa.string()),
        pc.binary_slice(batch.column("key"), 0, MAX_KEY_BYTES),
        millis,
    ]
    columns = [column.cast(want.type) for column, want in zip(columns, IDENTITY, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(IDENTITY))


def _milliseconds(batch: pa.RecordBatch) -> pa.Array:
    """The timestamps that Kafka had; Spark gives them as microseconds."""
    if "timestamp_ms" in batch.schema.names:
        return batch.column("timestamp_ms")
    microseconds = batch.column("timestamp").cast(pa.int64())
    rounded = np.floor_divide(microseconds.fill_null(0).to_numpy(), 1000)  # Arrow's division rounds towards zero
    return pc.if_else(microseconds.is_valid(), pa.array(rounded, pa.int64()), pa.scalar(None, pa.int64()))


def _usable_id(given: str | None) -> str | None:
    """A `ce_id`, unless it was cut or was not UTF-8, so that others could be read as the same."""
    return given if given and len(given) <= MAX_ID_CHARS and NOT_UTF_8 not in given else None


def _named(topic: pa.Array, topics: Mapping[str, str]) -> pa.Array:
    """Topics by their names in the tables."""
    encoded = topic.dictionary_encode()
    names = pa.array([topics.get(name, name) for name in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _sha256(value: pa.Scalar) -> str:
    return hashlib.sha256(value.as_buffer() or b"").hexdigest()


def _quarantined(
    batch: pa.RecordBatch,
    identity: pa.Table,
    without_headers: Collection[int],
    bad: dict[int, BadImage],
    task: ScoreTask,
) -> pa.Table:
    rows = sorted(bad)
    n = len(rows)
    now = datetime.now(UTC)

    def as_sent(name: str) -> pa.ChunkedArray:
        column = batch.column(name)
        return pa.chunked_array([column.slice(row, 1) for row in rows])  # slices: 20 MB are not copied to be written

    headers, values = batch.column("headers"), as_sent("value")
    columns = {
        **{name: identity.column(name).take(rows) for name in identity.column_names},
        **_lineage(task, n),
        "quarantined_at": [now] * n,
        "stage": [str(bad[row].stage) for row in rows],
        "reason": [str(bad[row].reason) for row in rows],
        "detail": [bad[row].detail for row in rows],
        "value": values,
        "value_sha256": [_sha256(value) for value in values],
        "replayed_at": [None] * n,
        "key": as_sent("key"),
        "headers": [None if row in without_headers else headers[row].as_py() for row in rows],
    }
    return pa.table([_column(columns[name.name], name.type) for name in QUARANTINE], schema=QUARANTINE)


def _lineage(task: ScoreTask, n: int) -> dict[str, list[Any]]:
    values = (task.model.version, task.model.sha256, task.query_id, task.batch_id)
    return {name.name: [value] * n for name, value in zip(LINEAGE, values, strict=True)}


def _column(values: Any, kind: pa.DataType) -> Any:
    return values.cast(kind) if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)


def _with_features(rows: pa.Table, features: Features, backbone_sha256: str, hashes: pa.Array) -> pa.Table:
    n = len(features)
    columns = [
        *rows.columns,
        pa.repeat(backbone_sha256, n),
        pa.nulls(n, pa.string()),
        list_array(features),
        pa.nulls(n, pa.int32()),
        hashes,
    ]
    return pa.table(columns, schema=FEATURES)


def answer_columns(probabilities: Features, head: Head) -> list[pa.Array]:
    """The columns of `ANSWER`: the label that is answered, its probability, the `TOP_K` most probable, and when.

    With a threshold of its own, a model may answer the less probable of two labels.
    """
    n = len(probabilities)
    order, best = most_probable(probabilities, TOP_K)
    answers = head.answers(probabilities)
    names = pa.array(head.classes, pa.string())
    pairs = pa.StructArray.from_arrays(
        [names.take(pa.array(order.reshape(-1))), pa.array(best.reshape(-1))], fields=list(ANSWER[2].type.value_type)
    )
    k = order.shape[1]
    offsets = pa.array(np.arange(0, (n + 1) * k, k, dtype=np.int32))
    return [
        names.take(pa.array(answers)),
        pa.array(probabilities[np.arange(n), answers]),
        pa.ListArray.from_arrays(offsets, pairs).cast(ANSWER[2].type),
        pa.repeat(pa.scalar(datetime.now(UTC), ANSWER[3].type), n),
    ]


def most_probable(probabilities: Features, k: int) -> tuple[NDArray[np.intp], Features]:
    """The `k` most probable classes of each row, or all, the most probable first: their places, and probabilities."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(probabilities, order, axis=1)
