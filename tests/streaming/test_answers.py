"""The Python helpers, and tables as of an earlier time."""

import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

import streaming
from streaming import predictions, quarantine, sql
from streaming.answers import parse_time
from streaming.errors import ServiceError
from streaming.query import query
from streaming.settings import Settings
from tests.conftest import command_here
from tests.streaming.history import NOON, commit_batch

MONDAY, TUESDAY, WEDNESDAY = (datetime(2024, 5, day, 12, tzinfo=UTC) for day in (6, 7, 8))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose stream committed a micro-batch of version 1 on Monday and one of version 2 on Wednesday."""
    settings = Settings(home=tmp_path_factory.mktemp("answers") / "home")
    seen: set[Path] = set()
    for batch, (day, version) in enumerate([(MONDAY, 1), (WEDNESDAY, 2)]):
        commit_batch(settings, batch, {0: (4 * batch, 4 * batch + 4)}, bad={4 * batch + 3}, version=version)
        # The timestamp of a Delta version is that of its file.
        commits = set(Path(settings.place.tables).glob("*/_delta_log/*.json"))
        for commit in commits - seen:
            os.utime(commit, (day.timestamp(), day.timestamp()))
        seen |= commits
    return settings.home


def test_predictions_have_all_columns_and_are_filtered(home: Path) -> None:
    found = predictions(home)
    assert found.num_rows == 6
    assert {"image_id", "label", "confidence", "top_k", "model_version", "date"} <= set(found.column_names)
    assert predictions(home, version=2).column("offset").to_pylist() == [4, 5, 6]
    assert predictions(home, label="dog").num_rows == 0
    assert predictions(home, label="cat", below=0.8, limit=2).num_rows == 2
    assert predictions(home, below=0.75).num_rows == 0
    assert predictions(home, since=NOON).num_rows == 6
    assert predictions(str(home), since=NOON + timedelta(seconds=1)).num_rows == 0
    assert predictions(home, since=date(2024, 5, 7)).num_rows == 0


def test_predictions_convert_to_pandas_and_polars(home: Path) -> None:
    assert predictions(home).to_pandas().groupby("model_version").size().to_dict() == {1: 3, 2: 3}
    import polars as pl

    assert pl.from_arrow(predictions(home, version=1)).height == 3


def test_quarantine_contains_the_bytes(home: Path) -> None:
    assert sorted(quarantine(home, reason="truncated").column("value").to_pylist()) == [b"bad 0-3", b"bad 0-7"]
    assert quarantine(home, reason="other").num_rows == 0
    assert quarantine(home, limit=1).num_rows == 1


def test_sql_accepts_parameters(home: Path) -> None:
    rows = sql("SELECT count(*) AS n FROM predictions WHERE model_version = $version", home, parameters={"version": 1})
    assert rows.to_pylist() == [{"n": 3}]


def test_default_home_is_that_of_the_command_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGESTREAM_HOME", str(home))
    assert predictions().num_rows == 6


def test_tables_are_read_as_of_a_time(home: Path) -> None:
    settings = Settings(home=home)
    versions = "SELECT DISTINCT model_version AS v FROM predictions ORDER BY v"
    for at, expected in ((MONDAY, [1]), (TUESDAY, [1]), (WEDNESDAY, [1, 2])):
        assert query(settings, versions, at=at).column("v").to_pylist() == expected
    assert predictions(home, at="2024-05-07").num_rows == 3
    assert predictions(home, at="2024-05-08T13:59+02:00").num_rows == 3
    assert predictions(home, at="2024-05-08T14:00+02:00").num_rows == 6
    assert quarantine(home, at=TUESDAY).num_rows == 1
    with pytest.raises(ServiceError, match=r"no table in .* existed at 2024-05-05 .*: give a later time"):
        predictions(home, at="2024-05-05")


def test_table_does_not_exist_before_its_creation(home: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for batch, day, upto in ((0, MONDAY, "predictions"), (1, WEDNESDAY, "batches")):
        commit_batch(settings, batch, {0: (4 * batch, 4 * batch + 4)}, upto=upto)
        if batch == 0:
            for commit in Path(settings.place.tables).glob("*/_delta_log/*.json"):
                os.utime(commit, (day.timestamp(), day.timestamp()))
    assert query(settings, "SHOW TABLES", at=TUESDAY).column("name").to_pylist() == ["predictions", "quarantine"]
    assert "batches" in query(settings, "SHOW TABLES").column("name").to_pylist()


def test_vacuumed_files_are_reported(home: Path, tmp_path: Path) -> None:
    from deltalake import DeltaTable

    settings = Settings(home=tmp_path)
    for batch in range(2):
        commit_batch(settings, batch, {0: (4 * batch, 4 * batch + 4)})
    then = datetime.now(UTC)
    table = DeltaTable(settings.place.table("predictions"))
    table.optimize.compact()
    assert predictions(settings.home, at=then).num_rows == 8
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(ServiceError, match="2 of its 2 files have been vacuumed since; .*maintain --retention"):
        predictions(settings.home, at=then)
    assert predictions(settings.home).num_rows == 8


def test_time_is_iso_8601_and_utc_by_default() -> None:
    assert parse_time("2024-05-06") == parse_time(date(2024, 5, 6)) == datetime(2024, 5, 6, tzinfo=UTC)
    assert parse_time("2024-05-06T14:00+02:00") == NOON == parse_time(NOON)
    assert parse_time(datetime(2024, 5, 6, 12)) == NOON  # noqa: DTZ001
    with pytest.raises(ServiceError, match="expected a time such as .*, got 'Monday'"):
        parse_time("Monday")


def test_commands_filter_by_time_and_model_version(home: Path) -> None:
    def output(*arguments: str, code: int = 0) -> str:
        found, out, err = command_here("--home", home, *arguments)
        assert found == code, err
        return out + err

    count = ("query", "SELECT count(*) AS n FROM predictions", "--format", "csv")
    assert output(*count, "--at", "2024-05-07") == "n\n3\n"
    assert output(*count) == "n\n6\n"
    listed = output("predictions", "--model", "2", "--since", "2024-05-06", "--format", "csv")
    assert len(listed.splitlines()) == 4
    assert output(*count, "--at", "last week", code=2).startswith("error: expected a time such as")


def test_package_imports_the_helpers_lazily() -> None:
    check = "import sys, streaming; print('duckdb' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="no attribute 'prediction'"):
        streaming.prediction  # noqa: B018
