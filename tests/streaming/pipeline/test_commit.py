"""The parts of a commit that need no Spark: accounting, decisions and the rows that are written."""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from models.drift import DriftReference, DriftSums
from streaming.errors import ServiceError
from streaming.jobs.audit import audit
from streaming.pipeline.bounded import BoundedMessages
from streaming.pipeline.commit import (
    STEPS,
    BatchCommitter,
    BatchResult,
    LostDecisionError,
    _cores,
    _predictions,
    _refused,
    _Scored,
    _shadow,
    _summed,
    _waited,
)
from streaming.pipeline.decisions import CountedRange, Decision, Decisions, ModelVersion, OffsetRange, TopicPartition
from streaming.pipeline.finish import Tables, finish_decided
from streaming.pipeline.model_manager import LoadedModel, ModelManager
from streaming.pipeline.positions import OffsetPlan, Positions
from streaming.pipeline.reconcile import OffsetRun, TopicSnapshot
from streaming.pipeline.score import OUTPUT, PartitionReport
from streaming.pipeline.status import refusal
from streaming.platform.topic import Topic
from streaming.query import query
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.store import open_store
from streaming.storage.tables import PREDICTIONS, SHADOW
from tests.conftest import command_here
from tests.models.samples import tiny_bundle
from tests.streaming.history import QUERY_ID, begin_stream, decision_of, quarantined, worker_file

CHAMPION, CHALLENGER = ModelVersion(3, "c" * 64), ModelVersion(4, "d" * 64)
RANGES = [OffsetRange("images", 0, 10, 14), OffsetRange("images", 1, 0, 2)]
LINEAGE = {"query_id": QUERY_ID, "batch_id": 7}


class Models:
    """The interface of `ModelManager` that the committer uses, with fixed models."""

    def __init__(self, reference: DriftReference | None = None) -> None:
        self._reference = reference
        self.refused: dict[int, str] = {}
        self.champion = self._model(ModelVersion(1, "a" * 64))
        self.challenger: LoadedModel | None = self._model(ModelVersion(2, "b" * 64))
        self.next: tuple[ModelVersion, ModelVersion | None] = (CHAMPION, CHALLENGER)

    def follow(self) -> None:
        champion, challenger = self.next
        self.champion = self._model(champion)
        self.challenger = self._model(challenger) if challenger else None

    def _model(self, version: ModelVersion) -> LoadedModel:
        return cast("LoadedModel", SimpleNamespace(version=version, reference=self._reference))


class Committer(BatchCommitter):
    """A committer that calls `scored` instead of Spark's workers."""

    scored: Callable[[int], _Scored]

    def _score(self, *_: Any) -> _Scored:
        return self.scored(self.plan.number + 1)


FRAME = cast("Any", SimpleNamespace(sparkSession=SimpleNamespace(sparkContext=SimpleNamespace(defaultParallelism=2))))


def scored(*labels: str, shadow: tuple[str | None, ...] | None = None) -> pa.Table:
    """Rows as returned by workers."""
    shadow = shadow or labels
    rows = [
        {
            "image_id": str(offset),
            "topic": "images",
            "partition": 0,
            "offset": offset,
            "label": label,
            "confidence": 0.75,
            "scored_at": datetime(2024, 5, 7, tzinfo=UTC),
            "shadow_label": other,
            "shadow_confidence": None if other is None else 0.5,
        }
        for offset, (label, other) in enumerate(zip(labels, shadow, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=OUTPUT)


def test_partition_reports_are_summed_by_name() -> None:
    assert _summed([]) == {}
    assert _summed([{"corrupt": 1}, {"corrupt": 2, "empty": 1}, {"empty": 4}]) == {"corrupt": 3, "empty": 5}


def test_wait_of_a_prediction_is_counted_from_its_timestamp() -> None:
    now = datetime(2024, 5, 7, 12, 0, 10, tzinfo=UTC)
    times = [now - timedelta(seconds=10), None, now - timedelta(milliseconds=250), now + timedelta(seconds=5)]
    rows = pa.table({"published_at": pa.array(times, pa.timestamp("us", "UTC"))})
    assert _waited(rows, now) == [pytest.approx(10.0), pytest.approx(0.25, abs=1e-5), 0.0]


@pytest.mark.parametrize(("reports", "cores"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_batch_uses_a_core_per_partition_of_its_messages(reports: int, cores: int) -> None:
    found = [PartitionReport()] * reports
    assert _cores(FRAME, found) == cores
    assert _cores(BoundedMessages(iter([])), found) == 1, "in this process"


# Rows


def test_predictions_have_the_champion_and_date_of_their_batch() -> None:
    rows = _predictions(scored("cat", "dog"), CHAMPION, LINEAGE | {"date": date(2024, 5, 6)})
    assert rows.schema == PREDICTIONS
    first = rows.to_pylist()[1]
    assert (first["offset"], first["label"], first["confidence"]) == (1, "dog", 0.75)
    assert (first["model_version"], first["bundle_sha256"]) == (3, "c" * 64)
    assert (first["query_id"], first["batch_id"], first["date"]) == (QUERY_ID, 7, date(2024, 5, 6))
    assert _predictions(scored(), CHAMPION, LINEAGE | {"date": date(2024, 5, 6)}).num_rows == 0


def test_shadow_rows_pair_challenger_with_champion_and_omit_failures() -> None:
    rows = _shadow(scored("cat", "dog", "cat", shadow=("dog", None, "cat")), CHALLENGER, LINEAGE)
    assert rows.schema == SHADOW
    assert [(row["offset"], row["champion_label"], row["label"]) for row in rows.to_pylist()] == [
        (0, "cat", "dog"),
        (2, "cat", "cat"),
    ]
    first = rows.to_pylist()[0]
    assert (first["champion_confidence"], first["confidence"]) == (0.75, 0.5)
    assert (first["model_version"], first["bundle_sha256"]) == (4, "d" * 64)
    assert (first["query_id"], first["batch_id"]) == (QUERY_ID, 7)


def test_refused_models_are_joined_into_one_text() -> None:
    assert _refused({5: "altered", 6: "too large"}) == "version 5: altered; version 6: too large"
    assert _refused({}) is None


def test_reason_of_a_refused_version_is_found_in_the_joined_text() -> None:
    text = _refused({11: "too large; see version 1: nothing", 1: "altered"})
    assert [refusal(text, version) for version in (11, 1, 2, None)] == [
        "too large; see version 1: nothing", "altered", None, None,
    ]  # fmt: skip
    assert refusal(None, 1) is None


# The commit protocol


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path)
    begin_stream(settings, {0: 0})
    return settings


class Run:
    """A run of the stream without Spark and Kafka: two messages of each batch are predicted, one is quarantined."""

    def __init__(self, settings: Settings, models: Models | None = None, crash_at: str | None = None) -> None:
        self.steps: list[str] = []
        self.asked: list[list[TopicPartition]] = []
        self.topic_id = "topic-id"
        self.holes = 0
        self.challenger_error: str | None = None
        self.batches: list[BatchResult] = []
        self.models = models or Models()
        self._settings = settings
        self._crash_at = crash_at
        tables = Tables(settings.place.tables)
        self.committer = Committer(
            cast("ModelManager", self.models),
            tables,
            Decisions(open_store(settings.home), settings.topic),
            self._witness,
            store_features=False,
            on_batch=self.batches.append,
            on_step=self._step,
        )
        self.committer.scored = self._score
        positions = finish_decided(settings, settings.topic, tables)
        assert positions is not None
        topic = Topic("images", "topic-id", {0: 0}, {0: 100})
        self.committer.plan = OffsetPlan(
            positions.stream or "", positions.number, "images", positions.of_topic("images"), topic
        )

    def _witness(self, topics: Collection[str], partitions: Collection[TopicPartition]) -> Future[TopicSnapshot]:
        """Kafka's answer; log starts are requested for partitions with holes."""
        self.asked.append(list(partitions))
        snapshot: Future[TopicSnapshot] = Future()
        snapshot.set_result(TopicSnapshot(dict.fromkeys(topics, self.topic_id), dict.fromkeys(partitions, 0)))
        return snapshot

    def batch(self, start: int) -> None:
        self._start = start
        self.committer(FRAME, [OffsetRange("images", 0, start, start + 3 + self.holes)])

    def _score(self, number: int) -> _Scored:
        model = self.models.champion.version
        lineage = {"query_id": QUERY_ID, "batch_id": number}
        lineage |= {"model_version": model.version, "bundle_sha256": model.sha256}
        bad = quarantined(self._settings, 0, self._start + 2) | lineage
        (file,) = worker_file(Path(self._settings.place.tables) / "quarantine", [bad])
        rows = scored("cat", "dog").to_pylist()
        answers = [row | {"offset": self._start + one} for one, row in enumerate(rows)]
        report = PartitionReport(
            read=[OffsetRun("images", 0, 3, self._start, self._start + 2)],
            quarantined_at=[("images", 0, 1)],
            input_bytes=300,
            quarantined={"corrupt": 1},
            quarantine_file=file,
            seconds={"decode": 0.5},
            challenger_error=self.challenger_error,
        )
        return _Scored(pa.Table.from_pylist(answers, schema=OUTPUT), [report], {"corrupt": 1})

    def _step(self, step: str) -> None:
        self.steps.append(step)
        if step == self._crash_at:
            raise CrashError


class CrashError(BaseException):
    """Simulates a crash of the process."""


def check_complete(settings: Settings, batches: int) -> None:
    report = audit(settings)
    assert report.clean, [problem.text for problem in report.problems]
    assert not report.unfinished
    assert (report.batches, report.predicted, report.quarantined) == (batches, 2 * batches, batches)


def test_failing_challenger_is_reported_and_the_champion_answers(settings: Settings) -> None:
    registry = open_registry(settings.home)
    for _ in range(4):
        registry.register(tiny_bundle)
    registry.promote(3, by="ada", why="")
    registry.promote(4, alias="challenger", by="ada", why="")
    run = Run(settings)
    run.challenger_error = "ValueError: it expects other images"
    run.batch(0)
    check_complete(settings, 1)
    assert (run.batches[0].challenger_error, run.models.refused) == (run.challenger_error, {})
    why = f"fails in scoring: {run.challenger_error}"
    _, out, _ = command_here("--home", settings.home, "status", "--format", "csv")
    assert f"challenger,does not score: {why}" in out
    for version, line in ((4, f"not used in the last micro-batch: {why}"), (3, "")):
        code, _, err = command_here("--home", settings.home, "models", "show", str(version))
        assert (code, err.splitlines()[1:]) == (0, [line] if line else [])
    run.challenger_error = None
    run.batch(3)
    assert "does not score" not in command_here("--home", settings.home, "status")[1]


def decision_in(settings: Settings, number: int) -> Decision | None:
    return Decisions(open_store(settings.home), settings.topic).read(number)


def test_batch_is_decided_with_the_current_models_and_completed(settings: Settings) -> None:
    run = Run(settings)
    run.models.refused = {5: "altered"}
    before = datetime.now(UTC)
    run.batch(0)
    run.batch(3)
    assert run.steps == [*STEPS, *STEPS]
    assert [(one.batch_id, one.model_version, one.input_rows, one.input_bytes) for one in run.batches] == [
        (1, 3, 3, 300),
        (2, 3, 3, 300),
    ]
    check_complete(settings, 2)
    decision = decision_in(settings, 2)
    assert decision is not None
    assert (decision.stream, decision.model, decision.challenger) == (QUERY_ID, CHAMPION, CHALLENGER)
    assert decision.ranges == (CountedRange("images", 0, 3, 6, 3),)
    assert decision.topics == {"images": "topic-id"}
    assert {name: len(files) for name, files in decision.files.items()} == {
        "predictions": 1, "quarantine": 1, "features": 0, "shadow": 1,
    }  # fmt: skip
    (row,) = query(settings, "SELECT * FROM batches WHERE batch_id = 2").to_pylist()
    assert (row["model_version"], row["bundle_sha256"], row["challenger_version"]) == (3, "c" * 64, 4)
    assert row["offsets"] == [{"topic": "images", "partition": 0, "start": 3, "end": 6, "rows": 3, "log_start": None}]
    assert run.asked == [[], []]  # no log starts are needed
    assert (row["input_rows"], row["predicted_rows"], row["quarantined_rows"], row["input_bytes"]) == (3, 2, 1, 300)
    assert (row["refused"], row["drift"], row["left_out"]) == ("version 5: altered", None, None)
    assert dict(row["topics"]) == {"images": "topic-id"}
    seconds = dict(row["seconds"])
    assert seconds["decode"] == 0.5
    assert seconds["batch"] == pytest.approx(seconds["plan"] + seconds["score"] + seconds["commit"])
    assert before <= row["started_at"] <= decision.decided_at <= row["committed_at"]
    assert run.batches[1].wall_s >= seconds["batch"]
    assert run.batches[0].seconds["between"] == 0.0
    assert 0.0 <= seconds["between"] <= (datetime.now(UTC) - before).total_seconds()
    assert [one.cores for one in run.batches] == [1, 1]  # one partition


def test_decision_of_a_batch_with_holes_has_the_log_start(settings: Settings) -> None:
    run = Run(settings)
    run.holes = 2
    run.batch(0)
    assert run.asked == [[("images", 0)]]
    decision = decision_in(settings, 1)
    assert decision is not None
    assert decision.ranges == (CountedRange("images", 0, 0, 5, 3, log_start=0),)
    report = audit(settings)
    assert report.clean
    assert [(one.messages, one.holes, one.proven) for one in report.spans] == [(3, 2, 2)]


def test_topic_recreated_during_a_batch_leaves_no_decision_or_file(settings: Settings) -> None:
    run = Run(settings)
    run.topic_id = "another"
    with pytest.raises(ServiceError, match="'images' was recreated while batch 1 was read"):
        run.batch(0)
    assert decision_in(settings, 1) is None
    assert not [*Path(settings.place.tables).rglob("part-*.parquet")]


def test_decision_without_a_challenger(settings: Settings) -> None:
    models = Models()
    models.next = (CHAMPION, None)
    Run(settings, models).batch(0)
    decision = decision_in(settings, 1)
    assert decision is not None
    assert decision.challenger is None
    (row,) = query(settings, "SELECT challenger_version FROM batches").to_pylist()
    assert row["challenger_version"] is None


def test_empty_batch_is_not_decided(settings: Settings) -> None:
    run = Run(settings)
    run.committer(FRAME, [])
    assert run.steps == []
    assert decision_in(settings, 1) is None


def test_noncontiguous_batch_is_not_scored(settings: Settings) -> None:
    run = Run(settings)
    with pytest.raises(ServiceError, match="must begin at offset 0"):
        run.batch(3)
    assert run.steps == []


def test_batch_with_an_unread_message_is_named_and_not_decided(settings: Settings) -> None:
    run = Run(settings)
    run.batch(0)

    def lossy(number: int) -> _Scored:
        found = run._score(number)
        (report,) = found.reports
        return replace(found, reports=[replace(report, read=[OffsetRun("images", 0, 2, 3, 4)])])

    run.committer.scored = lossy
    with pytest.raises(ServiceError, match=r"^batch 2 does not add up: .* 2 messages read of offsets 3 to 5, 2 pred"):
        run.batch(3)
    assert decision_in(settings, 2) is None


@pytest.mark.parametrize("step", STEPS)
def test_crash_at_any_step_is_recovered_by_the_next_run(settings: Settings, step: str) -> None:
    Run(settings).batch(0)
    with pytest.raises(CrashError):
        Run(settings, crash_at=step).batch(3)
    models = Models()
    models.next = (CHALLENGER, None)  # promoted in the meantime
    run = Run(settings, models)
    decided = STEPS.index(step) >= STEPS.index("decide")
    assert run.committer.plan.number == (2 if decided else 1)
    run.batch(6 if decided else 3)
    check_complete(settings, 3 if decided else 2)
    versions = query(settings, "SELECT model_version AS v FROM batches ORDER BY batch_id").to_pylist()
    assert [row["v"] for row in versions] == ([3, 3, 4] if decided else [3, 4])


def test_lost_decision_leaves_no_file_and_the_winning_batch_is_finished(settings: Settings) -> None:
    run = Run(settings)
    files = {*Path(settings.place.tables).rglob("*.parquet")}
    winner = decision_of(settings, 1, {0: (0, 5)})
    winner_files = {*Path(settings.place.tables).rglob("*.parquet")} - files
    assert Decisions(open_store(settings.home), settings.topic).decide(winner)
    with pytest.raises(LostDecisionError, match="batch 1 was decided by another driver"):
        run.batch(0)
    assert {*Path(settings.place.tables).rglob("part-*.parquet")} == winner_files
    assert run.batches == []
    assert finish_decided(settings, "images", Tables(settings.place.tables)) == Positions(
        QUERY_ID, 1, {("images", 0): 5}, {"images": "topic-id"}
    )


def test_run_with_an_outdated_batch_number_applies_nothing(settings: Settings) -> None:
    run = Run(settings)
    for number in (1, 2, 3):
        decision = decision_of(settings, number, {0: (10 * number - 10, 10 * number)})
        assert Decisions(open_store(settings.home), settings.topic).decide(decision)
    finish_decided(settings, "images", Tables(settings.place.tables))
    (settings.work_dir / "streams" / "images" / "batches" / f"{1:020}.json").unlink()  # pruned
    with pytest.raises(LostDecisionError, match="beyond batch 1"):
        run.batch(0)
    assert DeltaTable(settings.place.table("quarantine")).version() == 0
    assert audit(settings).clean


def test_drift_combines_partitions_and_needs_a_reference(settings: Settings) -> None:
    generator = np.random.default_rng(0)
    known = generator.normal(size=(500, 2)).astype(np.float32)
    reference = DriftReference.of(known, np.full(500, 0.9, np.float32))
    halves = []
    for shift in (0.0, 3.0):
        sums = DriftSums.empty(reference.components)
        sums.add(reference, known + np.float32(shift), np.full(500, 0.9, np.float32))
        halves.append(PartitionReport(drift=sums.as_json()))
    without_drift = PartitionReport()

    def found(reference: DriftReference | None, reports: list[PartitionReport]) -> dict[str, float]:
        return Run(settings).committer._drift(Models(reference).champion, reports)[1]

    assert found(None, halves) == {}
    same, shifted = found(reference, [halves[0], without_drift]), found(reference, [without_drift, halves[1]])
    both = found(reference, [*halves, without_drift])
    assert same["psi_max"] < both["psi_max"] < shifted["psi_max"]
