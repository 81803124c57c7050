"""The audit on real Delta tables, consistent ones and every kind of inconsistent ones."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from streaming.errors import ServiceError
from streaming.jobs import audit as module
from streaming.jobs.audit import AuditReport, ProblemKind, Span, audit
from streaming.settings import Settings
from streaming.storage.tables import PREDICTIONS
from tests.conftest import imagestream
from tests.streaming.history import QUERY_ID, SHA256, commit_batch, prediction


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Three complete batches of two partitions: offsets 0 to 29 and 0 to 14, four of them quarantined."""
    settings = Settings(home=tmp_path)
    for number in range(3):
        ranges = {0: (10 * number, 10 * number + 10), 1: (5 * number, 5 * number + 5)}
        commit_batch(settings, number, ranges, bad={3, 12})
    return settings


def append(settings: Settings, *offsets: int, **columns: Any) -> None:
    """Append rows to partition 0 that the stream would not write."""
    lineage = {"model_version": 1, "bundle_sha256": SHA256, "query_id": QUERY_ID, "batch_id": 0}
    rows = [prediction(settings, 0, offset) | lineage | columns for offset in offsets]
    write_deltalake(
        Path(settings.place.tables) / "predictions", pa.Table.from_pylist(rows, schema=PREDICTIONS), mode="append"
    )


def delete(settings: Settings, predicate: str) -> None:
    DeltaTable(settings.place.table("predictions")).delete(predicate)


def texts(report: AuditReport, kind: ProblemKind) -> list[str]:
    return [problem.text for problem in report.problems if problem.kind is kind]


def test_consistent_history_is_clean_and_its_spans_are_reported(settings: Settings) -> None:
    report = audit(settings)
    assert report.clean
    assert not report.problems
    assert (report.batches, report.predicted, report.quarantined) == (3, 41, 4)
    topic = settings.topic
    assert report.spans == [Span(topic, 0, 0, 29, 30, 3), Span(topic, 1, 0, 14, 15, 3)]


def test_missing_rows_are_reported_as_offset_ranges(settings: Settings) -> None:
    delete(settings, "partition = 0 AND (offset IN (5, 6, 8) OR offset = 10)")
    report = audit(settings)
    gaps = [
        (p.where["topic"], p.where["partition"], p.where["from"], p.where["to"])
        for p in report.problems
        if p.kind is ProblemKind.GAP
    ]
    assert gaps == [(settings.topic, 0, 5, 6), (settings.topic, 0, 8, 8), (settings.topic, 0, 10, 10)]
    assert len(texts(report, ProblemKind.ACCOUNT)) == 2  # batches 0 and 1
    assert set(report.counts) == {ProblemKind.GAP, ProblemKind.ACCOUNT}


def test_repeated_row_is_reported(settings: Settings) -> None:
    append(settings, 4, 5)
    report = audit(settings)
    assert texts(report, ProblemKind.REPEAT) == [f"{settings.topic} partition 0: 2 rows for each of the offsets 4 to 5"]
    assert ProblemKind.ACCOUNT in report.counts


def test_message_both_predicted_and_quarantined_is_a_repeat(settings: Settings) -> None:
    append(settings, 3)
    assert texts(audit(settings), ProblemKind.REPEAT) == [
        f"{settings.topic} partition 0: 2 rows for each of the offsets 3 to 3"
    ]


def test_repeats_are_found_in_every_window_of_offsets(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", 8)  # four offsets of two partitions
    append(settings, 0, 9, 29)
    found = [problem.where["from"] for problem in audit(settings).problems if problem.kind is ProblemKind.REPEAT]
    assert found == [0, 9, 29]


def test_lost_and_repeated_messages_of_a_batch_do_not_cancel_out(settings: Settings) -> None:
    delete(settings, "partition = 0 AND offset = 5")
    append(settings, 4)
    report = audit(settings)
    assert set(report.counts) == {ProblemKind.REPEAT, ProblemKind.GAP}  # all counts agree
    assert [(p.where["from"], p.where["to"]) for p in report.problems] == [(4, 4), (5, 5)]


def test_gaps_between_batches_and_overlaps_are_reported(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (33, 40), 1: (14, 20)})
    report = audit(settings)
    assert [
        problem.where | {"kind": problem.kind} for problem in report.problems if problem.kind is ProblemKind.GAP
    ] == [{"kind": ProblemKind.GAP, "topic": settings.topic, "partition": 0, "from": 30, "to": 32}]
    (overlap,) = [problem.where for problem in report.problems if problem.kind is ProblemKind.OVERLAP]
    assert (overlap["partition"], overlap["from"], overlap["to"], overlap["batch_id"]) == (1, 14, 14, 3)


@pytest.mark.parametrize("upto", ["predictions", "quarantine"])
def test_newest_batch_missing_from_batches_is_unfinished(settings: Settings, upto: str) -> None:
    commit_batch(settings, 3, {0: (30, 40)}, bad={35}, upto=upto)
    report = audit(settings)
    assert report.clean
    assert [(batch["batch_id"], batch["predicted"]) for batch in report.unfinished] == [(3, 9)]


def test_older_batch_missing_from_batches_is_an_error(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (30, 40)}, upto="quarantine")
    commit_batch(settings, 4, {0: (40, 50)})
    report = audit(settings)
    assert [problem.where["batch_id"] for problem in report.problems if problem.kind is ProblemKind.NO_BATCH] == [3]
    assert (30, 39) in [(p.where["from"], p.where["to"]) for p in report.problems if p.kind is ProblemKind.GAP]


def test_row_of_another_model_than_its_batch_is_reported(settings: Settings) -> None:
    delete(settings, "partition = 0 AND offset = 5")
    append(settings, 5, model_version=2)
    report = audit(settings)
    assert set(report.counts) == {ProblemKind.MODEL}
    assert "has version 1, its rows 1 to 2" in texts(report, ProblemKind.MODEL)[0]


def test_row_outside_the_offsets_of_its_batch_is_reported(settings: Settings) -> None:
    delete(settings, "partition = 0 AND offset = 5")
    append(settings, 77)
    report = audit(settings)
    assert any("outside its offsets" in text for text in texts(report, ProblemKind.ACCOUNT))
    assert ProblemKind.GAP in report.counts


def test_audit_is_always_clean_while_a_stream_runs(settings: Settings) -> None:
    ended = threading.Event()

    def stream() -> None:
        for number in range(3, 28):
            commit_batch(settings, number, {0: (10 * number, 10 * number + 10)}, bad={10 * number + 1})
        ended.set()

    writer = threading.Thread(target=stream)
    writer.start()
    reports = []
    while not ended.is_set():
        reports.append(audit(settings))
    writer.join()
    assert [report.problems for report in reports if not report.clean] == []
    assert reports[0].batches < audit(settings).batches == 28


def test_command_reports_problems_and_exits_1(settings: Settings) -> None:
    assert imagestream(settings, "audit")["clean"] is True
    delete(settings, "offset = 7 AND partition = 1")
    found = imagestream(settings, "audit", code=1)
    assert found["counts"] == {"account": 1, "gap": 1}
    assert json.dumps(found).count('"from": 7') == 1


def test_without_tables_there_is_nothing_to_audit(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"nothing to audit .* no table predictions, quarantine, batches"):
        audit(Settings(home=tmp_path))


def test_accepted_gap_is_reported_but_not_a_problem(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 10)})
    commit_batch(settings, 1, {0: (14, 20)}, left_out={0: (10, 14)})
    report = audit(settings)
    assert report.clean
    assert report.left_out == [{"topic": settings.topic, "partition": 0, "from": 10, "to": 13}]


def test_gap_larger_than_accepted_is_a_problem(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 10)})
    commit_batch(settings, 1, {0: (14, 20)}, left_out={0: (12, 14)})
    assert audit(settings).counts == {ProblemKind.GAP: 1}
