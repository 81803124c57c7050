"""The Delta tables: appends that happen once, in partitions, with statistics that other readers can rest on."""

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from streaming.tables import LABELS, PREDICTIONS, Table
from tests.streaming.history import NOON, QUERY_ID

DAY = NOON.date()


def predictions(*rows: tuple[int, date | None]) -> pa.Table:
    """Rows of (offset, date), otherwise alike."""
    constant = {"image_id": "ab" * 32, "topic": "images", "partition": 0, "label": "cat", "batch_id": 7}
    answers = [{"confidence": offset / 100, "published_at": NOON + timedelta(hours=offset)} for offset, _ in rows]
    return pa.Table.from_pylist(
        [
            constant | answer | {"offset": offset, "date": day}
            for (offset, day), answer in zip(rows, answers, strict=True)
        ],
        schema=PREDICTIONS,
    )


def offsets(table: Table) -> list[int]:
    return sorted(DeltaTable(table.directory).to_pyarrow_table().column("offset").to_pylist())


def statistics_of(table: Table) -> list[dict[str, Any]]:
    """Of every file that a commit has added, as the log has them."""
    log = sorted((table.directory / "_delta_log").glob("*.json"))
    actions = [json.loads(line) for path in log for line in path.read_text().splitlines()]
    return [json.loads(action["add"]["stats"]) for action in actions if "add" in action]


def test_an_append_that_was_made_is_left_out(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    rows = predictions((1, DAY))
    assert table.append(rows, QUERY_ID, 3)
    assert not table.append(rows, QUERY_ID, 3)
    assert not table.append(rows, QUERY_ID, 2), "an older one was made before it"
    assert offsets(table) == [1]


def test_a_handle_that_has_not_seen_the_others_commit_does_not_repeat_it(tmp_path: Path) -> None:
    ours, theirs = Table(tmp_path, "predictions"), Table(tmp_path, "predictions")
    assert theirs.append(predictions((1, DAY)), QUERY_ID, 0)
    assert not ours._commit([ours._write(predictions((1, DAY)).drop_columns("date"), {"date": str(DAY)})], QUERY_ID, 0)
    assert ours.append(predictions((2, DAY)), "another", 0), "somebody else's commit is no obstacle"
    assert offsets(theirs) == [1, 2]


def test_rows_of_two_days_go_into_two_partitions_in_one_commit(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    later = DAY + timedelta(days=1)
    table.append(predictions((1, DAY), (2, later), (3, DAY)), QUERY_ID, 0)
    folders = {Path(file).parent.name for file in table.files()}
    assert folders == {f"date={DAY}", f"date={later}"}
    assert DeltaTable(table.directory).version() == 1
    read = DeltaTable(table.directory).to_pyarrow_table(filters=[("date", "=", later)])
    assert read.column("offset").to_pylist() == [2]
    assert read.column("date").to_pylist() == [later]


def test_rows_without_a_day_have_a_partition_of_their_own(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    table.append(predictions((1, DAY), (2, None), (3, None)), QUERY_ID, 0)
    read = DeltaTable(table.directory).to_pyarrow_table().sort_by("offset")
    assert read.column("date").to_pylist() == [DAY, None, None]
    assert offsets(table) == [1, 2, 3]


def test_statistics_tell_the_extremes(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    table.append(predictions((1, DAY), (9, DAY), (3, DAY)), QUERY_ID, 0)
    (told,) = statistics_of(table)
    assert told["numRecords"] == 3
    assert (told["minValues"]["offset"], told["maxValues"]["offset"]) == (1, 9)
    assert told["minValues"]["published_at"] == "2024-05-06T13:00:00.000000Z"
    assert (told["minValues"]["label"], told["maxValues"]["label"]) == ("cat", "cat")
    assert told["nullCount"]["label_true"] == 3
    assert "label_true" not in told["minValues"], "there is no least of nothing"
    assert "image_id" not in told["minValues"], "a hash is as long as it tells nothing"
    assert "date" not in told["nullCount"], "the folder tells it"


def test_readers_that_use_the_statistics_find_what_they_look_for(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    for version in range(60):  # beyond a checkpoint, in which the statistics become columns
        table.append(predictions((version, DAY)), QUERY_ID, version)
    seen = DeltaTable(table.directory)
    assert (table.directory / "_delta_log" / "_last_checkpoint").exists()
    actions = pa.table(seen.get_add_actions(flatten=True))
    assert sorted(actions.column("max.offset").to_pylist()) == list(range(60))
    found = seen.to_pyarrow_table(filters=[("offset", ">=", 58)])
    assert sorted(found.column("offset").to_pylist()) == [58, 59]
    since = seen.to_pyarrow_table(filters=[("published_at", ">=", NOON + timedelta(hours=59))])
    assert since.column("offset").to_pylist() == [59]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_stay_json_whatever_the_numbers(tmp_path: Path, value: float) -> None:
    table = Table(tmp_path, "predictions")
    rows = predictions((1, DAY), (2, DAY))
    at = rows.schema.get_field_index("confidence")
    table.append(rows.set_column(at, rows.schema.field(at), pa.array([value, value], pa.float32())), QUERY_ID, 0)
    (told,) = statistics_of(table)
    assert "confidence" not in told["minValues"]
    assert offsets(table) == [1, 2]


def test_an_append_of_nothing_is_no_commit(tmp_path: Path) -> None:
    table = Table(tmp_path, "labels")
    assert not table.append(LABELS.empty_table(), "labels", 0)
    assert DeltaTable(table.directory).version() == 0
