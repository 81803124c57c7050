"""The iterator UDF: messages of one partition in, scored rows out, in one pass.

Runs in Python workers. The bundle comes by broadcast and is loaded once per worker process, then kept for as long as
its hash stays the same. Scored rows are small and go back to the driver. What is large stays on the worker: features
and quarantined bytes go straight into Parquet files in their table's directory, and only the files' names travel.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.arrays import Features
from models.bundle import Bundle
from models.decode import BadImage, Reason, Stage
from models.drift import DriftReference, DriftSums
from models.errors import ModelError
from models.scorer import Decoded, Head, Scorer, load_reference, load_scorer
from producer.message import read_headers
from streaming.pipeline.decisions import ModelVersion
from streaming.pipeline.engines import EngineChoice
from streaming.storage.files import DataFile, FileSink, list_array
from streaming.storage.tables import ANSWER, FEATURES, IDENTITY, LINEAGE, QUARANTINE

TOP_K = 3
MAX_KEY_BYTES = 256  # a longer key is cut
REPORT = pa.field("report", pa.string())
SHADOW_ANSWER = [pa.field("shadow_label", pa.string()), pa.field("shadow_confidence", pa.float32())]
OUTPUT = pa.schema([*IDENTITY, *ANSWER, *SHADOW_ANSWER, REPORT])


@dataclass(frozen=True)
class ScoreTask:
    """What a worker needs to know beside the bundle; every row of one micro-batch has the same lineage."""

    model: ModelVersion
    challenger: ModelVersion | None
    engine: EngineChoice
    challenger_engine: EngineChoice | None
    query_id: str
    batch_id: int
    topic: str  # its name in the tables
    quarantine_dir: str
    features_dir: str | None


@dataclass
class PartitionReport:
    """What one partition tells the driver after its last row."""

    input_rows: int = 0
    input_bytes: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    quarantine_file: DataFile | None = None
    features_file: DataFile | None = None
    challenger_error: str | None = None
    drift: dict[str, Any] | None = None

    def timed(self, stage: str, since: float) -> float:
        """Add the time since `since` to a stage; returns now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now

    def as_batch(self) -> pa.RecordBatch:
        """One row of the output schema, with nothing but the report."""
        text = json.dumps(self, default=lambda value: value.__dict__)
        return pa.RecordBatch.from_pylist([{"report": text}], OUTPUT)

    @classmethod
    def from_json(cls, text: str) -> Self:
        content: dict[str, Any] = json.loads(text)
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
) -> _Loaded | None:
    """The model held, if it is the one wanted; else the one wanted, from its bundle."""
    if wanted is None or engine is None:
        return None
    if held is not None and held.sha256 == wanted.sha256:
        return held
    content = bundle()
    if content is None:
        return None
    scorer = load_scorer(content, engine=engine.engine, providers=engine.providers)
    return _Loaded(wanted.sha256, content.backbone_sha256, scorer, load_reference(content))


class _Values(Sequence[bytes | None]):
    """The messages' bytes, each made a Python object only while it is looked at: one may have 20 MB."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: Any) -> Any:
        return self.column[row].as_py()


@dataclass(frozen=True)
class _Pass:
    """What one pass over a partition works with."""

    task: ScoreTask
    champion: _Loaded
    challenger: _Loaded | None
    report: PartitionReport
    quarantine: FileSink
    features: FileSink
    drift: DriftSums | None


def score_partition(
    batches: Iterator[pa.RecordBatch],
    champion: Callable[[], Bundle],
    challenger: Callable[[], Bundle | None],
    task: ScoreTask,
) -> Iterator[pa.RecordBatch]:
    """Score the messages of one partition.

    Args:
        batches: Arrow batches of the columns that `streaming.pipeline.ingest` selects.
        champion: gives the broadcast bundle; called only if this worker has not loaded it yet.
        challenger: likewise, for the model that is scored beside it.
        task: models, lineage, and where files go.

    Yields:
        Batches of `OUTPUT`: one row per good message, and at the end one row that holds only the report.
    """
    report = PartitionReport()
    clock = time.perf_counter()
    loaded = _Worker.champion = _load(_Worker.champion, task.model, task.engine, champion)
    if loaded is None:
        raise ModelError(f"model version {task.model.version} has not reached the worker")
    _Worker.challenger = _load(_Worker.challenger, task.challenger, task.challenger_engine, challenger)
    clock = report.timed("load", clock)
    with (
        FileSink(task.quarantine_dir, QUARANTINE) as quarantine,
        FileSink(task.features_dir, FEATURES) as features,
    ):
        drift = DriftSums.empty(loaded.reference.components) if loaded.reference else None
        one_pass = _Pass(task, loaded, _Worker.challenger, report, quarantine, features, drift)
        for batch in batches:
            report.timed("fetch", clock)
            for scored in _score_batch(batch, one_pass):
                clock = time.perf_counter()
                yield scored  # until Spark asks for the next one, it serialises this one and takes it over
                report.timed("serialise", clock)
            clock = time.perf_counter()
        clock = report.timed("fetch", clock)
        report.quarantine_file = quarantine.close()
        report.features_file = features.close()
        report.timed("write", clock)
    report.drift = drift.as_json() if drift else None
    yield report.as_batch()


def _score_batch(batch: pa.RecordBatch, on: _Pass) -> Iterator[pa.RecordBatch]:
    report, scorer = on.report, on.champion.scorer
    clock = time.perf_counter()
    values = _Values(batch.column("value"))
    report.input_rows += len(values)
    report.input_bytes += pc.sum(pc.binary_length(values.column)).as_py() or 0

    decoded = scorer.decode(values)
    clock = report.timed("decode", clock)
    features, good, bad = _features(scorer, decoded)
    clock = report.timed("backbone", clock)

    identity = pa.Table.from_batches([_identity(batch, on.task.topic)])
    clock = report.timed("identity", clock)
    if bad:
        on.quarantine.write(_quarantined(identity, values.column, bad, on.task))
        for image in bad.values():
            report.quarantined[image.reason] = report.quarantined.get(image.reason, 0) + 1
        clock = report.timed("write", clock)
    if good:
        rows = identity.take(good)
        hashes = [_sha256(values.column[row]) for row in good]
        on.features.write(_with_features(rows, features, on.champion.backbone_sha256, hashes))
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
        columns = [*rows.columns, *answers, *shadow, pa.nulls(len(good), REPORT.type)]
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
        on.report.challenger_error = f"{type(error).__name__}: {error}"
        return nothing
    return [label, confidence]


def _features(scorer: Scorer, decoded: Decoded) -> tuple[Features, list[int], dict[int, BadImage]]:
    """Features of the images that decoded, with those that are not finite moved to the bad ones."""
    if not decoded.rows:
        return np.empty((0, 0), np.float32), [], decoded.bad
    features = scorer.features(decoded.images)
    finite = np.isfinite(features).all(axis=1)
    detail = "the backbone's features of this image are not finite"
    not_finite = BadImage(Stage.SCORE, Reason.NON_FINITE_FEATURES, detail)
    bad = decoded.bad | {decoded.rows[row]: not_finite for row in np.flatnonzero(~finite)}
    return features[finite], [decoded.rows[row] for row in np.flatnonzero(finite)], bad


def _identity(batch: pa.RecordBatch, topic: str) -> pa.RecordBatch:
    """The identity columns of messages; the image id is the key, or the hash of the bytes where there is none."""
    headers = [read_headers(one) for one in batch.column("headers").to_pylist()]
    keys = zip(batch.column("key"), batch.column("value"), strict=True)
    columns = [
        pa.array([_image_id(key.as_py(), value) for key, value in keys], pa.string()),
        pa.repeat(topic, batch.num_rows),
        batch.column("partition"),
        batch.column("offset"),
        batch.column("timestamp"),
        pa.array([one.source for one in headers], pa.string()),
        pa.array([one.label for one in headers], pa.string()),
    ]
    columns = [column.cast(want.type) for column, want in zip(columns, IDENTITY, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(IDENTITY))


def _image_id(key: bytes | None, value: pa.Scalar) -> str:
    if key:
        return key[:MAX_KEY_BYTES].decode("utf-8", "replace")
    return _sha256(value)


def _sha256(value: pa.Scalar) -> str:
    return hashlib.sha256(value.as_buffer() or b"").hexdigest()


def _quarantined(identity: pa.Table, values: pa.Array, bad: dict[int, BadImage], task: ScoreTask) -> pa.Table:
    rows = sorted(bad)
    n = len(rows)
    now = datetime.now(UTC)
    raw = pa.chunked_array([values.slice(row, 1) for row in rows])  # slices: 20 MB are not copied to be written
    columns = {
        **{name: identity.column(name).take(rows) for name in identity.column_names},
        **_lineage(task, n),
        "quarantined_at": [now] * n,
        "stage": [str(bad[row].stage) for row in rows],
        "reason": [str(bad[row].reason) for row in rows],
        "detail": [bad[row].detail for row in rows],
        "value": raw,
        "value_sha256": [_sha256(value) for value in raw],
        "replayed_at": [None] * n,
    }
    return pa.table([_column(columns[name.name], name.type) for name in QUARANTINE], schema=QUARANTINE)


def _lineage(task: ScoreTask, n: int) -> dict[str, list[Any]]:
    values = (task.model.version, task.model.sha256, task.query_id, task.batch_id)
    return {name.name: [value] * n for name, value in zip(LINEAGE, values, strict=True)}


def _column(values: Any, kind: pa.DataType) -> Any:
    return values if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def _with_features(rows: pa.Table, features: Features, backbone_sha256: str, hashes: list[str]) -> pa.Table:
    n = len(features)
    columns = [
        *rows.columns,
        pa.repeat(backbone_sha256, n),
        pa.nulls(n, pa.string()),
        list_array(features),
        pa.nulls(n, pa.int32()),
        pa.array(hashes, pa.string()),
    ]
    return pa.table(columns, schema=FEATURES)


def answer_columns(probabilities: Features, head: Head) -> list[pa.Array]:
    """The columns of `ANSWER`: the label that is answered, its probability, the `TOP_K` most probable, and when.

    With a threshold of its own, a model may answer the less probable of two labels.
    """
    n, width = probabilities.shape
    k = min(TOP_K, width)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(probabilities, order, axis=1)
    answers = head.answers(probabilities)
    names = pa.array(head.classes, pa.string())
    pairs = pa.StructArray.from_arrays(
        [names.take(pa.array(order.reshape(-1))), pa.array(best.reshape(-1))], fields=list(ANSWER[2].type.value_type)
    )
    offsets = pa.array(np.arange(0, (n + 1) * k, k, dtype=np.int32))
    return [
        names.take(pa.array(answers)),
        pa.array(probabilities[np.arange(n), answers]),
        pa.ListArray.from_arrays(offsets, pairs).cast(ANSWER[2].type),
        pa.repeat(pa.scalar(datetime.now(UTC), ANSWER[3].type), n),
    ]
