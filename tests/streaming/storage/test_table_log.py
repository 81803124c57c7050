"""Log entries written without deltalake: all readers see them, and concurrent commits are detected."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction
from pyspark.sql import SparkSession

from streaming.errors import DataError, ServiceError
from streaming.query import query
from streaming.settings import Settings
from streaming.storage import table_log
from streaming.storage.local_store import LocalStore
from streaming.storage.store_errors import StoreAwayError
from streaming.storage.table_features import TableFeatureError
from streaming.storage.table_log import (
    REWRITE,
    TableLog,
    boot_seconds,
    open_log,
    storage_options,
    store_errors_in_one_line,
)
from streaming.storage.tables import LABELS, PREDICTIONS, Table
from tests.conftest import environment
from tests.streaming.history import NOON, enable_deletion_vectors, wait_for_checkpoint
from tests.streaming.racers import run_at_once

APP = "stream"


def labels(*image_ids: str) -> pa.Table:
    return pa.Table.from_pylist([{"image_id": one, "label": "cat", "labelled_at": NOON} for one in image_ids], LABELS)


def images(directory: Path | str) -> list[str]:
    return sorted(DeltaTable(directory).to_pyarrow_table().column("image_id").to_pylist())


def entries(directory: Path | str) -> list[list[dict[str, Any]]]:
    """The actions of each entry of the log."""
    log = sorted((Path(directory) / "_delta_log").glob("*.json"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in log]


def writers(directory: Path | str) -> list[str]:
    """The writer of each entry except the first."""
    infos = [action["commitInfo"] for entry in entries(directory)[1:] for action in entry if "commitInfo" in action]
    return [info["engineInfo"].split(":")[0] for info in infos]


def add(directory: Path | str, path: str, *image_ids: str) -> AddAction:
    """A new file that is not yet part of the table."""
    file = Path(directory) / path
    file.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(labels(*image_ids), file)
    return AddAction(path, file.stat().st_size, {}, 1, True, json.dumps({"numRecords": len(image_ids)}))


def remove(path: str) -> RemoveAction:
    return RemoveAction(path, data_change=True, deletion_timestamp=1, size=1, partition_values={})


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "tables", "labels")


@pytest.fixture
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint for every ten versions, so that few commits reach one."""
    monkeypatch.setattr(table_log, "CHECKPOINT_INTERVAL", 10)


def test_readers_see_the_rows_of_every_entry(table: Table, tmp_path: Path) -> None:
    for number in range(120):
        assert table.append(labels(f"{number:03}"), APP, number)
    expected = [f"{number:03}" for number in range(120)]
    assert set(writers(table.place)) == {"imagestream"}
    assert images(table.place) == expected
    rows = query(Settings(home=tmp_path), "SELECT image_id FROM labels ORDER BY ALL")
    assert rows.column("image_id").to_pylist() == expected
    seen = DeltaTable(table.place)
    assert (seen.version(), seen.transaction_version(APP)) == (120, 119)
    wait_for_checkpoint()
    assert json.loads((Path(table.place) / "_delta_log" / "_last_checkpoint").read_text())["version"] >= 100
    assert seen.history(1)[0]["operation"] == "WRITE"


def test_spark_sees_the_rows_of_every_entry(spark: SparkSession, tmp_path: Path) -> None:
    predictions = Table(tmp_path, "predictions")
    rows = [{"image_id": f"{number:02}", "offset": number, "date": NOON.date()} for number in range(60)]
    for number, row in enumerate(rows):
        assert predictions.append(pa.Table.from_pylist([row], PREDICTIONS), APP, number)
    odd = add(predictions.place, "date=2024-05-06/a b%é#1.parquet", "odd")
    assert open_log(predictions.place).commit([odd], APP, 60)
    frame = spark.read.format("delta").load(predictions.place)
    assert sorted(row.image_id for row in frame.collect()) == [*(row["image_id"] for row in rows), "odd"]
    found = frame.where("offset >= 58 AND date = DATE '2024-05-06'").collect()  # by statistics and partition
    assert sorted(row.image_id for row in found) == ["58", "59"]


WRITER = """
import sys
from pathlib import Path
import pyarrow as pa
from streaming.storage.tables import LABELS, Table
name, table = sys.argv[2], Table(Path(sys.argv[1]), "labels")
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    for app in (name, "both"):
        rows = pa.Table.from_pylist([{"image_id": f"{app} {number:02}", "by": name}], LABELS)
        table.append(rows, app, number)
"""


def test_concurrent_processes_lose_and_duplicate_nothing(tmp_path: Path) -> None:
    directory = Table(tmp_path, "labels").place
    run_at_once(WRITER, [(tmp_path, name) for name in ("a", "b")])
    expected = {f"{app} {number:02}" for app in ("a", "b", "both") for number in range(60)}
    assert Counter(images(directory)) == Counter(expected)
    assert set(DeltaTable(directory).to_pyarrow_table().column("by").to_pylist()) == {"a", "b"}


def test_intervening_deltalake_commit_is_detected(table: Table) -> None:
    table.append(labels("ours"), APP, 0)
    write_deltalake(table.place, labels("theirs"), mode="append")
    assert table.append(labels("ours too"), APP, 1)
    assert images(table.place) == ["ours", "ours too", "theirs"]
    assert writers(table.place) == ["imagestream", "delta-rs", "imagestream"]


def test_transaction_committed_by_another_handle_is_skipped(table: Table) -> None:
    other = Table(table.tables, "labels")
    for one in (table, other):
        one.append(labels(f"first of {id(one)}"), f"{id(one)}", 0)  # both handles know a version
    before = images(table.place)
    assert other.append(labels("once"), APP, 7)
    assert not table.append(labels("twice"), APP, 7)
    assert not table.append(labels("older"), APP, 6)
    assert images(table.place) == sorted([*before, "once"])


def test_transactions_of_an_older_version_are_known_until_it_is_refreshed(table: Table) -> None:
    assert table.append(labels("one"), APP, 3)
    ours, theirs = (TableLog(DeltaTable(table.place), table.place, boot_seconds()) for _ in range(2))
    assert (ours.transaction(APP), ours.transaction("another"), ours.next_rewrite()) == (3, None, 1)
    assert theirs.commit([add(table.place, "two.parquet", "two")], APP, 4)
    assert (ours.known_transaction(APP), ours.has(APP, 3), ours.has(APP, 4)) == (3, True, False)
    assert (ours.transaction(APP), ours.known_transaction(APP), ours.has(APP, 4)) == (4, 4, True)
    assert theirs.commit([add(table.place, "three.parquet", "three")], REWRITE, 7)
    ours.refresh()
    assert ours.next_rewrite() == 8


def test_partition_columns_are_not_in_the_files(tmp_path: Path) -> None:
    predictions = Table(tmp_path, "predictions")
    assert predictions.append(pa.Table.from_pylist([{"image_id": "a", "date": NOON.date()}], PREDICTIONS), APP, 1)
    expected = [name for name in PREDICTIONS.names if name != "date"]
    assert open_log(predictions.place).data_schema().names == expected


@pytest.mark.parametrize(
    ("value", "text"), [(None, None), ("a b", "a b"), (7, "7"), (NOON.date(), "2024-05-06"), (0, "0")]
)
def test_partition_values_are_text_in_the_log(value: object, text: str | None) -> None:
    assert table_log._partition_value(value) == text


@pytest.mark.parametrize("value", [True, NOON, 0.5, b"a"])
def test_partition_by_another_type_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="expected a partition by text, date or integer, got "):
        table_log._partition_value(value)


@pytest.mark.parametrize("properties", [{"delta.enableChangeDataFeed": "true"}, {"delta.appendOnly": "true"}])
@pytest.mark.parametrize("known", [True, False])
def test_upgraded_table_is_committed_to_by_deltalake(table: Table, properties: dict[str, str], known: bool) -> None:
    ours = table if known else Table(table.tables, "labels")
    ours.append(labels("before"), APP, 0)
    DeltaTable(table.place).alter.set_table_properties(properties)
    writer = ours if known else Table(table.tables, "labels")
    for number in (1, 2):
        assert writer.append(labels(f"after {number}"), APP, number)
        assert not writer.append(labels("again"), APP, number)
    assert writers(table.place) == ["imagestream", "delta-rs", "delta-rs", "delta-rs"]
    assert images(table.place) == ["after 1", "after 2", "before"]


def test_transaction_committed_meanwhile_is_not_repeated_in_an_upgraded_table(table: Table) -> None:
    DeltaTable(table.place).alter.set_table_properties({"delta.appendOnly": "true"})
    ours, theirs = (open_log(table.place) for _ in range(2))
    assert ours.known_transaction(APP) is None
    assert theirs.commit([add(table.place, "theirs.parquet", "theirs")], APP, 1)
    assert not ours.commit([add(table.place, "ours.parquet", "ours")], APP, 1)
    assert images(table.place) == ["theirs"]


def test_checkpoints_of_an_upgraded_table_follow_its_interval(table: Table) -> None:
    properties = {"delta.appendOnly": "true", "delta.checkpointInterval": "2"}
    DeltaTable(table.place).alter.set_table_properties(properties)
    for number in range(3):
        assert table.append(labels(f"{number}"), APP, number)
    last = json.loads((Path(table.place) / "_delta_log" / "_last_checkpoint").read_text())["version"]
    assert last == 3, "deltalake counts from version 0, which is the first of two"


def test_removed_file_cannot_be_replaced(table: Table) -> None:
    log = open_log(table.place)
    assert log.commit([add(table.place, "one.parquet", "one"), add(table.place, "two.parquet", "two")], APP, 0)
    DeltaTable(table.place).delete("image_id = 'one'")  # without our transaction identifiers
    assert not log.commit([add(table.place, "copy.parquet", "one")], "rewrite", 1, [remove("one.parquet")])
    assert log.commit([add(table.place, "2.parquet", "two")], "rewrite", 1, [remove("two.parquet")])
    assert images(table.place) == ["two"]
    assert [file.path for file in open_log(table.place).files()] == ["2.parquet"]


def test_file_is_not_replaced_once_deletion_vectors_are_enabled(table: Table) -> None:
    log = open_log(table.place)
    assert log.commit([add(table.place, "one.parquet", "one")], APP, 0)
    enable_deletion_vectors(table.place)
    with pytest.raises(TableFeatureError, match="deletionVectors, with which files cannot be rewritten"):
        log.commit([add(table.place, "copy.parquet", "one")], REWRITE, 1, [remove("one.parquet")])
    assert [file.path for file in log.files()] == ["one.parquet"]


def test_path_with_any_characters_is_added_and_removed(table: Table) -> None:
    path = "a b/ü%20#?&=[1].parquet"
    log = open_log(table.place)
    assert log.commit([add(table.place, path, "one")], APP, 0)
    assert [file.path for file in open_log(table.place).files()] == [path]
    assert images(table.place) == ["one"]
    assert log.commit([], "rewrite", 1, [remove(path)])
    assert images(table.place) == []


def test_entry_describes_its_commit(table: Table) -> None:
    log, before = open_log(table.place), int(1000 * time.time())
    assert log.commit([add(table.place, "one.parquet", "one")], APP, 3)
    old = RemoveAction("one.parquet", data_change=False, deletion_timestamp=7, size=8, partition_values={"day": "1"})
    assert log.commit([add(table.place, "copy.parquet", "one")], REWRITE, 1, [old])
    after = 1000 * time.time()
    appended, replaced = ({name: one[name] for one in entry for name in one} for entry in entries(table.place)[1:])
    for entry in (appended, replaced):
        assert before <= entry["txn"]["lastUpdated"] == entry["commitInfo"]["timestamp"] <= after
    expected = {"operation": "WRITE", "operationParameters": {"mode": "Append"}, "isBlindAppend": True}
    assert expected.items() <= appended["commitInfo"].items()
    expected = {"operation": "OPTIMIZE", "operationParameters": {}, "isBlindAppend": False}
    assert expected.items() <= replaced["commitInfo"].items()
    assert replaced["txn"].items() >= {"appId": REWRITE, "version": 1}.items()
    assert replaced["remove"] == {
        "path": "one.parquet",
        "deletionTimestamp": 7,
        "dataChange": False,
        "extendedFileMetadata": True,  # partition values and size are given
        "partitionValues": {"day": "1"},
        "size": 8,
    }


class Full(LocalStore):
    """A store in which another writer is always first."""

    def _put_if_absent(self, _key: str, _data: bytes) -> bool:
        return False

    def get(self, _key: str) -> bytes:
        return b"of another writer"


def test_pauses_between_conflicts_grow_to_a_maximum(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[tuple[float, float]] = []
    monkeypatch.setattr(table_log.random, "uniform", lambda *limits: pauses.append(limits) or 0.0)
    log = open_log(table.place)
    log._store = Full(Path(table.place))
    with pytest.raises(CommitFailedError, match=r"^another writer committed to .*labels first, 50 times in a row$"):
        log.commit([add(table.place, "one.parquet", "one")], APP, 1)
    growing = [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32]  # after the second attempt, with jitter from 0
    assert pauses == [(0, longest) for longest in growing + [0.5] * (48 - len(growing))]


def test_attempts_are_separated_by_the_pause(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(table_log.time, "sleep", slept.append)
    monkeypatch.setattr(table_log, "COMMIT_TRIES", 4)
    log = open_log(table.place)
    log._store = Full(Path(table.place))
    with pytest.raises(CommitFailedError):
        log.commit([add(table.place, "one.parquet", "one")], APP, 1)
    assert len(slept) == 2
    assert all(0 <= pause <= longest for pause, longest in zip(slept, (0.005, 0.01), strict=True))


class Handle(DeltaTable):
    """A handle that counts how often it reads the log."""

    reads = 0

    def update_incremental(self) -> None:
        self.reads += 1
        super().update_incremental()


def test_log_is_read_only_if_there_is_a_new_version(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert table.append(labels("one"), APP, 1)
    handle = Handle(table.place)
    log = TableLog(handle, table.place, table_log.boot_seconds())
    assert log.refresh() is handle
    assert (log.transaction(APP), handle.reads) == (1, 0)
    assert table.append(labels("two"), APP, 2)
    assert (log.known_transaction(APP), handle.reads) == (1, 0)
    assert (log.transaction(APP), handle.reads) == (2, 1)
    assert log.refresh() is handle
    assert (handle.version(), handle.reads) == (2, 1)
    clock.now += table_log.KNOWN_FOR_S - 1
    assert (log.transaction(APP), handle.reads) == (2, 1)  # the state is recent again
    assert table.append(labels("three"), APP, 3)
    clock.now += table_log.KNOWN_FOR_S + 1
    assert (log.known_transaction(APP), handle.reads) == (3, 2)


@pytest.mark.usefixtures("frequent_checkpoints")
def test_checkpoint_is_written_for_every_multiple_of_the_interval(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(table_log, "_write_checkpoint", written.append)
    counts = []
    for number in range(2 * table_log.CHECKPOINT_INTERVAL):
        assert table.append(labels(f"{number}"), APP, number)
        wait_for_checkpoint()
        counts.append(len(written))
    assert counts == [0] * 9 + [1] * 10 + [2]  # the first append makes version 1
    assert set(written) == {table.place}


def test_options_of_a_bucket_allow_http_only_for_such_an_endpoint() -> None:
    with environment(AWS_ENDPOINT_URL="http://127.0.0.1:8333"):
        assert storage_options("s3://bucket/http://home") == table_log.BUCKET_OPTIONS | {"allow_http": "true"}
    with environment(AWS_ENDPOINT_URL="https://127.0.0.1:8333"):
        assert storage_options("s3://bucket/home") == table_log.BUCKET_OPTIONS
    assert storage_options("/home") is None


@pytest.mark.parametrize(
    ("place", "text", "kind"),
    [
        ("s3://bucket/home", "Generic S3 error: timed out", StoreAwayError),
        ("s3://bucket/home", "no such column", OSError),
        ("/home", "Generic S3 error: timed out", OSError),
    ],
)
def test_only_errors_of_a_bucket_are_converted(place: str, text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind), store_errors_in_one_line(place):
        raise OSError(text)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.start = self.now = table_log.boot_seconds()
        monkeypatch.setattr(table_log, "boot_seconds", lambda: self.now)


def commit_and_clean(directory: Path) -> None:
    """Commit beyond a checkpoint with another writer, and remove the log before it, as after its expiry."""
    other = Table(directory.parent, "labels")
    for number in range(table_log.CHECKPOINT_INTERVAL):
        other.append(labels(f"other {number:02}"), "other", number)
    wait_for_checkpoint()
    log = directory / "_delta_log"
    checkpoint = json.loads((log / "_last_checkpoint").read_text())["version"]
    for entry in log.glob("*.json"):
        if int(entry.stem) <= checkpoint:
            entry.unlink()


@pytest.mark.usefixtures("frequent_checkpoints")
def test_writer_reloads_a_log_cleaned_while_it_was_suspended(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    table.append(labels("before"), APP, 0)
    commit_and_clean(Path(table.place))
    clock.now += table_log.KNOWN_FOR_S + 1
    assert table.append(labels("after"), APP, 1)
    assert {"before", "after"} <= set(images(table.place))
    assert len(images(table.place)) == table_log.CHECKPOINT_INTERVAL + 2


@pytest.mark.usefixtures("frequent_checkpoints")
def test_writer_suspended_during_a_commit_retries(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    table.append(labels("before"), APP, 0)

    class Suspending(LocalStore):
        def _put_if_absent(self, key: str, data: bytes) -> bool:
            if clock.now == clock.start:
                clock.now += 86_400
                commit_and_clean(Path(table.place))
            return super()._put_if_absent(key, data)

    table._log._store = Suspending(Path(table.place))
    assert table.append(labels("after"), APP, 1)
    assert not table.append(labels("again"), APP, 1)
    found = images(table.place)
    assert (len(found), found.count("after")) == (table_log.CHECKPOINT_INTERVAL + 2, 1)


def test_commit_before_a_suspension_is_recognized(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    table.append(labels("before"), APP, 0)

    class Suspended(LocalStore):
        def _put_if_absent(self, key: str, data: bytes) -> bool:
            created = super()._put_if_absent(key, data)
            clock.now += 86_400
            return created

    table._log._store = Suspended(Path(table.place))
    assert table.append(labels("after"), APP, 1)
    assert images(table.place) == ["after", "before"]


@pytest.mark.parametrize("stored", [True, False])
def test_commit_with_a_lost_response_is_made_once(table: Table, stored: bool) -> None:
    class Lossy(LocalStore):
        lost = False

        def _put_if_absent(self, key: str, data: bytes) -> bool:
            if not self.lost:
                self.lost = True
                if stored:
                    super()._put_if_absent(key, data)
                raise StoreAwayError("connection closed")
            return super()._put_if_absent(key, data)

    table._log._store = Lossy(Path(table.place))
    assert table.append(labels("one"), APP, 0)
    assert table.append(labels("two"), APP, 1)
    assert images(table.place) == ["one", "two"]
    assert DeltaTable(table.place).version() == 2


@pytest.mark.usefixtures("frequent_checkpoints")
def test_failing_checkpoint_affects_no_commit(table: Table) -> None:
    (Path(table.place) / "_delta_log" / "_last_checkpoint").mkdir()
    for number in range(table_log.CHECKPOINT_INTERVAL + 1):
        assert table.append(labels(f"{number:02}"), APP, number)
    wait_for_checkpoint()
    assert not table.append(labels("again"), APP, number)
    assert len(images(table.place)) == table_log.CHECKPOINT_INTERVAL + 1


def hostile(directory: Path, change: Callable[[dict[str, Any]], None]) -> TableLog:
    """The log of a table whose first commit was modified."""
    Table(directory.parent, "labels").append(labels("one"), APP, 0)
    path = directory / "_delta_log" / f"{1:020}.json"
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for action in actions:
        if "add" in action:
            change(action["add"])
    path.write_text("\n".join(map(json.dumps, actions)))
    return open_log(str(directory))


@pytest.mark.parametrize("path", ["../secret.parquet", "%2e%2e/secret.parquet", "/etc/passwd", "a/../../x", "a//b"])
def test_log_with_a_file_outside_the_table_is_refused(table: Table, path: str) -> None:
    log = hostile(Path(table.place), lambda added: added.update(path=path))
    with pytest.raises(ServiceError, match=r"^the log of .*/labels names .*, which is outside the table: restore"):
        log.files()
