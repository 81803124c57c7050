"""The commit protocol of a micro-batch, by which every message has exactly one row, whenever a process fails.

    1. plan      take Spark's offset ranges; each must start where the previous batch ended
    2. model     load the models that the aliases point to now
    3. score     run one Spark job; workers write features and quarantined messages to separate files
    4. reconcile check that every message of the ranges was read once and has one row (see `reconcile.py`)
    5. write     write files of predictions and of the challenger's answers, which no commit refers to yet; meanwhile,
                 ask Kafka whether the topics are still the same
    6. decide    create the decision of batch n: its offsets, models, figures and files
    7. apply     commit predictions, quarantine, shadow and features, each with the transaction (stream id, n); in
                 parallel, if there is an answers topic, send the answers in one Kafka transaction
    8. complete  commit the row of `batches` in the same way, last: a batch with a row there is complete
    9. advance   n + 1 is next

Before step 6, nothing of the batch is visible, so nothing has to be completed or reproduced: the next start plans again
from where `batches` ends, perhaps with a smaller batch or a newer model. After step 6, any process can complete the
batch from its decision alone (`streaming/pipeline/finish.py`). Files that no commit refers to are vacuumed later.

If two drivers work on the same number, one creates the decision; the other deletes its files and plans again.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from time import monotonic, perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from models.decode import DEFAULT_LIMITS, Limits
from models.drift import DriftSums, drift
from models.drift_alarm import DriftWindow
from streaming.errors import reported
from streaming.pipeline.answers_topic import AnswersTopic
from streaming.pipeline.bounded import BoundedMessages
from streaming.pipeline.decisions import Decision, Decisions, Figures, ModelVersion, OffsetRange, TopicPartition
from streaming.pipeline.finish import Tables, apply
from streaming.pipeline.model_manager import LoadedModel, ModelManager
from streaming.pipeline.payload import RAW, Payload
from streaming.pipeline.positions import OffsetPlan
from streaming.pipeline.reconcile import confirmed, partitions_with_holes, reconcile
from streaming.pipeline.score import OUTPUT, REPORT, SHADOW_ANSWER, PartitionReport, ScoreTask, score_partition
from streaming.pipeline.topic_snapshot import TakeSnapshot
from streaming.storage.files import DataFile
from streaming.storage.tables import ANSWER, DAMAGED, IDENTITY, PREDICTIONS, SHADOW, TRACEPARENT, spark_schema

STEPS = ("begin", "score", "decide", "predictions", "quarantine", "features", "batches")
# With an answers topic, reported from another thread at any time between "decide" and "batches".
ANSWER_STEPS = ("send", "answers")
# Timings by the driver's clock: `batch` is `plan` + `score` + `commit`; `between` is the time since the previous batch.
DRIVER_STEPS = ("plan", "score", "commit", "batch", "between")


@dataclass(frozen=True)
class BatchResult:
    """One committed micro-batch."""

    batch_id: int
    model_version: int
    input_rows: int
    input_bytes: int
    predicted_rows: int
    quarantined: dict[str, int]  # reason → messages
    seconds: dict[str, float]  # by stage of scoring, summed over the workers, and by step of `DRIVER_STEPS`
    refused: dict[int, str] = field(default_factory=dict)  # rejected version that an alias points to → reason
    challenger_error: str | None = None  # why the challenger did not score all images
    drift: dict[str, float] = field(default_factory=dict)  # see `models.drift.drift` and `models.drift_alarm.verdict`
    cores: int = 1  # that worked on the batch in parallel
    traced: Sequence[str] = ()  # W3C trace contexts of messages, see `PartitionReport`
    waited_s: Sequence[float] = ()  # per prediction, from the message's timestamp to the commit

    @property
    def wall_s(self) -> float:
        """Seconds from the start of the batch to the commit before that of `batches`."""
        return self.seconds["batch"]


class LostDecisionError(Exception):
    """Another driver has decided this batch number, or a later one."""


@dataclass(frozen=True)
class _Scored:
    """The workers' output for a micro-batch."""

    rows: pa.Table
    reports: list[PartitionReport]
    quarantined: dict[str, int]


class BatchCommitter:
    """Runs the protocol for every micro-batch of one run of the stream.

    Args:
        models: the champion and the challenger.
        take_snapshot: asks Kafka, in the background, for the state of the topics after a batch was read.
        store_features: whether to fill the table `features`.
        payload: the envelope around each image.
        answers: sends the answers, if there is an answers topic.
        on_batch: called with every committed micro-batch.
        on_step: called with the name of each of `STEPS` and `ANSWER_STEPS` when it is done.

    Attributes:
        plan: where the next micro-batch must begin; set before each query.
    """

    plan: OffsetPlan

    def __init__(
        self,
        models: ModelManager,
        tables: Tables,
        decisions: Decisions,
        take_snapshot: TakeSnapshot,
        *,
        store_features: bool,
        payload: Payload = RAW,
        limits: Limits = DEFAULT_LIMITS,
        answers: AnswersTopic | None = None,
        on_batch: Callable[[BatchResult], None],
        on_step: Callable[[str], None],
    ) -> None:
        self._models = models
        self._tables = tables
        self._decisions = decisions
        self._take_snapshot = take_snapshot
        self._store_features = store_features
        self._payload = payload
        self._limits = limits
        self._answers = answers
        self._on_batch = on_batch
        self._on_step = on_step
        self._output = spark_schema(OUTPUT)
        self._ended: float | None = None  # when the previous batch was committed
        self._window = DriftWindow()

    def __call__(self, messages: DataFrame | BoundedMessages, ranges: Sequence[OffsetRange]) -> None:
        """Run the protocol for one micro-batch; `foreachBatch` calls this.

        Args:
            messages: from Spark, or from a `BoundedReader`, whose messages are scored in this process.

        Raises:
            LostDecisionError: another driver decided the batch; no table has a row of this attempt.
            ServiceError: the batch does not continue the previous one, or rows and messages do not match; nothing of it
                is committed.
            WitnessError: Kafka did not confirm the topics; nothing of the batch is committed.
        """
        started, clock = datetime.now(UTC), perf_counter()
        if not ranges:
            return  # the first batch of a query without new messages
        plan = self.plan
        left_out = plan.check(ranges)
        self._on_step("begin")

        self._models.follow()
        champion, challenger = self._models.champion, self._models.challenger
        score_clock = perf_counter()
        scored = self._score(messages, champion, challenger)
        counted = reconcile(
            plan.number + 1,
            ranges,
            [run for report in scored.reports for run in report.read],
            _rows_by_partition(scored.rows),
            _summed([{place[:2]: place[2]} for report in scored.reports for place in report.quarantined_at]),
        )
        topics = plan.kafka_topics
        snapshot = self._take_snapshot(
            [name for name, _ in topics.values()],
            [(topics[topic][0], partition) for topic, partition in partitions_with_holes(counted)],
        )
        commit_clock = perf_counter()
        self._on_step("score")

        window, far = self._drift(champion, scored.reports)

        def seconds() -> dict[str, float]:
            now = perf_counter()
            driver = {
                "plan": score_clock - clock,
                "score": commit_clock - score_clock,
                "commit": now - commit_clock,
                "batch": now - clock,
                "between": clock - self._ended if self._ended is not None else 0.0,
            }
            return _summed([report.seconds for report in scored.reports]) | driver

        refused = dict(self._models.refused)
        failed = next((report.challenger_error for report in scored.reports if report.challenger_error), None)
        if challenger and failed:
            refused[challenger.version.version] = f"fails in scoring: {failed}"
        files = self._files(scored, champion.version, challenger.version if challenger else None, started.date())
        try:
            counted = confirmed(plan.number + 1, counted, snapshot.result(), topics)
        except Exception:
            self._drop(files)
            raise
        decision = Decision(
            number=plan.number + 1,
            stream=plan.stream,
            ranges=counted,
            model=champion.version,
            challenger=challenger.version if challenger else None,
            topics=plan.topics,
            left_out=tuple(left_out),
            figures=Figures(
                input_bytes=sum(report.input_bytes for report in scored.reports),
                predicted_rows=scored.rows.num_rows,
                quarantined=scored.quarantined,
                seconds=seconds(),
                refused=_refused(refused),
                drift=far,
                started_at=started,
            ),
            files=files,
            decided_at=datetime.now(UTC),
            nonce=uuid.uuid4().hex,
            answers=self._answers.due if self._answers is not None else None,
        )
        if not self._decisions.decide(decision):
            self._drop(files)
            raise LostDecisionError(f"batch {decision.number} was decided by another driver")
        self._on_step("decide")

        if not apply(
            decision, self._tables, fresh=True, answers=self._answers, on_step=self._on_table, seconds=seconds
        ):
            raise LostDecisionError(f"another driver has continued the stream beyond batch {decision.number}")
        self._window = window  # only now, since a batch that failed is repeated
        plan.advance(ranges)
        result = BatchResult(
            batch_id=decision.number,
            model_version=champion.version.version,
            input_rows=decision.input_rows,
            input_bytes=decision.figures.input_bytes,
            predicted_rows=scored.rows.num_rows,
            quarantined=scored.quarantined,
            seconds=seconds(),
            refused=refused,
            challenger_error=failed,
            drift=far,
            cores=_cores(messages, scored.reports),
            traced=[one for report in scored.reports for one in report.traced],
            waited_s=_waited(scored.rows, datetime.now(UTC)),
        )
        self._ended = perf_counter()
        self._on_step("batches")
        self._on_batch(result)

    def _on_table(self, name: str) -> None:
        if name in STEPS or name in ANSWER_STEPS:
            self._on_step(name)

    def _score(
        self, messages: DataFrame | BoundedMessages, champion: LoadedModel, challenger: LoadedModel | None
    ) -> _Scored:
        plan = self.plan
        task = ScoreTask(
            model=champion.version,
            challenger=challenger.version if challenger else None,
            engine=champion.engine,
            challenger_engine=challenger.engine if challenger else None,
            query_id=plan.stream,
            batch_id=plan.number + 1,
            topics={in_kafka: name for name, (in_kafka, _) in plan.kafka_topics.items()},
            quarantine_dir=self._tables["quarantine"].place,
            features_dir=self._tables["features"].place if self._store_features else None,
            payload=self._payload,
            limits=self._limits,
        )
        bundle = champion.broadcast
        other = challenger.broadcast if challenger else None

        def score(batches: Any) -> Any:
            return score_partition(batches, lambda: bundle.value, lambda: other.value if other else None, task)

        if isinstance(messages, BoundedMessages):
            rows = score_partition(
                messages.batches, lambda: bundle.value, lambda: other.value if other else None, task, messages.refused
            )
            output = pa.Table.from_batches(rows, OUTPUT)
        else:
            output = messages.mapInArrow(reported(score), self._output).toArrow().cast(OUTPUT)
        is_report = output.column(REPORT.name).is_valid()
        reports = [PartitionReport.from_json(text) for text in output.filter(is_report).column(REPORT.name).to_pylist()]
        quarantined: dict[str, int] = _summed([report.quarantined for report in reports])
        return _Scored(output.filter(pc.invert(is_report)), reports, quarantined)

    def _files(
        self, scored: _Scored, model: ModelVersion, challenger: ModelVersion | None, day: date
    ) -> dict[str, tuple[DataFile, ...]]:
        """The files of the batch by table, written by the workers or here."""
        lineage = {"query_id": self.plan.stream, "batch_id": self.plan.number + 1}
        reports = scored.reports
        predictions = _predictions(scored.rows, model, lineage | {"date": day})
        files = {
            "predictions": self._tables["predictions"].write(predictions),
            "quarantine": [report.quarantine_file for report in reports if report.quarantine_file],
            "features": [report.features_file for report in reports if report.features_file],
        }
        if challenger is not None:
            files["shadow"] = self._tables["shadow"].write(_shadow(scored.rows, challenger, lineage))
        return {name: tuple(of_table) for name, of_table in files.items()}

    def _drop(self, files: Mapping[str, Sequence[DataFile]]) -> None:
        """Delete the files of a batch that was not decided; no commit refers to them."""
        for name, of_table in files.items():
            self._tables[name].store.delete(file.path for file in of_table)

    def _drift(self, model: LoadedModel, reports: list[PartitionReport]) -> tuple[DriftWindow, dict[str, float]]:
        """The drift window including this batch, and the drift figures of the batch and of a full window."""
        reference = model.reference
        if reference is None:
            return self._window, {}
        seen = DriftSums.merged(reference.components, [report.drift for report in reports if report.drift])
        window, verdict = self._window.after(model.version, reference, seen, monotonic())
        return window, drift(reference, seen) | verdict


def _cores(messages: DataFrame | BoundedMessages, reports: Sequence[PartitionReport]) -> int:
    """The number of cores that worked on the messages in parallel."""
    if isinstance(messages, BoundedMessages):
        return 1
    return min(messages.sparkSession.sparkContext.defaultParallelism, max(1, len(reports)))


def _waited(rows: pa.Table, now: datetime) -> list[float]:
    """Seconds from each message's timestamp to `now`, at least 0; messages without a timestamp are left out."""
    published = rows.column("published_at").drop_null().cast(pa.int64()).to_numpy()  # microseconds
    return [max(0.0, seconds) for seconds in (now.timestamp() - published / 1e6).tolist()]


def _rows_by_partition(rows: pa.Table) -> dict[TopicPartition, int]:
    """The number of rows of each partition."""
    counts = rows.select(["topic", "partition"]).group_by(["topic", "partition"]).aggregate([([], "count_all")])
    return {(row["topic"], row["partition"]): row["count_all"] for row in counts.to_pylist()}


def _summed(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    total: dict[Any, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _predictions(rows: pa.Table, model: ModelVersion, constants: Mapping[str, Any]) -> pa.Table:
    answers = rows.select([field.name for field in (*IDENTITY, *ANSWER, DAMAGED, TRACEPARENT)])
    return _with_constants(answers, model, constants, PREDICTIONS)


def _shadow(rows: pa.Table, challenger: ModelVersion, constants: Mapping[str, Any]) -> pa.Table:
    """The challenger's answers next to the champion's, without the messages for which the challenger failed."""
    rows = rows.filter(rows.column(SHADOW_ANSWER[0].name).is_valid())
    columns = {
        **{field.name: rows.column(field.name) for field in IDENTITY},
        "champion_label": rows.column("label"),
        "champion_confidence": rows.column("confidence"),
        "label": rows.column("shadow_label"),
        "confidence": rows.column("shadow_confidence"),
        "scored_at": rows.column("scored_at"),
    }
    return _with_constants(pa.table(columns), challenger, constants, SHADOW)


def _with_constants(rows: pa.Table, model: ModelVersion, constants: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    columns = {"model_version": model.version, "bundle_sha256": model.sha256, **constants}
    for name, value in columns.items():
        field = schema.field(name)
        rows = rows.append_column(field, pa.repeat(pa.scalar(value, field.type), rows.num_rows))
    return rows.select(schema.names)


def _refused(refused: Mapping[int, str]) -> str | None:
    return "; ".join(f"version {version}: {why}" for version, why in refused.items()) or None
