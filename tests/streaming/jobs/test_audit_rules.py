"""Each rule of the audit separately: one inconsistency, and everything else is consistent."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from streaming.jobs import audit as module
from streaming.jobs.audit import AuditReport, Compared, ProblemKind, Span, audit
from streaming.settings import Settings
from streaming.storage.tables import BATCHES, OFFSET_RANGE, PREDICTIONS, QUARANTINE, Table
from tests.streaming.history import QUERY_ID, SHA256, commit_batch, prediction, quarantined

OTHER_QUERY = QUERY_ID.replace("1", "2")
Ranges = list[tuple[int, int]]


@pytest.fixture(scope="module")
def consistent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three batches of ten messages in one partition: offsets 100 to 129, of which 103 and 112 are quarantined."""
    settings = Settings(home=tmp_path_factory.mktemp("consistent"))
    for number in range(3):
        commit_batch(settings, number, {0: (100 + 10 * number, 110 + 10 * number)}, bad={103, 112})
    return settings.work_dir


@pytest.fixture
def settings(consistent: Path, tmp_path: Path) -> Settings:
    """A copy of the consistent home."""
    return Settings(home=shutil.copytree(consistent, tmp_path / "home"))


def delete(settings: Settings, predicate: str, table: str = "predictions") -> None:
    DeltaTable(settings.place.table(table)).delete(predicate)


def predict(settings: Settings, *offsets: int, batch_id: int = 0, partition: int = 0, **columns: Any) -> None:
    """Append rows that the stream would not write."""
    lineage = {"model_version": 1, "bundle_sha256": SHA256, "query_id": QUERY_ID, "batch_id": batch_id}
    rows = [prediction(settings, partition, offset) | lineage | columns for offset in offsets]
    write_deltalake(
        Path(settings.place.tables) / "predictions", pa.Table.from_pylist(rows, schema=PREDICTIONS), mode="append"
    )


def alter(settings: Settings, change: Callable[[dict[str, Any]], object], batch_id: int = 1) -> None:
    """Change the row of a batch in `batches`."""
    rows = DeltaTable(settings.place.table("batches")).to_pyarrow_table().to_pylist()
    for row in rows:
        if row["batch_id"] == batch_id:
            change(row)
    table = pa.Table.from_pylist(rows, schema=BATCHES)
    write_deltalake(settings.place.table("batches"), table, mode="overwrite")


def ranges(report: AuditReport, kind: ProblemKind) -> Ranges:
    return [(one.where["from"], one.where["to"]) for one in report.problems if one.kind is kind]


def batches(report: AuditReport, kind: ProblemKind) -> list[int]:
    return [one.where["batch_id"] for one in report.problems if one.kind is kind]


# The report


def test_all_problems_are_counted_and_the_first_thousand_of_each_kind_listed() -> None:
    report = AuditReport()
    assert report.clean
    assert (report.batches, report.predicted, report.quarantined) == (0, 0, 0)
    for number in range(1001):
        report.add(ProblemKind.GAP, f"gap {number}", number=number)
    report.add(ProblemKind.REPEAT, "repeat", number=0)
    assert not report.clean
    assert report.counts == {ProblemKind.GAP: 1001, ProblemKind.REPEAT: 1}
    assert [problem.where["number"] for problem in report.problems] == [*range(1000), 0]
    assert report.problems[-1].kind is ProblemKind.REPEAT
    assert "searched" not in repr(report)


def test_spans_are_listed_by_partition(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (130, 131), 2: (7, 9)})
    report = audit(settings)
    assert report.clean
    topic = settings.topic
    assert report.spans == [Span(topic, 0, 100, 130, 31, 4), Span(topic, 2, 7, 8, 2, 1)]
    assert (report.batches, report.predicted, report.quarantined) == (4, 31, 2)


def test_empty_tables_are_clean(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for name in ("predictions", "quarantine", "batches"):
        Table(settings.place.tables, name)
    report = audit(settings)
    assert report.clean
    assert (report.batches, report.predicted, report.quarantined, report.spans) == (0, 0, 0, [])


def test_batches_of_another_query_are_numbered_separately(settings: Settings) -> None:
    for number in range(2):
        commit_batch(settings, number, {0: (130 + 5 * number, 135 + 5 * number)}, query_id=OTHER_QUERY, version=2)
    assert audit(settings).clean
    commit_batch(settings, 2, {0: (140, 145)}, query_id=OTHER_QUERY, upto="quarantine")
    report = audit(settings)
    assert report.clean
    assert [(one["query_id"], one["batch_id"]) for one in report.unfinished] == [(OTHER_QUERY, 2)]


def test_tables_without_the_left_out_column_are_audited(settings: Settings) -> None:
    directory = Path(settings.place.tables) / "batches"
    older = DeltaTable(directory).to_pyarrow_table().drop_columns("left_out")
    write_deltalake(directory, older, mode="overwrite", schema_mode="overwrite")
    report = audit(settings)
    assert report.clean
    assert report.left_out == []


def test_batches_without_message_counts_are_audited(settings: Settings) -> None:
    """As written by earlier releases, which counted the offsets of each range."""
    directory = settings.place.table("batches")
    rows = DeltaTable(directory).to_pyarrow_table()
    at = rows.schema.get_field_index("offsets")
    schema = rows.schema.set(at, pa.field("offsets", pa.list_(OFFSET_RANGE)))
    older = pa.Table.from_pylist(rows.to_pylist(), schema)
    write_deltalake(directory, older, mode="overwrite", schema_mode="overwrite")
    assert audit(settings).clean
    delete(settings, "offset = 115")
    assert ranges(audit(settings), ProblemKind.GAP) == [(115, 115)]


# Counts of a batch


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(input_rows=11, predicted_rows=10),
        lambda row: row.update(predicted_rows=8, quarantined_rows=2),
        lambda row: row.update(input_rows=9),
        lambda row: row.update(quarantined_rows=0),
        lambda row: (row["offsets"][0].update(end=121), row.update(input_rows=11)),
        lambda row: row.update(predicted_rows=0, quarantined_rows=10),
    ],
    ids=[
        "more input",
        "one in the other table",
        "less input",
        "none quarantined",
        "only offsets and input",
        "all quarantined",
    ],
)
def test_inconsistent_count_is_found(settings: Settings, change: Callable[[dict[str, Any]], object]) -> None:
    alter(settings, change)
    report = audit(settings)
    assert batches(report, ProblemKind.ACCOUNT) == [1]
    assert ProblemKind.MODEL not in report.counts


def test_batch_with_inconsistent_offsets_is_found(settings: Settings) -> None:
    alter(settings, lambda row: row["offsets"][0].update(end=131, rows=11), batch_id=2)
    report = audit(settings)
    assert batches(report, ProblemKind.ACCOUNT) == [2]
    assert ranges(report, ProblemKind.GAP) == [(130, 130)]


def test_counts_that_agree_with_rows_but_not_with_each_other_are_found(settings: Settings) -> None:
    delete(settings, "offset = 115")
    alter(settings, lambda row: row.update(predicted_rows=8))
    report = audit(settings)
    assert report.counts == {ProblemKind.ACCOUNT: 1, ProblemKind.GAP: 1}
    assert "records 10 input, 8 predicted, 1 quarantined; its offsets have 10 messages, and there are 8 and 1" in (
        report.problems[0].text
    )


@pytest.mark.parametrize(("table", "offset"), [("predictions", 115), ("quarantine", 112)])
def test_missing_row_is_found(settings: Settings, table: str, offset: int) -> None:
    delete(settings, f"offset = {offset}", table)
    report = audit(settings)
    assert report.counts == {ProblemKind.ACCOUNT: 1, ProblemKind.GAP: 1}
    assert batches(report, ProblemKind.ACCOUNT) == [1]
    assert ranges(report, ProblemKind.GAP) == [(offset, offset)]


def test_batch_without_rows_has_a_gap_but_no_model_problem(settings: Settings) -> None:
    delete(settings, "batch_id = 1")
    delete(settings, "batch_id = 1", "quarantine")
    report = audit(settings)
    assert report.counts == {ProblemKind.ACCOUNT: 1, ProblemKind.GAP: 1}
    assert ranges(report, ProblemKind.GAP) == [(110, 119)]


def test_repeated_batch_is_found(settings: Settings) -> None:
    rows = DeltaTable(settings.place.table("batches")).to_pyarrow_table(filters=[("batch_id", "=", 1)])
    write_deltalake(settings.place.table("batches"), rows, mode="append")
    report = audit(settings)
    assert any(f"batch 1 of query {QUERY_ID} is 2 times in batches" == problem.text for problem in report.problems)
    assert set(batches(report, ProblemKind.ACCOUNT)) == {1}


# Holes


@pytest.fixture(scope="module")
def consistent_with_holes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches of ten offsets with two holes and one hole; the log start of the second is after its first offset."""
    settings = Settings(home=tmp_path_factory.mktemp("holes"))
    commit_batch(settings, 1, {0: (0, 10)}, holes={3, 4})
    commit_batch(settings, 2, {0: (10, 20)}, holes={18})
    alter(settings, lambda row: row["offsets"][0].update(log_start=11), batch_id=2)
    return settings.work_dir


@pytest.fixture
def with_holes(consistent_with_holes: Path, tmp_path: Path) -> Settings:
    """A copy of the consistent home with holes."""
    return Settings(home=shutil.copytree(consistent_with_holes, tmp_path / "home"))


def test_holes_are_proven_by_an_earlier_log_start(with_holes: Settings) -> None:
    report = audit(with_holes)
    assert report.clean
    assert report.spans == [Span(with_holes.topic, 0, 0, 19, 17, 2, holes=3, proven=2)]


def test_batch_of_holes_only_needs_no_row(with_holes: Settings) -> None:
    commit_batch(with_holes, 3, {0: (20, 23)}, holes={20, 21, 22})
    report = audit(with_holes)
    assert report.clean
    assert (report.spans[0].holes, report.spans[0].batches) == (6, 3)


def test_missing_row_next_to_holes_is_found(with_holes: Settings) -> None:
    delete(with_holes, "offset = 6")
    report = audit(with_holes)
    assert report.counts == {ProblemKind.ACCOUNT: 1, ProblemKind.GAP: 1}
    (gap,) = [problem for problem in report.problems if problem.kind is ProblemKind.GAP]
    assert "no row for 1 message of offsets 3 to 6" in gap.text


def test_missing_rows_on_both_sides_of_holes_are_found(with_holes: Settings) -> None:
    delete(with_holes, "offset in (1, 6)")
    (gap,) = [problem for problem in audit(with_holes).problems if problem.kind is ProblemKind.GAP]
    assert "no row for 2 messages of offsets 1 to 6" in gap.text


def test_row_in_a_hole_is_found(with_holes: Settings) -> None:
    predict(with_holes, 3, batch_id=1)
    assert audit(with_holes).counts == {ProblemKind.ACCOUNT: 1}


def test_repeated_row_does_not_hide_a_missing_one_next_to_holes(with_holes: Settings) -> None:
    delete(with_holes, "offset = 6")
    predict(with_holes, 7, batch_id=1)
    assert audit(with_holes).counts == {ProblemKind.REPEAT: 1, ProblemKind.GAP: 1}


# Batches without a row in `batches`


def test_only_the_newest_batch_may_be_missing_from_batches(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (130, 135)}, bad={131}, upto="quarantine")
    commit_batch(settings, 4, {0: (135, 140)}, bad={136}, upto="quarantine")
    report = audit(settings)
    assert [(one["batch_id"], one["predicted"], one["quarantined"]) for one in report.unfinished] == [(4, 4, 1)]
    assert report.counts == {ProblemKind.NO_BATCH: 1}
    assert (report.problems[0].where["batch_id"], report.problems[0].where["rows"]) == (3, 5)


def test_later_batch_without_rows_makes_a_missing_batch_an_error(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (130, 135)}, upto="quarantine")
    commit_batch(settings, 4, {0: (135, 140)})
    delete(settings, "batch_id = 4")
    report = audit(settings)
    assert report.unfinished == []
    assert batches(report, ProblemKind.NO_BATCH) == [3]


# Model of a batch


@pytest.mark.parametrize(
    ("offset", "columns"),
    [
        (125, {"model_version": 0}),
        (125, {"model_version": 2}),
        (125, {"bundle_sha256": "00" * 32}),
        (125, {"bundle_sha256": "ff" * 32}),
    ],
    ids=str,
)
def test_row_of_another_model_is_found(settings: Settings, offset: int, columns: dict[str, Any]) -> None:
    delete(settings, f"offset = {offset}")
    predict(settings, offset, batch_id=2, **columns)
    report = audit(settings)
    assert report.counts == {ProblemKind.MODEL: 1}
    assert batches(report, ProblemKind.MODEL) == [2]


@pytest.mark.parametrize("column", [{"model_version": 7}, {"bundle_sha256": "00" * 32}], ids=str)
def test_batch_of_another_model_than_its_rows_is_found(settings: Settings, column: dict[str, Any]) -> None:
    alter(settings, lambda row: row.update(column))
    assert audit(settings).counts == {ProblemKind.MODEL: 1}


def test_model_of_quarantined_messages_is_checked(settings: Settings) -> None:
    commit_batch(settings, 3, {0: (130, 132)}, bad={130, 131}, version=2)
    commit_batch(settings, 4, {0: (132, 134)}, bad={132}, version=2)
    for number in (3, 4):
        alter(settings, lambda row: row.update(model_version=3), batch_id=number)
    assert batches(audit(settings), ProblemKind.MODEL) == [3, 4]


# Rows outside the offsets of their batch


@pytest.mark.parametrize(("lost", "outside"), [(115, 109), (115, 120), (110, 120), (119, 109)])
def test_row_just_outside_the_offsets_of_its_batch_is_found(settings: Settings, lost: int, outside: int) -> None:
    delete(settings, f"offset = {lost}")
    predict(settings, outside, batch_id=1)
    report = audit(settings)
    (text,) = [problem.text for problem in report.problems if "outside its offsets" in problem.text]
    low, high = min([outside, *{110, 111} - {lost}]), max([outside, *{118, 119} - {lost}])
    assert f"from {low} to {high}, outside" in text
    assert ranges(report, ProblemKind.GAP) == [(lost, lost)]
    assert ranges(report, ProblemKind.REPEAT) == [(outside, outside)]


def test_row_far_outside_the_offsets_of_its_batch_adds_no_gap(settings: Settings) -> None:
    delete(settings, "offset = 125")
    predict(settings, 177, batch_id=2)
    report = audit(settings)
    assert ranges(report, ProblemKind.GAP) == [(125, 125)]
    assert report.counts == {ProblemKind.ACCOUNT: 1, ProblemKind.GAP: 1}


def test_row_of_a_partition_not_in_its_batch_is_found(settings: Settings) -> None:
    predict(settings, 3, batch_id=1, partition=5)
    report = audit(settings)
    assert any("partition 5 from 3 to 3, outside its offsets" in problem.text for problem in report.problems)
    assert ProblemKind.GAP not in report.counts


# Gaps and overlaps


@pytest.mark.parametrize(
    ("lost", "gaps"),
    [
        ({110}, [(110, 110)]),
        ({119}, [(119, 119)]),
        ({110, 111, 113, 118, 119}, [(110, 111), (113, 113), (118, 119)]),
    ],
)
def test_gaps_are_found_from_the_first_to_the_last_offset_of_a_batch(
    settings: Settings, lost: set[int], gaps: Ranges
) -> None:
    delete(settings, f"offset IN ({', '.join(map(str, lost))})")
    assert ranges(audit(settings), ProblemKind.GAP) == gaps


def test_nested_range_overlaps_and_the_next_one_adjoins(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for number, ends in enumerate([(0, 20), (5, 10), (20, 30), (29, 40)]):
        commit_batch(settings, number, {0: ends})
    report = audit(settings)
    assert ranges(report, ProblemKind.OVERLAP) == [(5, 9), (29, 29)]
    assert ranges(report, ProblemKind.REPEAT) == [(5, 9), (29, 29)]
    assert batches(report, ProblemKind.OVERLAP) == [1, 3]
    assert ProblemKind.GAP not in report.counts


def test_accepted_loss_does_not_hide_later_gaps(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    commit_batch(settings, 0, {0: (0, 10), 1: (0, 10)})
    commit_batch(settings, 1, {0: (11, 20), 1: (12, 20)}, left_out={0: (10, 11)})
    report = audit(settings)
    assert report.left_out == [{"topic": settings.topic, "partition": 0, "from": 10, "to": 10}]
    assert ranges(report, ProblemKind.GAP) == [(10, 11)]
    assert [problem.where["partition"] for problem in report.problems] == [1]


# Repeats


@pytest.mark.parametrize("window", [0, 1, 2, 7, 10, 29, 30, 1000])
def test_repeats_are_found_once_for_any_window_size(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", window)
    for offset, batch_id in ((100, 0), (107, 0), (110, 1), (129, 2)):
        predict(settings, offset, batch_id=batch_id)
    assert ranges(audit(settings), ProblemKind.REPEAT) == [(100, 100), (107, 107), (110, 110), (129, 129)]


def test_adjacent_repeats_of_equal_count_are_one_range(settings: Settings) -> None:
    predict(settings, 104, 105, 105, 106, 106, 108)
    report = audit(settings)
    assert ranges(report, ProblemKind.REPEAT) == [(104, 104), (105, 106), (108, 108)]
    assert [problem.where["rows"] for problem in report.problems if problem.kind is ProblemKind.REPEAT] == [2, 3, 2]


@pytest.mark.parametrize("repeated", [110, 119])
def test_repeated_row_at_either_end_of_a_batch_does_not_hide_a_gap(settings: Settings, repeated: int) -> None:
    delete(settings, "offset = 115")
    predict(settings, repeated, batch_id=1)
    report = audit(settings)
    assert report.counts == {ProblemKind.REPEAT: 1, ProblemKind.GAP: 1}
    assert ranges(report, ProblemKind.GAP) == [(115, 115)]


def test_gaps_of_a_batch_with_several_repeats_are_named_once(settings: Settings) -> None:
    delete(settings, "offset in (115, 118)")
    predict(settings, 110, 117, batch_id=1)
    report = audit(settings)
    assert ranges(report, ProblemKind.REPEAT) == [(110, 110), (117, 117)]
    assert ranges(report, ProblemKind.GAP) == [(115, 115), (118, 118)]


def test_repeated_row_next_to_holes_without_a_loss_is_no_gap(with_holes: Settings) -> None:
    predict(with_holes, 7, batch_id=1)
    assert audit(with_holes).counts == {ProblemKind.ACCOUNT: 1, ProblemKind.REPEAT: 1}


def test_message_quarantined_twice_is_a_repeat(settings: Settings) -> None:
    lineage = {"model_version": 1, "bundle_sha256": SHA256, "query_id": QUERY_ID, "batch_id": 0}
    row = pa.Table.from_pylist([quarantined(settings, 0, 103) | lineage], schema=QUARANTINE)
    write_deltalake(settings.place.table("quarantine"), row, mode="append")
    assert ranges(audit(settings), ProblemKind.REPEAT) == [(103, 103)]


def test_report_without_problems_is_clean_and_counts_nothing() -> None:
    report = AuditReport()
    assert report.clean is True
    assert (report.batches, report.predicted, report.quarantined, report.erased) == (0, 0, 0, 0)
    assert "searched" not in repr(report)
    assert Span("images", 0, 3, 9, 7, 2) == Span("images", 0, 3, 9, 7, 2, holes=0, proven=0)
    assert Compared("images", 0) == Compared("images", 0, first=None, last=None, held=0, rows=0, note="")
