"""The parts of a commit that need no Spark: what must add up, and the rows that are written."""

from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from models.drift import DriftReference, DriftSums
from streaming.errors import ServiceError
from streaming.pipeline.commit import (
    BatchCommitter,
    BatchResult,
    Tables,
    _batch_row,
    _predictions,
    _shadow,
    _summed,
)
from streaming.pipeline.continuity import Accept, Continuity
from streaming.pipeline.pin import OffsetRange, Pin, PinnedModel, Pins
from streaming.pipeline.score import OUTPUT, PartitionReport
from streaming.pipeline.serving import LoadedModel, Serving
from streaming.settings import Settings
from streaming.storage.tables import BATCHES, PREDICTIONS, SHADOW
from tests.streaming.history import QUERY_ID, commit_batch

CHAMPION, CHALLENGER = PinnedModel(3, "c" * 64), PinnedModel(4, "d" * 64)
PIN = Pin(
    query_id=QUERY_ID,
    batch_id=7,
    model=CHAMPION,
    challenger=CHALLENGER,
    offsets=[OffsetRange("images", 0, 10, 14), OffsetRange("images", 1, 0, 2)],
    left_out=[OffsetRange("images", 0, 8, 10)],
    pinned_at="2024-05-06T23:59:59+00:00",
)
RESULT = BatchResult(
    batch_id=7,
    model_version=3,
    input_rows=6,
    input_bytes=600,
    predicted_rows=3,
    quarantined={"truncated": 2, "corrupt": 1},
    seconds={"batch": 2.5, "score": 1.5},
)


class Models:
    """What the committer asks of `Serving` for a pin: the models that the aliases point to, after it has looked."""

    def __init__(self) -> None:
        self.champion = self._model(PinnedModel(1, "a" * 64))
        self.challenger: LoadedModel | None = self._model(PinnedModel(2, "b" * 64))
        self.next: tuple[PinnedModel, PinnedModel | None] = (CHAMPION, CHALLENGER)

    def follow(self) -> None:
        champion, challenger = self.next
        self.champion = self._model(champion)
        self.challenger = self._model(challenger) if challenger else None

    @staticmethod
    def _model(pinned: PinnedModel) -> LoadedModel:
        return cast("LoadedModel", SimpleNamespace(pinned=pinned))


def committer(directory: Path, continuity: Continuity, models: Models | None = None) -> BatchCommitter:
    return BatchCommitter(
        cast("Serving", models or Models()),
        Tables(directory / "tables"),
        continuity,
        directory / "images" / "spark",
        store_features=False,
        on_batch=[].append,
        on_step=[].append,
    )


def scored(*labels: str, shadow: tuple[str | None, ...] | None = None) -> pa.Table:
    """Rows as workers give them."""
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


# What must add up


@pytest.mark.parametrize(
    ("predicted", "quarantined", "read"),
    [(5, {"corrupt": 1}, [4, 2]), (6, {}, [6]), (0, {"corrupt": 4, "empty": 2}, [1, 2, 3])],
)
def test_a_batch_that_adds_up_is_taken(
    tmp_path: Path, predicted: int, quarantined: dict[str, int], read: list[int]
) -> None:
    reports = [PartitionReport(input_rows=rows) for rows in read]
    committer(tmp_path, Continuity("images"))._account(PIN, predicted, quarantined, reports)


@pytest.mark.parametrize(
    ("predicted", "quarantined", "read"),
    [
        (4, {"corrupt": 1}, [4, 2]),  # one lost
        (6, {"corrupt": 1}, [4, 2]),  # one twice
        (5, {"corrupt": 1}, [4, 1]),  # not read, and yet answered
        (5, {"corrupt": 2}, [4, 3]),  # more than Spark had planned
        (4, {"corrupt": 1}, [4, 1]),  # fewer
        (0, {}, []),
    ],
)
def test_a_batch_that_does_not_add_up_is_refused(
    tmp_path: Path, predicted: int, quarantined: dict[str, int], read: list[int]
) -> None:
    reports = [PartitionReport(input_rows=rows) for rows in read]
    text = f"batch 7 does not add up: 6 messages by offsets, {sum(read)} read, {predicted} predicted .* nothing of it"
    with pytest.raises(ServiceError, match=text):
        committer(tmp_path, Continuity("images"))._account(PIN, predicted, quarantined, reports)


def test_what_partitions_report_is_summed_by_name() -> None:
    assert _summed([]) == {}
    assert _summed([{"corrupt": 1}, {"corrupt": 2, "empty": 1}, {"empty": 4}]) == {"corrupt": 3, "empty": 5}


# What is pinned


def test_a_pin_binds_the_models_of_the_moment_to_the_offsets_and_is_written(tmp_path: Path) -> None:
    continuity = Continuity("images", {0: 8}, Accept(loss=True))
    before = datetime.now(UTC)
    pin = committer(tmp_path, continuity)._pin(QUERY_ID, 7, PIN.offsets)
    assert replace(pin, pinned_at=PIN.pinned_at) == PIN
    assert before <= datetime.fromisoformat(pin.pinned_at) <= datetime.now(UTC)
    assert Pins(tmp_path / "images" / "pins").read(QUERY_ID, 7) == pin


def test_without_a_challenger_none_is_pinned(tmp_path: Path) -> None:
    models = Models()
    models.next = (CHAMPION, None)
    pin = committer(tmp_path, Continuity("images"), models)._pin(QUERY_ID, 7, PIN.offsets)
    assert (pin.model, pin.challenger, pin.left_out) == (CHAMPION, None, [])


def test_offsets_that_do_not_continue_are_not_pinned(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="2 messages are missing"):
        committer(tmp_path, Continuity("images", {0: 8}))._pin(QUERY_ID, 7, PIN.offsets)
    assert Pins(tmp_path / "images" / "pins").read(QUERY_ID, 7) is None


# What is written


def test_a_prediction_carries_the_champion_and_the_day_of_its_pin() -> None:
    rows = _predictions(scored("cat", "dog"), PIN)
    assert rows.schema == PREDICTIONS
    first = rows.to_pylist()[1]
    assert (first["offset"], first["label"], first["confidence"]) == (1, "dog", 0.75)
    assert (first["model_version"], first["bundle_sha256"]) == (3, "c" * 64)
    assert (first["query_id"], first["batch_id"], first["date"]) == (QUERY_ID, 7, date(2024, 5, 6))
    assert _predictions(scored(), PIN).num_rows == 0


def test_the_challengers_answers_stand_beside_the_champions_and_what_it_failed_on_is_left_out() -> None:
    rows = _shadow(scored("cat", "dog", "cat", shadow=("dog", None, "cat")), PIN)
    assert rows.schema == SHADOW
    assert [(row["offset"], row["champion_label"], row["label"]) for row in rows.to_pylist()] == [
        (0, "cat", "dog"),
        (2, "cat", "cat"),
    ]
    first = rows.to_pylist()[0]
    assert (first["champion_confidence"], first["confidence"]) == (0.75, 0.5)
    assert (first["model_version"], first["bundle_sha256"]) == (4, "d" * 64)
    assert (first["query_id"], first["batch_id"]) == (QUERY_ID, 7)
    with pytest.raises(ServiceError, match="batch 7 has no challenger"):
        _shadow(scored("cat"), replace(PIN, challenger=None))


def row_of(result: BatchResult, pin: Pin) -> dict[str, Any]:
    table = _batch_row(result, pin, datetime(2024, 5, 6, tzinfo=UTC))
    assert table.schema == BATCHES
    (row,) = table.to_pylist()
    return dict(row)


def test_the_row_of_a_batch_accounts_for_it() -> None:
    row = row_of(RESULT, PIN)
    assert (row["input_rows"], row["predicted_rows"], row["quarantined_rows"], row["input_bytes"]) == (6, 3, 3, 600)
    assert row["offsets"] == [
        {"topic": "images", "partition": 0, "start": 10, "end": 14},
        {"topic": "images", "partition": 1, "start": 0, "end": 2},
    ]
    assert row["left_out"] == [{"topic": "images", "partition": 0, "start": 8, "end": 10}]
    assert (row["model_version"], row["bundle_sha256"], row["challenger_version"]) == (3, "c" * 64, 4)
    assert (row["query_id"], row["batch_id"]) == (QUERY_ID, 7)
    assert dict(row["seconds"]) == RESULT.seconds
    assert RESULT.wall_s == 2.5
    assert RESULT.cores == 1
    assert row["started_at"] < row["committed_at"]
    assert (row["refused"], row["drift"]) == (None, None)


def test_what_a_batch_had_nothing_of_is_null_in_its_row() -> None:
    row = row_of(RESULT, replace(PIN, challenger=None, left_out=[]))
    assert (row["challenger_version"], row["left_out"]) == (None, None)


def test_refused_models_and_drift_stand_in_the_row_of_the_batch() -> None:
    refused = {5: "altered", 6: "too large"}
    row = row_of(replace(RESULT, refused=refused, drift={"psi": 0.2}), PIN)
    assert row["refused"] == "version 5: altered; version 6: too large"
    assert dict(row["drift"]) == {"psi": 0.2}


def test_drift_is_of_all_partitions_that_report_it_and_none_without_a_reference(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    known = generator.normal(size=(500, 2)).astype(np.float32)
    reference = DriftReference.of(known, np.full(500, 0.9, np.float32))
    halves = []
    for shift in (0.0, 3.0):
        sums = DriftSums.empty(reference.components)
        sums.add(reference, known + np.float32(shift), np.full(500, 0.9, np.float32))
        halves.append(PartitionReport(drift=sums.as_json()))
    nothing = PartitionReport()

    def found(reference: DriftReference | None, reports: list[PartitionReport]) -> dict[str, float]:
        models = Models()
        models.pinned = lambda _: SimpleNamespace(reference=reference)  # type: ignore[attr-defined]
        return committer(tmp_path, Continuity("images"), models)._drift(PIN, reports)[1]

    assert found(None, halves) == {}
    like, unlike = found(reference, [halves[0], nothing]), found(reference, [nothing, halves[1]])
    both = found(reference, [*halves, nothing])
    assert like["psi_max"] < both["psi_max"] < unlike["psi_max"]


# Batches that are not scored again


def planned(directory: Path, end: int) -> Path:
    """A checkpoint whose batch 0 is planned to end at this offset of partition 0."""
    checkpoint = directory / "images" / "spark"
    for file, offset in (("sources/0/0", 0), ("offsets/0", end)):
        (checkpoint / file).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / file).write_text(f'v1\n{{}}\n{{"images":{{"0":{offset}}}}}')
    (checkpoint / "metadata").write_text(f'{{"id":"{QUERY_ID}"}}')
    return checkpoint


def test_a_batch_that_is_whole_is_left_alone_unless_it_was_planned_to_hold_more(tmp_path: Path) -> None:
    home = Settings(home=tmp_path)
    commit_batch(home, 0, {0: (0, 5)})
    commit = committer(tmp_path, Continuity("images", {0: 5}))
    planned(tmp_path, 5)
    unscored = cast("Any", None)  # a frame that is looked at would be an error
    commit(unscored, 0)
    planned(tmp_path, 6)
    with pytest.raises(ServiceError, match="up to offset 6 that is committed up to 5 only"):
        commit(unscored, 0)
    assert DeltaTable(tmp_path / "tables" / "batches").version() == 1


def test_a_batch_that_found_nothing_new_is_not_committed(tmp_path: Path) -> None:
    planned(tmp_path, 0)
    committer(tmp_path, Continuity("images"))(cast("Any", None), 0)
    assert DeltaTable(tmp_path / "tables" / "batches").version() == 0


def test_rows_beyond_what_is_committed_are_discarded_from_every_table(tmp_path: Path) -> None:
    home = Settings(home=tmp_path)
    commit_batch(home, 0, {0: (0, 5), 1: (0, 2)})
    commit_batch(home, 1, {0: (5, 9), 1: (2, 3)}, bad={6, 7}, upto="quarantine")
    commit_batch(home.model_copy(update={"topic": "other"}), 2, {0: (0, 9)}, upto="quarantine")
    tables = Tables(home.tables_dir)
    assert tables.discard_unfinished(Continuity("images", {0: 5, 1: 2})) == 5
    assert tables.discard_unfinished(Continuity("images", {0: 5, 1: 2})) == 0
    left = DeltaTable(tables.predictions.directory).to_pyarrow_table(columns=["topic", "partition", "offset"])
    kept = [(row["topic"], row["partition"], row["offset"]) for row in left.to_pylist()]
    assert sorted(kept) == [
        *(("images", 0, offset) for offset in range(5)),
        *(("images", 1, offset) for offset in range(2)),
        *(("other", 0, offset) for offset in range(9)),
    ]
    assert DeltaTable(tables.quarantine.directory).to_pyarrow_table().num_rows == 0
