"""The Delta tables: idempotent appends, partitions, and statistics for other readers."""

import json
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError

from streaming.errors import ConflictError, ServiceError
from streaming.jobs.rewrite import compact
from streaming.storage import table_log
from streaming.storage import tables as tables_module
from streaming.storage.files import DataFile
from streaming.storage.store_errors import StoreAwayError
from streaming.storage.tables import (
    BATCHES,
    LABELS,
    PREDICTIONS,
    Table,
    added,
    merged_statistics,
    spark_schema,
    statistics,
)
from tests.streaming.history import NOON, QUERY_ID, wait_for_checkpoint, worker_file

DAY = NOON.date()


def predictions(*rows: tuple[int, date | None]) -> pa.Table:
    """Rows with these (offset, date), otherwise equal."""
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
    return sorted(DeltaTable(table.place).to_pyarrow_table().column("offset").to_pylist())


def statistics_of(table: Table) -> list[dict[str, Any]]:
    """The statistics in the log of every added file."""
    log = sorted((Path(table.place) / "_delta_log").glob("*.json"))
    actions = [json.loads(line) for path in log for line in path.read_text().splitlines()]
    return [json.loads(action["add"]["stats"]) for action in actions if "add" in action]


def test_repeated_append_is_skipped(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    rows = predictions((1, DAY))
    assert table.append(rows, QUERY_ID, 3)
    assert not table.append(rows, QUERY_ID, 3)
    assert not table.append(rows, QUERY_ID, 2), "older than the last commit"
    assert offsets(table) == [1]
    assert len(list(Path(table.place).rglob("*.parquet"))) == 1, "no file is written for a skipped append"


def test_stale_handle_does_not_repeat_a_commit(tmp_path: Path) -> None:
    ours, theirs = Table(tmp_path, "predictions"), Table(tmp_path, "predictions")
    assert theirs.append(predictions((1, DAY)), QUERY_ID, 0)
    assert not ours.append_files(ours.write(predictions((1, DAY))), QUERY_ID, 0)
    assert ours.append(predictions((2, DAY)), "another", 0), "the commit of another application is irrelevant"
    assert offsets(theirs) == [1, 2]


def test_rows_of_two_dates_go_into_two_partitions_in_one_commit(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    later = DAY + timedelta(days=1)
    table.append(predictions((1, DAY), (2, later), (3, DAY)), QUERY_ID, 0)
    folders = {Path(file).parent.name for file in table.files()}
    assert folders == {f"date={DAY}", f"date={later}"}
    assert DeltaTable(table.place).version() == 1
    read = DeltaTable(table.place).to_pyarrow_table(filters=[("date", "=", later)])
    assert read.column("offset").to_pylist() == [2]
    assert read.column("date").to_pylist() == [later]


def test_rows_without_a_date_have_a_separate_partition(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    table.append(predictions((1, DAY), (2, None), (3, None)), QUERY_ID, 0)
    read = DeltaTable(table.place).to_pyarrow_table().sort_by("offset")
    assert read.column("date").to_pylist() == [DAY, None, None]
    assert offsets(table) == [1, 2, 3]


def test_statistics_contain_minimum_and_maximum(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    table.append(predictions((1, DAY), (9, DAY), (3, DAY)), QUERY_ID, 0)
    (found,) = statistics_of(table)
    assert found["numRecords"] == 3
    assert (found["minValues"]["offset"], found["maxValues"]["offset"]) == (1, 9)
    assert found["minValues"]["published_at"] == "2024-05-06T13:00:00.000000Z"
    assert (found["minValues"]["label"], found["maxValues"]["label"]) == ("cat", "cat")
    assert found["nullCount"]["label_true"] == 3
    assert "label_true" not in found["minValues"], "a column of nulls has no minimum"
    assert "image_id" not in found["minValues"], "the extremes of long hashes are useless"
    assert "date" not in found["nullCount"], "the partition contains it"


def test_readers_can_filter_by_statistics(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    for version in range(60):  # beyond a checkpoint, which stores the statistics as columns
        table.append(predictions((version, DAY)), QUERY_ID, version)
    wait_for_checkpoint()
    seen = DeltaTable(table.place)
    assert (Path(table.place) / "_delta_log" / "_last_checkpoint").exists()
    actions = pa.table(seen.get_add_actions(flatten=True))
    assert sorted(actions.column("max.offset").to_pylist()) == list(range(60))
    found = seen.to_pyarrow_table(filters=[("offset", ">=", 58)])
    assert sorted(found.column("offset").to_pylist()) == [58, 59]
    since = seen.to_pyarrow_table(filters=[("published_at", ">=", NOON + timedelta(hours=59))])
    assert since.column("offset").to_pylist() == [59]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_of_nonfinite_numbers_are_valid_json(tmp_path: Path, value: float) -> None:
    table = Table(tmp_path, "predictions")
    rows = predictions((1, DAY), (2, DAY))
    at = rows.schema.get_field_index("confidence")
    table.append(rows.set_column(at, rows.schema.field(at), pa.array([value, value], pa.float32())), QUERY_ID, 0)
    (found,) = statistics_of(table)
    assert "confidence" not in found["minValues"]
    assert offsets(table) == [1, 2]


def test_empty_append_makes_no_commit(tmp_path: Path) -> None:
    table = Table(tmp_path, "labels")
    assert not table.append(LABELS.empty_table(), "labels", 0)
    assert DeltaTable(table.place).version() == 0


# Commits


def labels(*image_ids: str) -> pa.Table:
    return pa.Table.from_pylist([{"image_id": one, "label": "cat", "labelled_at": NOON} for one in image_ids], LABELS)


def actions_of(table: Table, kind: str) -> list[dict[str, Any]]:
    """All actions of a kind in the log."""
    log = sorted((Path(table.place) / "_delta_log").glob("*.json"))
    actions = [json.loads(line) for path in log for line in path.read_text().splitlines()]
    return [action[kind] for action in actions if kind in action]


def test_commit_records_file_size_time_and_data_change(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    before = time.time()
    table.append(predictions((1, DAY)), QUERY_ID, 5)
    after = time.time()
    (add,), (once,) = actions_of(table, "add"), actions_of(table, "txn")
    assert add["dataChange"] is True
    assert int(1000 * before) <= add["modificationTime"] <= 1000 * after
    assert isinstance(add["modificationTime"], int)
    assert add["size"] == (Path(table.place) / add["path"]).stat().st_size == table.bytes()
    assert add["partitionValues"] == {"date": str(DAY)}
    assert (once["appId"], once["version"]) == (QUERY_ID, 5)


def test_table_without_partitions_writes_one_file(tmp_path: Path) -> None:
    table = Table(tmp_path, "labels")
    assert table.append(labels("a", "b"), "labels", 0)
    assert DeltaTable(table.place).to_pyarrow_table().column("image_id").to_pylist() == ["a", "b"]
    (file,) = table.files()
    assert Path(file).parent == Path(table.place)


def test_table_size_is_that_of_its_live_files(tmp_path: Path) -> None:
    ours, theirs = Table(tmp_path, "labels"), Table(tmp_path, "labels")
    assert ours.bytes() == 0
    theirs.append(labels("a"), "labels", 0)
    theirs.append(labels("b", "c"), "labels", 1)
    assert ours.bytes() == sum(Path(file).stat().st_size for file in theirs.files()) > 0
    assert ours.files() == theirs.files()
    assert len(ours.files()) == 2


def test_statistics_include_columns_after_nested_ones(tmp_path: Path) -> None:
    table = Table(tmp_path, "predictions")
    table.append(predictions((1, DAY), (9, DAY)), QUERY_ID, 0)
    (found,) = statistics_of(table)
    assert found["maxValues"]["batch_id"] == 7, "a column after the nested top_k"
    assert (found["minValues"]["confidence"], found["maxValues"]["confidence"]) == pytest.approx((0.01, 0.09))
    assert "top_k" not in found["nullCount"]


@pytest.mark.parametrize(("longest", "present"), [(40, True), (41, False)])
def test_minimum_and_maximum_are_both_present_or_both_absent(tmp_path: Path, longest: int, present: bool) -> None:
    table = Table(tmp_path, "labels")
    table.append(labels("a", "z" * longest), "labels", 0)
    (statistics,) = statistics_of(table)
    for extremes in ("minValues", "maxValues"):
        assert ("image_id" in statistics[extremes]) is present
        assert None not in statistics[extremes].values()


def test_file_without_statistics_is_committed_with_its_row_count() -> None:
    assert json.loads(added(DataFile("part.parquet", 100, 3)).stats) == {"numRecords": 3}


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ([1, 2], [5, None], (1, 5)),
        ([1, 2], [None, None], (1, 2)),
        (["a"], ["z" * 41], None),  # the extremes of the second part are unknown
        ([None], [None], None),
    ],
)
def test_merged_statistics_have_only_known_extremes(first: list[Any], second: list[Any], merged: Any) -> None:
    parts = [statistics(pa.table({"value": pa.array(values)}), ["value"]) for values in (first, second)]
    found = merged_statistics(parts)
    assert found["numRecords"] == len(first) + len(second)
    assert found["nullCount"] == {"value": (first + second).count(None)}
    extremes = [found[key].get("value") for key in ("minValues", "maxValues")]
    assert extremes == list(merged or (None, None))
    assert ("value" in found["minValues"]) is ("value" in found["maxValues"]) is (merged is not None)


# Files of workers


def test_worker_files_are_committed_once(tmp_path: Path) -> None:
    table = Table(tmp_path, "quarantine")
    files = worker_file(table.place, [{"image_id": "a", "offset": 1}, {"image_id": "b", "offset": 2}])
    assert table.append_files([], QUERY_ID, 0) is False
    assert table.append_files(files, QUERY_ID, 0) is True
    assert table.append_files(files, QUERY_ID, 0) is False
    assert offsets(table) == [1, 2]
    assert DeltaTable(table.place).version() == 1
    assert table.committed(QUERY_ID, 0)
    assert not table.committed(QUERY_ID, 1)
    assert not table.committed("another", 0)


def test_missing_file_is_not_committed(tmp_path: Path) -> None:
    table = Table(tmp_path, "quarantine")
    with pytest.raises(
        ServiceError, match=r"quarantine/part-x\.parquet was written for this commit but does not exist"
    ):
        table.append_files([DataFile("part-x.parquet", 100, 1)], QUERY_ID, 0)
    assert DeltaTable(table.place).version() == 0


# Concurrent commits


def test_append_is_retried_after_a_concurrent_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(table: Table, offset: int) -> list[DataFile]:
        return worker_file(table.place, [{"topic": "images", "offset": offset}])

    ours, theirs = Table(tmp_path, "quarantine"), Table(tmp_path, "quarantine")
    theirs.append_files(files(theirs, 1), QUERY_ID, 0)
    ours.files()  # up to date until the next line
    assert theirs.delete_beyond("images", {}) == 1
    assert ours.append_files(files(ours, 2), QUERY_ID, 1)
    assert offsets(ours) == [2]
    assert theirs.delete_beyond("images", {}) == 1
    monkeypatch.setattr(table_log, "COMMIT_TRIES", 1)
    with pytest.raises(CommitFailedError):
        ours.append_files(files(ours, 3), QUERY_ID, 2)
    assert offsets(ours) == []


def test_delete_beyond_affects_only_its_topic(tmp_path: Path) -> None:
    ours, theirs = Table(tmp_path, "quarantine"), Table(tmp_path, "quarantine")
    rows = [
        {"topic": topic, "partition": partition, "offset": offset}
        for topic in ("it's", "other")
        for partition in (0, 1, 2)
        for offset in range(4)
    ]
    theirs.append_files(worker_file(theirs.place, rows), QUERY_ID, 0)
    assert ours.delete_beyond("it's", {1: 4, 0: 2}) == 2 + 0 + 4
    left = DeltaTable(ours.place).to_pyarrow_table(columns=["topic", "partition", "offset"]).to_pylist()
    assert [row for row in left if row["topic"] == "other"] == rows[12:]
    assert sorted((row["partition"], row["offset"]) for row in left if row["topic"] == "it's") == [
        (0, 0),
        (0, 1),
        *((1, offset) for offset in range(4)),
    ]
    assert ours.delete_beyond("it's", {}) == 6
    assert ours.delete_beyond("it's", {}) == 0


class Losing(DeltaTable):
    """A handle whose deletions always lose against another writer."""

    def delete(self, *_: Any, **__: Any) -> Any:
        raise CommitFailedError("a concurrent transaction deleted the same data")


def test_deletion_that_always_conflicts_is_an_error_in_one_line(tmp_path: Path) -> None:
    table = Table(tmp_path, "quarantine")
    table._log._handle = Losing(table.place)
    with pytest.raises(ConflictError, match=r"quarantine is being rewritten repeatedly: stop `maintain` and `replay`"):
        table.delete_beyond("images", {})


def test_newest_transaction_of_a_local_table_is_always_up_to_date(tmp_path: Path) -> None:
    ours, theirs = Table(tmp_path, "labels"), Table(tmp_path, "labels")
    for number in (1, 2):
        assert theirs.append(labels(f"{number}"), QUERY_ID, number)
        assert (ours.transaction(QUERY_ID), ours.recent_transaction(QUERY_ID)) == (number, number)


def test_recent_transaction_of_a_table_in_a_bucket_needs_no_request(bucket_home: str) -> None:
    ours, theirs = Table(bucket_home, "labels"), Table(bucket_home, "labels")
    assert ours.append(labels("1"), QUERY_ID, 1)
    assert theirs.append(labels("2"), QUERY_ID, 2)
    assert (ours.recent_transaction(QUERY_ID), theirs.recent_transaction(QUERY_ID)) == (1, 2)
    assert (ours.transaction(QUERY_ID), ours.recent_transaction(QUERY_ID)) == (2, 2)


# Creation


def create_failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[Exception]:
    """Let the next creations of a table fail with these errors; the result has those that are left."""
    left, create = list(errors), DeltaTable.create

    def failing(*args: Any, **kwargs: Any) -> DeltaTable:
        if left:
            raise left.pop(0)
        return create(*args, **kwargs)

    monkeypatch.setattr(tables_module.DeltaTable, "create", failing)
    return left


@pytest.mark.parametrize("failures", [1, 2])
def test_creation_in_a_bucket_is_repeated(bucket_home: str, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    left = create_failing(monkeypatch, *[DeltaError("version 0 already exists")] * failures)
    assert Table(bucket_home, "labels").append(labels("a"), QUERY_ID, 1)
    assert left == []


def test_table_that_is_never_stored_is_reported(bucket_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_failing(monkeypatch, *[DeltaError("version 0 already exists")] * tables_module.CREATE_TRIES)
    with pytest.raises(StoreAwayError, match=r"labels did not store the first entry of the table's log in 3 attempts"):
        Table(bucket_home, "labels")


def test_table_that_cannot_be_created_locally_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = create_failing(monkeypatch, *[DeltaError("no space left on device")] * 2)
    with pytest.raises(DeltaError, match="no space left on device"):
        Table(tmp_path, "labels")
    assert len(left) == 1


def test_table_created_by_another_process_meanwhile_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = DeltaTable.create

    def create_twice(*args: Any, **kwargs: Any) -> DeltaTable:
        create(*args, **kwargs)
        raise DeltaError("version 0 already exists")

    monkeypatch.setattr(tables_module.DeltaTable, "create", create_twice)
    assert Table(tmp_path, "labels").append(labels("a"), QUERY_ID, 1)


# Tables of other versions and modified tables


def test_table_with_a_column_of_another_type_gets_no_column() -> None:
    list_of_structs = DeltaSchema.from_arrow(pa.schema([BATCHES.field("offsets")])).fields[0].type
    text = DeltaSchema.from_arrow(pa.schema([LABELS.field("label")])).fields[0].type
    assert not tables_module._lacks_fields(text, list_of_structs)
    assert not tables_module._lacks_fields(list_of_structs, text)


def test_table_below_a_symbolic_link_is_read(tmp_path: Path) -> None:
    assert Table(tmp_path / "real", "labels").append(labels("a"), "labels", 0)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (file,) = Table(tmp_path / "link", "labels").files()
    assert pq.read_table(file).column("image_id").to_pylist() == ["a"]


def test_older_table_gets_a_new_column_with_nulls(tmp_path: Path) -> None:
    older = pa.schema([field for field in LABELS if field.name != "by"])
    DeltaTable.create(tmp_path / "labels", older)
    table = Table(tmp_path, "labels")
    assert table.append(labels("a"), "labels", 0)
    assert DeltaTable(table.place).to_pyarrow_table().column("by").to_pylist() == [None]
    assert DeltaTable(table.place).schema().to_arrow().names == LABELS.names
    version = DeltaTable(table.place).version()
    Table(tmp_path, "labels")
    assert DeltaTable(table.place).version() == version, "no column is missing"


@pytest.mark.parametrize("path", ["../secret.parquet", "../labels-of-others/part.parquet", "a/../../secret.parquet"])
def test_log_with_a_file_outside_the_table_is_refused(tmp_path: Path, path: str) -> None:
    table = Table(tmp_path, "labels")
    table.append(labels("a"), "labels", 0)
    log = Path(table.place) / "_delta_log" / f"{1:020}.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "add" in line:
            line["add"]["path"] = path
    log.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ServiceError, match=r"the log of .*/labels names .*, which is outside the table"):
        Table(tmp_path, "labels").files()


@pytest.mark.parametrize(
    ("file", "inside"),
    [
        ("s3://bucket/home/tables/labels/part-1.parquet", True),
        ("s3://bucket/home/tables/labels/date=2024-05-06/part-1.parquet", True),
        ("s3://bucket/home/tables/labels2/part-1.parquet", False),
        ("s3://bucket/home/tables/labels/../predictions/part-1.parquet", False),
        ("s3://other/home/tables/labels/part-1.parquet", False),
        ("part-1.parquet", False),
    ],
)
def test_file_of_a_table_in_a_bucket_is_below_its_uri(file: str, inside: bool) -> None:
    assert tables_module._is_inside(file, "s3://bucket/home/tables/labels") == inside


def test_map_and_list_types_of_batches() -> None:
    seconds, offsets_ = BATCHES.field("seconds").type, BATCHES.field("offsets").type
    assert (seconds.key_type, seconds.item_type) == (pa.string(), pa.float64())
    assert BATCHES.field("drift").type == seconds
    range_ = ["topic", "partition", "start", "end"]
    assert [field.name for field in offsets_.value_type] == [*range_, "rows", "log_start"]
    assert [field.name for field in BATCHES.field("left_out").type.value_type] == range_


def test_older_table_gets_a_new_list_field(tmp_path: Path) -> None:
    older = BATCHES.set(BATCHES.names.index("offsets"), BATCHES.field("left_out").with_name("offsets"))
    row = {"query_id": QUERY_ID, "batch_id": 1, "offsets": [{"topic": "images", "partition": 0, "start": 0, "end": 9}]}
    write_deltalake(tmp_path / "batches", pa.Table.from_pylist([row], schema=older))
    assert Table(tmp_path, "batches").append(pa.Table.from_pylist([row | {"batch_id": 2}], schema=BATCHES), QUERY_ID, 2)
    version = DeltaTable(tmp_path / "batches").version()
    Table(tmp_path, "batches")  # no field is missing
    table = DeltaTable(tmp_path / "batches")
    assert table.version() == version
    assert compact(str(tmp_path / "batches"), 1024**2) is None
    (file,) = DeltaTable(tmp_path / "batches").file_uris()
    rows = pq.read_table(file).sort_by("batch_id").to_pylist()
    assert [(one["batch_id"], one["offsets"][0]["end"], one["offsets"][0]["rows"]) for one in rows] == [
        (1, 9, None),
        (2, 9, None),
    ]


def test_spark_schema_has_the_same_names() -> None:
    assert spark_schema(BATCHES).names == BATCHES.names
