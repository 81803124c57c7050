"""Maintenance of real Delta tables: its results, and concurrent streams and readers."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from streaming.errors import ServiceError
from streaming.jobs.audit import audit
from streaming.jobs.maintain import MaintenanceReport, maintain
from streaming.pipeline.decisions import KEPT, Decisions
from streaming.query import query
from streaming.settings import Settings
from streaming.storage import table_log
from streaming.storage.store import open_store
from streaming.storage.tables import Table
from tests.conftest import imagestream
from tests.streaming.history import (
    QUERY_ID,
    begin_stream,
    commit_batch,
    decision_of,
    quarantined,
    wait_for_checkpoint,
    worker_file,
)

TABLES = ("predictions", "quarantine", "batches")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def commit_batches(settings: Settings, first: int, end: int) -> None:
    """Commit batches of ten messages each, one of them quarantined."""
    for number in range(first, end):
        commit_batch(settings, number, {0: (10 * number, 10 * number + 10)}, bad={10 * number + 3})


def by_name(report: MaintenanceReport) -> dict[str, tuple[int, int]]:
    return {table.name: (table.files_before, table.files_after) for table in report.tables}


def set_age(path: Path, hours: float) -> Path:
    os.utime(path, (time.time() - hours * 3600,) * 2)
    return path


def test_small_files_are_merged_without_changing_rows(settings: Settings) -> None:
    commit_batches(settings, 0, 12)
    before = query(settings, "SELECT * FROM predictions ORDER BY ALL"), query(settings, "FROM quarantine ORDER BY ALL")

    report = maintain(settings)

    assert by_name(report) == {"batches": (12, 1), "predictions": (12, 1), "quarantine": (12, 1)}
    after = query(settings, "SELECT * FROM predictions ORDER BY ALL"), query(settings, "FROM quarantine ORDER BY ALL")
    assert after == before
    assert audit(settings).clean


def test_retried_batch_is_recognised_after_compaction_and_vacuum(settings: Settings) -> None:
    commit_batches(settings, 0, 12)
    maintain(settings)
    for name in TABLES:
        log = Path(settings.place.tables) / name / "_delta_log"
        assert (log / "_last_checkpoint").exists()
        for commit in log.glob("*.json"):
            if int(commit.stem) < json.loads((log / "_last_checkpoint").read_text())["version"]:
                commit.unlink()  # as after expiry of the log: only the checkpoint remains
        assert DeltaTable(settings.place.table(name)).transaction_version(QUERY_ID) == 11

    commit_batches(settings, 11, 12)

    assert audit(settings).clean
    assert query(settings, "SELECT count(*) AS n FROM predictions").to_pylist() == [{"n": 12 * 9}]


def test_maintenance_with_nothing_to_do_commits_nothing(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    maintain(settings)
    versions = [DeltaTable(settings.place.table(name)).version() for name in TABLES]
    maintain(settings)
    assert [DeltaTable(settings.place.table(name)).version() for name in TABLES] == versions


STREAM = """
import sys
from pathlib import Path
from streaming.settings import Settings
from tests.streaming.history import commit_batch
settings = Settings(home=Path(sys.argv[1]))
for number in range(2, 55):
    commit_batch(settings, number, {0: (10 * number, 10 * number + 10)}, bad={10 * number + 3})
"""


def test_concurrent_stream_and_reader_lose_and_repeat_no_row(settings: Settings) -> None:
    commit_batches(settings, 0, 2)
    stream = subprocess.Popen([sys.executable, "-c", STREAM, str(settings.home)])
    opened = pq.ParquetFile(DeltaTable(settings.place.table("predictions")).file_uris()[0])
    runs = 0
    while stream.poll() is None:
        report = maintain(settings, retention_hours=0)
        assert [table.skipped for table in report.tables] == [None] * 3
        found = query(settings, 'SELECT count(*) AS n, count(DISTINCT "offset") AS offsets FROM predictions')
        (row,) = found.to_pylist()
        assert row["n"] == row["offsets"]
        assert row["n"] % 9 == 0  # only complete commits
        runs += 1
    assert stream.returncode == 0
    assert runs > 1
    last = maintain(settings)
    assert max(table.files_after for table in last.tables) <= 50
    assert opened.read().num_rows == 9  # a reader can still read its open file
    found = audit(settings)
    assert found.clean
    assert (found.batches, found.predicted, found.quarantined) == (55, 55 * 9, 55)


def test_log_is_kept_as_long_as_the_files(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_log, "CHECKPOINT_INTERVAL", 5)
    commit_batches(settings, 0, 6)  # beyond a checkpoint
    wait_for_checkpoint()
    log = Path(settings.place.tables) / "batches" / "_delta_log"
    last = json.loads((log / "_last_checkpoint").read_text())["version"]
    assert last >= 5  # a later one if it was committed before the checkpoint was written
    assert (log / f"{last:020}.checkpoint.parquet").exists()
    old = log / f"{0:020}.json"
    for entry in log.iterdir():
        set_age(entry, hours=25)
    maintain(settings, retention_hours=26)
    assert old.exists()
    maintain(settings, retention_hours=24)
    assert not old.exists()
    version = DeltaTable(settings.place.table("batches")).version()
    maintain(settings, retention_hours=24)
    assert DeltaTable(settings.place.table("batches")).version() == version, "a second run commits nothing"
    assert audit(settings).clean


def test_replaced_files_are_deleted_after_the_retention(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    old = DeltaTable(settings.place.table("predictions")).file_uris()
    maintain(settings, retention_hours=0)  # a day is the minimum
    assert [Path(uri).exists() for uri in old] == [True] * 3

    log = Path(settings.place.tables) / "predictions" / "_delta_log"
    for commit in log.glob("*.json"):  # as if the compaction were 25 hours ago
        lines = [json.loads(line) for line in commit.read_text().splitlines()]
        for line in lines:
            if "remove" in line:
                line["remove"]["deletionTimestamp"] -= 25 * 3600 * 1000
        commit.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {table.vacuumed for table in maintain(settings).tables} == {0}
    maintain(settings, retention_hours=24)
    assert [Path(uri).exists() for uri in old] == [False] * 3
    assert audit(settings).clean


def test_uncommitted_worker_files_are_deleted_only_when_old(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    directory = Path(settings.place.tables) / "quarantine"
    (young,) = worker_file(directory, [quarantined(settings, 0, 33)])
    (left_over,) = worker_file(directory, [quarantined(settings, 0, 34)])
    set_age(directory / young.path, hours=23)
    set_age(directory / left_over.path, hours=25)
    maintain(settings, retention_hours=0)
    assert (directory / young.path).exists()
    assert not (directory / left_over.path).exists()


def test_decided_batch_is_finished_before_anything_is_removed(settings: Settings) -> None:
    begin_stream(settings)
    decision = decision_of(settings, 1, {0: (0, 10)}, bad={3})
    decisions = Decisions(open_store(settings.home), settings.topic)
    assert decisions.decide(decision)
    for name, files in decision.files.items():
        for file in files:
            set_age(Path(settings.place.tables) / name / file.path, hours=200)
    maintain(settings, retention_hours=0)
    found = query(settings, "SELECT batch_id, predicted_rows, quarantined_rows FROM batches").to_pylist()
    assert found == [{"batch_id": 1, "predicted_rows": 9, "quarantined_rows": 1}]
    assert audit(settings).clean


def test_uncommitted_training_features_are_kept_for_a_day(settings: Settings) -> None:
    commit_batches(settings, 0, 1)
    Table(settings.place.tables, "features")
    directory = Path(settings.place.tables) / "features"
    young, old = directory / "part-young.parquet", directory / "part-old.parquet"
    for path, hours in ((young, 20), (old, 30)):
        path.write_bytes(b"features")
        set_age(path, hours)
    maintain(settings, retention_hours=0)
    assert (young.exists(), old.exists()) == (True, False)


def test_old_decisions_of_complete_batches_are_removed_except_the_newest(settings: Settings) -> None:
    begin_stream(settings)
    decisions, folder = (
        Decisions(open_store(settings.home), settings.topic),
        settings.work_dir / "streams/images/batches",
    )
    empty = decision_of(settings, 1, {0: (0, 1)})
    for number in range(1, KEPT + 4):
        assert decisions.decide(replace(empty, number=number))
        set_age(folder / f"{number:020}.json", hours=25)
    commit_batch(settings, KEPT + 2, {0: (0, 1)})
    (folder / f"{KEPT + 3:020}.json").unlink()
    assert maintain(settings).decisions_removed == 2
    assert min(int(path.stem) for path in folder.iterdir()) == 3


def test_command_summary(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    found = imagestream(settings, "maintain", "--retention", "200h")
    assert {table["name"]: table["files_after"] for table in found["tables"]} == dict.fromkeys(TABLES, 1)
    assert {table["retention_hours"] for table in found["tables"]} == {200}


def test_damaged_decision_stops_maintenance_before_anything_is_removed(settings: Settings) -> None:
    begin_stream(settings)
    commit_batches(settings, 0, 3)
    path = settings.work_dir / "streams" / "images" / "batches" / f"{3:020}.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ServiceError, match=r"the decision .*3\.json is damaged"):
        maintain(settings)
    assert len(DeltaTable(settings.place.table("predictions")).file_uris()) == 3


def test_home_without_tables_is_reported(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="no tables yet"):
        maintain(settings)
