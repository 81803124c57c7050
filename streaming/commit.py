"""The commit protocol of a micro-batch. It is why every message has exactly one row, whatever dies when.

    1. pin          query id, batch id, offsets and model version go to the checkpoint's `pins/`, durably, before
                    anything is scored; a retry finds the pin and scores with the same model
    2. score        once, in one Spark job; workers write features and quarantined bytes into files of their own
    3. predictions  appended in one commit with an application transaction (query id, batch id)
    4. quarantine   the workers' files become part of the table, likewise
    5. features     likewise
    6. batches      last: a batch with a row here is whole

Spark runs a batch again if the process dies before the batch returns. Tables that had committed leave their append
out, the others make it. Files that no commit names are never read, and vacuumed later.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
from pyspark import Broadcast
from pyspark.sql import DataFrame, SparkSession

from models.bundle import Bundle
from models.errors import ModelError
from models.registry import CHAMPION, Registry
from models.scorer import check_golden, load_scorer
from streaming.errors import ServiceError
from streaming.ingest import OffsetRange, batch_offsets
from streaming.score import OUTPUT, REPORT, PartitionReport, ScoreTask, score_partition
from streaming.tables import BATCHES, LINEAGE, PREDICTIONS, Table, spark_schema


@dataclass(frozen=True)
class Pin:
    """What a micro-batch is bound to."""

    query_id: str
    batch_id: int
    model_version: int
    bundle_sha256: str
    offsets: list[OffsetRange]
    pinned_at: str

    @property
    def input_rows(self) -> int:
        return sum(one.rows for one in self.offsets)

    @property
    def date(self) -> date:
        """The partition of the predictions: the day of the pin, so that a retry after midnight agrees."""
        return datetime.fromisoformat(self.pinned_at).date()


@dataclass(frozen=True)
class BatchResult:
    """One committed micro-batch."""

    batch_id: int
    model_version: int
    input_rows: int
    predicted_rows: int
    quarantined: dict[str, int]
    seconds: dict[str, float]  # per stage, summed over the workers
    wall_s: float  # from the start of the batch to its last commit but one


class LoadedModel:
    """A model version that passed its checks, as the broadcast that workers load it from."""

    def __init__(self, spark: SparkSession, registry: Registry, version: int) -> None:
        bundle = registry.read(version)
        check_golden(bundle, load_scorer(bundle))
        self.version = version
        self.sha256 = bundle.sha256
        self.backbone_sha256 = bundle.backbone_sha256
        self.broadcast: Broadcast[Bundle] = spark.sparkContext.broadcast(bundle)


class BatchCommitter:
    """Runs the protocol for every micro-batch of one query."""

    def __init__(
        self,
        spark: SparkSession,
        registry: Registry,
        tables_dir: Path,
        checkpoint: Path,
        *,
        store_features: bool,
        on_batch: Callable[[BatchResult], None],
        on_refused: Callable[[int, str], None],
    ) -> None:
        self._spark = spark
        self._registry = registry
        self._checkpoint = checkpoint
        self._store_features = store_features
        self._on_batch = on_batch
        self._on_refused = on_refused
        self._predictions = Table(tables_dir, "predictions")
        self._quarantine = Table(tables_dir, "quarantine")
        self._features = Table(tables_dir, "features")
        self._batches = Table(tables_dir, "batches")
        self._refused: int | None = None
        self._model = LoadedModel(spark, registry, self._champion())
        self._output = spark_schema(OUTPUT)

    def __call__(self, messages: DataFrame, batch_id: int) -> None:
        """Run the protocol for one micro-batch; `foreachBatch` calls this."""
        started = datetime.now(UTC)
        clock = perf_counter()
        query_id = read_query_id(self._checkpoint)
        if self._batches.committed(query_id, batch_id):
            return
        pin = self._pin(query_id, batch_id)
        model = self._model_of(pin)
        rows, reports = self._score(messages, pin, model)
        seconds = _summed([report.seconds for report in reports])

        predicted = rows.num_rows
        quarantined = _summed([report.quarantined for report in reports])
        self._account(pin, predicted, quarantined, reports)

        commit_clock = perf_counter()
        self._predictions.append(_with_lineage(rows, pin), query_id, batch_id)
        files = [report.quarantine_file for report in reports if report.quarantine_file]
        self._quarantine.append_files(files, query_id, batch_id)
        files = [report.features_file for report in reports if report.features_file]
        self._features.append_files(files, query_id, batch_id)
        now = perf_counter()
        seconds |= {"commit": now - commit_clock, "batch": now - clock}
        result = BatchResult(batch_id, pin.model_version, pin.input_rows, predicted, quarantined, seconds, now - clock)
        self._batches.append(_batch_row(result, pin, reports, started), query_id, batch_id)
        self._on_batch(result)

    def _pin(self, query_id: str, batch_id: int) -> Pin:
        path = self._checkpoint.parent / "pins" / f"{batch_id}.json"
        if path.exists():
            pin = _read_pin(path)
            if (pin.query_id, pin.batch_id) == (query_id, batch_id):
                return pin
        self._follow_champion()
        pin = Pin(
            query_id=query_id,
            batch_id=batch_id,
            model_version=self._model.version,
            bundle_sha256=self._model.sha256,
            offsets=batch_offsets(self._checkpoint, batch_id),
            pinned_at=datetime.now(UTC).isoformat(),
        )
        _write_durably(path, json.dumps(asdict(pin)))
        return pin

    def _champion(self) -> int:
        version = self._registry.target(CHAMPION)
        if version is None:
            raise ServiceError(
                f"there is no champion model in {self._registry.root}; make one with 'imagestream train'"
            )
        return version

    def _follow_champion(self) -> None:
        """Take up a newly promoted model; one that is refused leaves the old one at work."""
        version = self._champion()
        if version in {self._model.version, self._refused}:
            return
        try:
            self._swap(LoadedModel(self._spark, self._registry, version))
        except ModelError as error:
            self._refused = version
            self._on_refused(version, str(error))

    def _model_of(self, pin: Pin) -> LoadedModel:
        """The pinned model, which after a crash need not be today's champion."""
        if pin.bundle_sha256 != self._model.sha256:
            self._swap(LoadedModel(self._spark, self._registry, pin.model_version))
        if pin.bundle_sha256 != self._model.sha256:
            raise ServiceError(
                f"batch {pin.batch_id} is pinned to model version {pin.model_version} with SHA-256 "
                f"{pin.bundle_sha256}, but the registry's has {self._model.sha256}"
            )
        return self._model

    def _swap(self, model: LoadedModel) -> None:
        self._model.broadcast.unpersist()
        self._model = model
        self._refused = None

    def _score(self, messages: DataFrame, pin: Pin, model: LoadedModel) -> tuple[pa.Table, list[PartitionReport]]:
        task = ScoreTask(
            model_version=pin.model_version,
            bundle_sha256=pin.bundle_sha256,
            backbone_sha256=model.backbone_sha256,
            query_id=pin.query_id,
            batch_id=pin.batch_id,
            quarantine_dir=str(self._quarantine.directory),
            features_dir=str(self._features.directory) if self._store_features else None,
        )
        broadcast = model.broadcast

        def score(batches: Any) -> Any:
            return score_partition(batches, lambda: broadcast.value, task)

        output = messages.mapInArrow(score, self._output).toArrow().cast(OUTPUT)
        is_report = output.column(REPORT.name).is_valid()
        reports = [PartitionReport.from_json(text) for text in output.filter(is_report).column(REPORT.name).to_pylist()]
        return output.filter(pa.compute.invert(is_report)), reports

    def _account(self, pin: Pin, predicted: int, quarantined: dict[str, int], reports: list[PartitionReport]) -> None:
        """Input = predicted + quarantined, or nothing of the batch is committed."""
        read = sum(report.input_rows for report in reports)
        total = predicted + sum(quarantined.values())
        if not pin.input_rows == read == total:
            raise ServiceError(
                f"batch {pin.batch_id} does not add up: {pin.input_rows} messages by offsets, {read} read, "
                f"{predicted} predicted + {sum(quarantined.values())} quarantined"
            )


def read_query_id(checkpoint: Path) -> str:
    """The id that Spark gave the query when its checkpoint was made; it outlives restarts."""
    try:
        return str(json.loads((checkpoint / "metadata").read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError) as error:
        raise ServiceError(f"{checkpoint} is not the checkpoint of a stream: {error}") from error


def _read_pin(path: Path) -> Pin:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["offsets"] = [OffsetRange(**one) for one in content["offsets"]]
    return Pin(**content)


def _write_durably(path: Path, text: str) -> None:
    """Write a file so that after a crash of process or machine it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _with_lineage(rows: pa.Table, pin: Pin) -> pa.Table:
    rows = rows.drop_columns([REPORT.name])
    for name in LINEAGE:
        value = pa.scalar(getattr(pin, name.name), name.type)
        rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
    day = PREDICTIONS.field("date")
    return rows.append_column(day, pa.repeat(pa.scalar(pin.date, day.type), rows.num_rows))


def _batch_row(result: BatchResult, pin: Pin, reports: list[PartitionReport], started: datetime) -> pa.Table:
    row = {
        "model_version": pin.model_version,
        "bundle_sha256": pin.bundle_sha256,
        "query_id": pin.query_id,
        "batch_id": pin.batch_id,
        "offsets": [asdict(one) for one in pin.offsets],
        "input_rows": result.input_rows,
        "predicted_rows": result.predicted_rows,
        "quarantined_rows": sum(result.quarantined.values()),
        "input_bytes": sum(report.input_bytes for report in reports),
        "seconds": list(result.seconds.items()),
        "started_at": started,
        "committed_at": datetime.now(UTC),
    }
    return pa.Table.from_pylist([row], schema=BATCHES)
