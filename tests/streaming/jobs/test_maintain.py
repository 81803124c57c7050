"""Maintenance of real Delta tables: what it leaves, and that nobody beside it is hurt."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from streaming.errors import ServiceError
from streaming.jobs.audit import audit
from streaming.jobs.maintain import PINS_KEPT, MaintenanceReport, maintain
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.tables import Table
from tests.conftest import imagestream
from tests.streaming.history import QUERY_ID, commit_batch, quarantined, worker_file, write_pin

TABLES = ("predictions", "quarantine", "batches")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def commit_batches(settings: Settings, first: int, end: int) -> None:
    """Batches of ten messages each, one of them quarantined."""
    for number in range(first, end):
        commit_batch(settings, number, {0: (10 * number, 10 * number + 10)}, bad={10 * number + 3})


def by_name(report: MaintenanceReport) -> dict[str, tuple[int, int]]:
    return {table.name: (table.files_before, table.files_after) for table in report.tables}


def grow_older(path: Path, hours: float) -> Path:
    os.utime(path, (time.time() - hours * 3600,) * 2)
    return path


def test_many_small_files_become_one_and_no_row_changes(settings: Settings) -> None:
    commit_batches(settings, 0, 12)
    before = query(settings, "SELECT * FROM predictions ORDER BY ALL"), query(settings, "FROM quarantine ORDER BY ALL")

    report = maintain(settings)

    assert by_name(report) == {"batches": (12, 1), "predictions": (12, 1), "quarantine": (12, 1)}
    after = query(settings, "SELECT * FROM predictions ORDER BY ALL"), query(settings, "FROM quarantine ORDER BY ALL")
    assert after == before
    assert audit(settings).clean


def test_a_retried_batch_is_recognised_after_compaction_checkpoint_and_vacuum(settings: Settings) -> None:
    commit_batches(settings, 0, 12)
    maintain(settings)
    for name in TABLES:
        log = settings.tables_dir / name / "_delta_log"
        assert (log / "_last_checkpoint").exists()
        for commit in log.glob("*.json"):
            if int(commit.stem) < json.loads((log / "_last_checkpoint").read_text())["version"]:
                commit.unlink()  # as when the log has expired: the checkpoint alone remembers
        assert DeltaTable(settings.tables_dir / name).transaction_version(QUERY_ID) == 11

    commit_batches(settings, 11, 12)

    assert audit(settings).clean
    assert query(settings, "SELECT count(*) AS n FROM predictions").to_pylist() == [{"n": 12 * 9}]


def test_maintenance_with_nothing_to_do_commits_nothing(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    maintain(settings)
    versions = [DeltaTable(settings.tables_dir / name).version() for name in TABLES]
    maintain(settings)
    assert [DeltaTable(settings.tables_dir / name).version() for name in TABLES] == versions


STREAM = """
import sys
from pathlib import Path
from streaming.settings import Settings
from tests.streaming.history import commit_batch
settings = Settings(home=Path(sys.argv[1]))
for number in range(2, 80):
    commit_batch(settings, number, {0: (10 * number, 10 * number + 10)}, bad={10 * number + 3})
"""


def test_beside_a_stream_and_a_reader_no_row_is_lost_or_repeated(settings: Settings) -> None:
    commit_batches(settings, 0, 2)
    stream = subprocess.Popen([sys.executable, "-c", STREAM, str(settings.home)])
    opened = pq.ParquetFile(DeltaTable(settings.tables_dir / "predictions").file_uris()[0])
    runs = 0
    while stream.poll() is None:
        report = maintain(settings, retention_hours=0)
        assert [table.skipped for table in report.tables] == [None] * 3
        found = query(settings, 'SELECT count(*) AS n, count(DISTINCT "offset") AS offsets FROM predictions')
        (row,) = found.to_pylist()
        assert row["n"] == row["offsets"]
        assert row["n"] % 9 == 0  # whole commits only
        runs += 1
    assert stream.returncode == 0
    assert runs > 1
    last = maintain(settings)
    assert max(table.files_after for table in last.tables) <= 50
    assert opened.read().num_rows == 9  # a reader goes on with the files that it opened
    report_of_all = audit(settings)
    assert report_of_all.clean
    assert (report_of_all.batches, report_of_all.predicted, report_of_all.quarantined) == (80, 80 * 9, 80)


def test_the_log_is_kept_as_long_as_the_files_and_no_longer(settings: Settings) -> None:
    commit_batches(settings, 0, 60)  # beyond a checkpoint
    log = settings.tables_dir / "batches" / "_delta_log"
    old = log / f"{0:020}.json"
    two_hours_ago = time.time() - 2 * 3600
    for entry in log.iterdir():
        os.utime(entry, (two_hours_ago, two_hours_ago))
    maintain(settings, retention_hours=3)
    assert old.exists()
    maintain(settings, retention_hours=1)
    assert not old.exists()
    version = DeltaTable(settings.tables_dir / "batches").version()
    maintain(settings, retention_hours=1)
    assert DeltaTable(settings.tables_dir / "batches").version() == version, "nothing to say again"
    assert audit(settings).clean


def test_files_that_a_reader_may_hold_stay_for_the_retention_and_go_after_it(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    old = DeltaTable(settings.tables_dir / "predictions").file_uris()
    maintain(settings, retention_hours=0)  # an hour is the least
    assert [Path(uri).exists() for uri in old] == [True] * 3

    log = settings.tables_dir / "predictions" / "_delta_log"
    for commit in log.glob("*.json"):  # as if the compaction were two hours ago
        lines = [json.loads(line) for line in commit.read_text().splitlines()]
        for line in lines:
            if "remove" in line:
                line["remove"]["deletionTimestamp"] -= 2 * 3600 * 1000
        commit.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {table.vacuumed for table in maintain(settings).tables} == {0}
    maintain(settings, retention_hours=1)
    assert [Path(uri).exists() for uri in old] == [False] * 3
    assert audit(settings).clean


def test_a_workers_file_waits_for_its_commit_and_a_leftover_goes(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    directory = settings.tables_dir / "quarantine"
    (young,) = worker_file(directory, [quarantined(settings, 0, 33)])
    (left_over,) = worker_file(directory, [quarantined(settings, 0, 34)])
    grow_older(directory / left_over.path, hours=2)
    maintain(settings, retention_hours=0)
    assert (directory / young.path).exists()
    assert not (directory / left_over.path).exists()


def test_no_file_of_an_unfinished_batch_is_removed_however_long_it_takes(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    directory = settings.tables_dir / "quarantine"
    (file,) = worker_file(directory, [quarantined(settings, 0, 33)])
    grow_older(directory / file.path, hours=200)
    write_pin(settings, 3, datetime.now(UTC) - timedelta(hours=201))
    report = maintain(settings)
    assert (directory / file.path).exists()
    assert {table.retention_hours for table in report.tables} == {203}

    commit_batches(settings, 3, 4)
    report = maintain(settings)
    assert not (directory / file.path).exists()
    assert {table.retention_hours for table in report.tables} == {168}


def test_features_of_a_training_run_wait_a_day_for_their_commit(settings: Settings) -> None:
    commit_batches(settings, 0, 1)
    Table(settings.tables_dir, "features")
    directory = settings.tables_dir / "features"
    young, old = directory / "part-young.parquet", directory / "part-old.parquet"
    for path, hours in ((young, 20), (old, 30)):
        path.write_bytes(b"features")
        grow_older(path, hours)
    maintain(settings, retention_hours=0)
    assert (young.exists(), old.exists()) == (True, False)


def test_pins_of_whole_batches_go_but_for_the_newest(settings: Settings) -> None:
    now = datetime.now(UTC)
    pins = [write_pin(settings, number, now) for number in range(PINS_KEPT + 20)]
    commit_batches(settings, 0, 1)
    commit_batches(settings, 2, 30)
    assert maintain(settings).pins_removed == 19
    assert [number for number, path in enumerate(pins) if not path.exists()] == [0, *range(2, 20)]


def test_pin_of_a_checkpoint_that_was_lost_holds_nothing_back(settings: Settings) -> None:
    write_pin(settings, 3, datetime.now(UTC) - timedelta(hours=400), query_id="another")
    commit_batches(settings, 0, 3)
    spark = settings.checkpoints_dir / settings.topic / "spark"
    spark.mkdir(parents=True)
    (spark / "metadata").write_text(json.dumps({"id": QUERY_ID}))
    assert {table.retention_hours for table in maintain(settings).tables} == {168}


def test_command_says_what_it_did(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    found = imagestream(settings, "maintain", "--retention-hours", 200)
    assert {table["name"]: table["files_after"] for table in found["tables"]} == dict.fromkeys(TABLES, 1)
    assert {table["retention_hours"] for table in found["tables"]} == {200}


def test_damaged_pin_stops_maintenance_before_anything_is_removed(settings: Settings) -> None:
    commit_batches(settings, 0, 3)
    write_pin(settings, 3, datetime.now(UTC)).write_text("{")
    with pytest.raises(ServiceError, match=r"the pin .*3\.json is damaged"):
        maintain(settings)
    assert len(DeltaTable(settings.tables_dir / "predictions").file_uris()) == 3


def test_home_without_tables_is_said(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="no tables yet"):
        maintain(settings)
