"""The commit protocol of a micro-batch. It is why every message has exactly one row, whatever dies when.

    1. begin        a batch with a row in `batches` is whole: Spark only asks again because it died before noting it
    2. pin          query id, batch id, offsets and model versions, durably beside the checkpoint, before anything is
                    scored; a retry finds the pin and scores with the same models
    3. score        once, in one Spark job; workers write features and quarantined bytes into files of their own
    4. predictions  appended in one commit with an application transaction (query id, batch id)
    5. quarantine   the workers' files become part of the table, likewise
    6. features     likewise; so do the challenger's answers, in `shadow`
    7. batches      last: a batch with a row here is whole

Spark offers a batch again if the process dies before the batch returns. Tables that had committed leave their append
out, the others make it. Files that no commit names are never read, and vacuumed later.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from models.drift import DriftSums, drift
from models.drift_alarm import DriftWindow
from streaming.errors import ServiceError
from streaming.pipeline.continuity import Continuity
from streaming.pipeline.ingest import batch_offsets, read_query_id
from streaming.pipeline.pin import OffsetRange, Pin, Pins
from streaming.pipeline.score import OUTPUT, REPORT, SHADOW_ANSWER, PartitionReport, ScoreTask, score_partition
from streaming.pipeline.serving import Serving
from streaming.storage.tables import ANSWER, BATCHES, IDENTITY, PREDICTIONS, SHADOW, Table, spark_schema

STEPS = ("begin", "pin", "score", "predictions", "quarantine", "features", "batches")
# Seconds by the driver's clock: `batch` is `plan` + `score` + `commit`; `between` is since the batch before.
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
    seconds: dict[
        str, float
    ]  # of the stages in `models/` and `score.py`, summed over the workers, and of `DRIVER_STEPS`
    refused: dict[int, str] = field(default_factory=dict)  # version → why, of models that an alias points to
    drift: dict[str, float] = field(default_factory=dict)  # see `models.drift.drift` and `models.drift_alarm.verdict`
    cores: int = 1  # that worked on it at a time

    @property
    def wall_s(self) -> float:
        """From the start of the batch to its last commit but one."""
        return self.seconds["batch"]


class Tables:
    """The tables that the stream writes."""

    def __init__(self, directory: Path) -> None:
        self.predictions = Table(directory, "predictions")
        self.quarantine = Table(directory, "quarantine")
        self.features = Table(directory, "features")
        self.shadow = Table(directory, "shadow")
        self.batches = Table(directory, "batches")

    def discard_unfinished(self, continuity: Continuity) -> int:
        """Remove the rows of a batch that was never completed and never will be, since its checkpoint is gone.

        Its messages are scored anew by the query that takes over. Returns how many rows.
        """
        return sum(
            table.delete_beyond(continuity.topic, continuity.committed)
            for table in (self.predictions, self.quarantine, self.features, self.shadow)
        )


class BatchCommitter:
    """Runs the protocol for every micro-batch of one query.

    Args:
        on_batch: called with every committed micro-batch.
        on_step: called with the name of each of `STEPS` when it is done.
    """

    def __init__(
        self,
        serving: Serving,
        tables: Tables,
        continuity: Continuity,
        checkpoint: Path,
        *,
        store_features: bool,
        on_batch: Callable[[BatchResult], None],
        on_step: Callable[[str], None],
    ) -> None:
        self._serving = serving
        self._tables = tables
        self._continuity = continuity
        self._checkpoint = checkpoint
        self._pins = Pins(checkpoint.parent / "pins")
        self._store_features = store_features
        self._on_batch = on_batch
        self._on_step = on_step
        self._output = spark_schema(OUTPUT)
        self._ended: float | None = None  # when the batch before was committed
        self._window = DriftWindow()

    def __call__(self, messages: DataFrame, batch_id: int) -> None:
        """Run the protocol for one micro-batch; `foreachBatch` calls this."""
        started, clock = datetime.now(UTC), perf_counter()
        query_id = read_query_id(self._checkpoint)
        offsets = batch_offsets(self._checkpoint, batch_id, self._continuity.topic)
        if not offsets:
            return  # the first batch of a query that found nothing new: there is nothing to account for
        if self._tables.batches.committed(query_id, batch_id):
            self._continuity.check_whole(offsets)
            return
        self._on_step("begin")

        pin = self._pins.read(query_id, batch_id) or self._pin(query_id, batch_id, offsets)
        self._on_step("pin")

        score_clock = perf_counter()
        rows, reports = self._score(messages, pin)
        quarantined = _summed([report.quarantined for report in reports])
        self._account(pin, rows.num_rows, quarantined, reports)
        seconds = _summed([report.seconds for report in reports])
        commit_clock = perf_counter()
        self._on_step("score")

        self._tables.predictions.append(_predictions(rows, pin), query_id, batch_id)
        self._on_step("predictions")

        files = [report.quarantine_file for report in reports if report.quarantine_file]
        self._tables.quarantine.append_files(files, query_id, batch_id)
        self._on_step("quarantine")

        files = [report.features_file for report in reports if report.features_file]
        self._tables.features.append_files(files, query_id, batch_id)
        if pin.challenger is not None:
            self._tables.shadow.append(_shadow(rows, pin), query_id, batch_id)
        self._on_step("features")

        window, far = self._drift(pin, reports)
        now = perf_counter()
        driver = {
            "plan": score_clock - clock,
            "score": commit_clock - score_clock,
            "commit": now - commit_clock,
            "batch": now - clock,
            "between": clock - self._ended if self._ended is not None else 0.0,
        }
        result = BatchResult(
            batch_id=batch_id,
            model_version=pin.model.version,
            input_rows=pin.input_rows,
            input_bytes=sum(report.input_bytes for report in reports),
            predicted_rows=rows.num_rows,
            quarantined=quarantined,
            seconds=seconds | driver,
            refused=self._serving.refused,
            drift=far,
            cores=min(messages.sparkSession.sparkContext.defaultParallelism, max(1, len(reports))),
        )
        self._tables.batches.append(_batch_row(result, pin, started), query_id, batch_id)
        self._window = window  # only now: a batch that fails here comes again
        self._continuity.advance(pin.offsets)
        self._ended = perf_counter()
        self._on_step("batches")
        self._on_batch(result)

    def _pin(self, query_id: str, batch_id: int, offsets: list[OffsetRange]) -> Pin:
        """Bind a batch to the models of this moment and to what Spark planned for it."""
        left_out = self._continuity.check(offsets)
        self._serving.follow()
        challenger = self._serving.challenger
        pin = Pin(
            query_id=query_id,
            batch_id=batch_id,
            model=self._serving.champion.pinned,
            challenger=challenger.pinned if challenger else None,
            offsets=offsets,
            left_out=left_out,
            pinned_at=datetime.now(UTC).isoformat(),
        )
        self._pins.write(pin)
        return pin

    def _score(self, messages: DataFrame, pin: Pin) -> tuple[pa.Table, list[PartitionReport]]:
        model = self._serving.pinned(pin.model)
        challenger = self._serving.pinned(pin.challenger) if pin.challenger else None
        task = ScoreTask(
            model=pin.model,
            challenger=pin.challenger,
            query_id=pin.query_id,
            batch_id=pin.batch_id,
            topic=self._continuity.topic,
            quarantine_dir=str(self._tables.quarantine.directory),
            features_dir=str(self._tables.features.directory) if self._store_features else None,
        )
        bundle = model.broadcast
        other = challenger.broadcast if challenger else None

        def score(batches: Any) -> Any:
            return score_partition(batches, lambda: bundle.value, lambda: other.value if other else None, task)

        output = messages.mapInArrow(score, self._output).toArrow().cast(OUTPUT)
        is_report = output.column(REPORT.name).is_valid()
        reports = [PartitionReport.from_json(text) for text in output.filter(is_report).column(REPORT.name).to_pylist()]
        return output.filter(pc.invert(is_report)), reports

    def _drift(self, pin: Pin, reports: list[PartitionReport]) -> tuple[DriftWindow, dict[str, float]]:
        """The window after this batch; how far the batch, and the window where it is judged, is from the reference."""
        reference = self._serving.pinned(pin.model).reference
        if reference is None:
            return self._window, {}
        seen = DriftSums.merged(reference.components, [report.drift for report in reports if report.drift])
        window, verdict = self._window.after(pin.model, reference, seen, monotonic())
        return window, drift(reference, seen) | verdict

    def _account(self, pin: Pin, predicted: int, quarantined: dict[str, int], reports: list[PartitionReport]) -> None:
        """Input = predicted + quarantined, or nothing of the batch is committed."""
        read = sum(report.input_rows for report in reports)
        bad = sum(quarantined.values())
        if not pin.input_rows == read == predicted + bad:
            raise ServiceError(
                f"batch {pin.batch_id} does not add up: {pin.input_rows} messages by offsets, {read} read, "
                f"{predicted} predicted + {bad} quarantined; nothing of it is committed"
            )


def _summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _predictions(rows: pa.Table, pin: Pin) -> pa.Table:
    answers = rows.select([field.name for field in (*IDENTITY, *ANSWER)])
    constants = {
        "model_version": pin.model.version,
        "bundle_sha256": pin.model.sha256,
        "query_id": pin.query_id,
        "batch_id": pin.batch_id,
        "date": pin.date,
    }
    return _with_constants(answers, constants, PREDICTIONS)


def _shadow(rows: pa.Table, pin: Pin) -> pa.Table:
    """The challenger's answers beside the champion's; messages that it failed on are left out."""
    if pin.challenger is None:
        raise ServiceError(f"batch {pin.batch_id} has no challenger")
    rows = rows.filter(rows.column(SHADOW_ANSWER[0].name).is_valid())
    columns = {
        **{field.name: rows.column(field.name) for field in IDENTITY},
        "champion_label": rows.column("label"),
        "champion_confidence": rows.column("confidence"),
        "label": rows.column("shadow_label"),
        "confidence": rows.column("shadow_confidence"),
        "scored_at": rows.column("scored_at"),
    }
    constants = {
        "model_version": pin.challenger.version,
        "bundle_sha256": pin.challenger.sha256,
        "query_id": pin.query_id,
        "batch_id": pin.batch_id,
    }
    return _with_constants(pa.table(columns), constants, SHADOW)


def _with_constants(rows: pa.Table, constants: dict[str, Any], schema: pa.Schema) -> pa.Table:
    for name, value in constants.items():
        field = schema.field(name)
        rows = rows.append_column(field, pa.repeat(pa.scalar(value, field.type), rows.num_rows))
    return rows.select(schema.names)


def _batch_row(result: BatchResult, pin: Pin, started: datetime) -> pa.Table:
    refused = "; ".join(f"version {version}: {why}" for version, why in result.refused.items())
    row = {
        "model_version": pin.model.version,
        "bundle_sha256": pin.model.sha256,
        "query_id": pin.query_id,
        "batch_id": pin.batch_id,
        "challenger_version": pin.challenger.version if pin.challenger else None,
        "offsets": [asdict(one) for one in pin.offsets],
        "left_out": [asdict(one) for one in pin.left_out] or None,
        "input_rows": result.input_rows,
        "predicted_rows": result.predicted_rows,
        "quarantined_rows": sum(result.quarantined.values()),
        "input_bytes": result.input_bytes,
        "seconds": list(result.seconds.items()),
        "refused": refused or None,
        "drift": list(result.drift.items()) or None,
        "started_at": started,
        "committed_at": datetime.now(UTC),
    }
    return pa.Table.from_pylist([row], schema=BATCHES)
