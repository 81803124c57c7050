"""SQL over real Delta tables: results, output formats, and what queries cannot access or change."""

import csv
import io
import json
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from streaming.errors import ServiceError
from streaming.query import open_query, query
from streaming.settings import Settings
from streaming.storage.tables import PREDICTIONS, QUARANTINE
from tests.conftest import command_here

NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)
LABELS = ["cat", "dog", "cat", "bird", "cat", "dog"]


def predicted(first: int, labels: list[str], at: datetime) -> pa.Table:
    rows = [
        {
            "image_id": f"id-{first + number}",
            "topic": "images",
            "partition": 0,
            "offset": first + number,
            "source": f"photos/{first + number}.jpg",
            "label": label,
            "confidence": 0.5 + (first + number) / 20,
            "top_k": [{"label": label, "probability": 0.75}, {"label": "other", "probability": 0.25}],
            "scored_at": at + timedelta(seconds=number),
            "model_version": 1,
            "date": at.date(),
        }
        for number, label in enumerate(labels)
    ]
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home whose name needs quoting, with predictions of two days, one quarantined message and an empty table."""
    settings = Settings(home=tmp_path_factory.mktemp("home") / "l'été 100")
    tables = Path(settings.place.tables)
    for day, first in ((0, 0), (1, 3)):
        rows = predicted(first, LABELS[first : first + 3], NOON + timedelta(days=day))
        write_deltalake(tables / "predictions", rows, mode="append", partition_by=["date"])
    bad = [{"image_id": "bad", "reason": "undecodable", "detail": "\x1b[31mred", "value": b"\x00\xff"}]
    write_deltalake(tables / "quarantine", pa.Table.from_pylist(bad, schema=QUARANTINE))
    DeltaTable.create(tables / "labels", pa.schema([("image_id", pa.string()), ("label", pa.string())]))
    return settings


def imagestream(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(arguments, *command_here("--home", settings.home, *arguments))


def test_group_by_counts_the_rows_of_every_file(settings: Settings) -> None:
    table = query(settings, "SELECT label, count(*) AS n FROM predictions GROUP BY label ORDER BY label")
    assert table.to_pylist() == [{"label": "bird", "n": 1}, {"label": "cat", "n": 3}, {"label": "dog", "n": 2}]


def test_log_entry_outside_the_table_is_refused(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for name in ("predictions", "labels"):
        write_deltalake(settings.place.table(name), predicted(0, ["cat"], NOON))
    (log,) = (Path(settings.place.tables) / "predictions" / "_delta_log").glob("*.json")
    (stolen,) = (Path(settings.place.tables) / "labels").glob("*.parquet")
    (own,) = (Path(settings.place.tables) / "predictions").glob("*.parquet")
    log.write_text(log.read_text().replace(own.name, f"../labels/{stolen.name}"))
    with pytest.raises(ServiceError, match=r"the log of .*predictions names .* which is outside the table"):
        query(settings, "SELECT label FROM predictions")


def test_columns_have_the_types_of_the_table(settings: Settings) -> None:
    (row,) = query(settings, 'SELECT date, scored_at, top_k FROM predictions WHERE "offset" = 3').to_pylist()
    assert row == {
        "date": date(2024, 5, 7),
        "scored_at": NOON + timedelta(days=1),
        "top_k": [{"label": "bird", "probability": 0.75}, {"label": "other", "probability": 0.25}],
    }
    assert query(settings, "SELECT value FROM quarantine").to_pylist() == [{"value": b"\x00\xff"}]


def test_partition_column_filters_as_a_date(settings: Settings) -> None:
    table = query(settings, "SELECT count(*) AS n FROM predictions WHERE date < DATE '2024-05-07'")
    assert table.to_pylist() == [{"n": 3}]


def test_empty_table_has_its_columns_and_no_rows(settings: Settings) -> None:
    table = query(settings, "SELECT * FROM labels")
    assert (table.column_names, table.num_rows) == (["image_id", "label"], 0)


def test_deleted_rows_and_old_files_are_not_read(settings: Settings, tmp_path: Path) -> None:
    other = Settings(home=tmp_path)
    write_deltalake(other.place.table("predictions"), predicted(0, LABELS, NOON), partition_by=["date"])
    DeltaTable(other.place.table("predictions")).delete("label = 'cat'")
    assert query(other, "SELECT count(*) AS n FROM predictions").to_pylist() == [{"n": 3}]


def test_column_added_later_is_null_in_older_rows(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for rows in ([{"image_id": "old"}], [{"image_id": "new", "by": "me"}]):
        write_deltalake(
            Path(settings.place.tables) / "labels", pa.Table.from_pylist(rows), mode="append", schema_mode="merge"
        )
    table = query(settings, 'SELECT image_id, "by" FROM labels ORDER BY image_id')
    assert table.to_pylist() == [{"image_id": "new", "by": "me"}, {"image_id": "old", "by": None}]


def test_tables_can_be_joined_described_and_listed(settings: Settings) -> None:
    joined = query(settings, "WITH l AS (FROM labels) SELECT * FROM predictions LEFT JOIN l USING (image_id)")
    assert joined.num_rows == 6
    names = query(settings, "SHOW TABLES").column("name").to_pylist()
    assert names == ["labels", "predictions", "quarantine"]
    assert "label_true" in query(settings, "DESCRIBE predictions").column("column_name").to_pylist()


def test_large_result_is_read_in_batches(settings: Settings) -> None:
    # A hundred times the memory limit.
    with open_query(settings, "SELECT repeat('x', 1000) AS x FROM range(100_000_000)") as reader:
        assert sum(reader.read_next_batch().num_rows for _ in range(5)) > 1000


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("COPY predictions TO 'stolen.csv'", "expected a SELECT, got COPY"),
        ("INSERT INTO labels VALUES ('a', 'b')", "expected a SELECT, got INSERT"),
        ("UPDATE labels SET label = 'x'", "expected a SELECT, got UPDATE"),
        ("DELETE FROM predictions", "expected a SELECT, got DELETE"),
        ("DROP VIEW predictions", "expected a SELECT, got DROP"),
        ("CREATE TABLE t AS SELECT 1", "expected a SELECT, got CREATE"),
        ("ATTACH 'other.db'", "expected a SELECT, got ATTACH"),
        ("INSTALL httpfs", "expected a SELECT, got"),
        ("LOAD httpfs", "expected a SELECT, got LOAD"),
        ("SET memory_limit = '99GB'", "expected a SELECT, got SET"),
        ("PRAGMA enable_profiling", "expected a SELECT, got PRAGMA"),
        ("EXPORT DATABASE 'stolen'", "expected a SELECT, got EXPORT"),
        ("EXPLAIN ANALYZE DELETE FROM labels", "expected a SELECT, got EXPLAIN"),
        ("SELECT 1; DROP VIEW predictions", "expected one SELECT statement, got 2"),
        ("-- nothing", "expected one SELECT statement, got 0"),
        ("SELECT * FROM read_csv('/etc/passwd')", "Cannot access file"),
        ("SELECT * FROM read_text('/etc/passwd')", "Cannot access file"),
        ("SELECT * FROM read_blob('/etc/pass*')", "Cannot access file"),
        ("SELECT * FROM glob('/etc/*')", "Cannot access file"),
        ("SELECT * FROM '/etc/passwd'", "does not exist"),
        ("SELECT * FROM read_parquet('https://example.org/x.parquet')", "SQL: "),
        ("SELECT getenv('HOME')", "getenv does not exist"),
        ("SELECT * FROM settings", "does not exist"),  # a Python variable of this process
        ("WITH x AS (INSERT INTO labels VALUES ('a', 'b') RETURNING *) SELECT * FROM nowhere, x", "SQL: "),
        ("SELECT nothing FROM predictions", 'Referenced column "nothing" not found'),
        ("SELECT * FROM features", "The tables here: labels, predictions, quarantine"),
        ("SELEC 1", "syntax error"),
        ("SELECT CAST(label AS INTEGER) FROM predictions", "Could not convert string"),
        ("SELECT $unknown", "unknown"),
        ("SELECT error('stop')", "stop"),
    ],
)
def test_invalid_or_unsafe_sql_is_refused_in_one_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServiceError) as caught:
        query(settings, sql)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_files_outside_the_log_of_a_table_cannot_be_read(settings: Settings) -> None:
    secret = settings.work_dir / "tables" / "predictions" / "secret.parquet"
    pq.write_table(pa.table({"secret": [1]}), secret)
    with pytest.raises(ServiceError, match="Cannot access file"):
        query(settings, "SELECT * FROM read_parquet($path)", parameters={"path": str(secret)})


def test_query_is_cancelled_at_the_time_limit(settings: Settings) -> None:
    endless = "SELECT count(*) FROM range(100_000_000) a, range(100_000_000) b WHERE a.range <> b.range"
    with pytest.raises(ServiceError, match=r"longer than 0\.2 s"):
        query(settings, endless, timeout_s=0.2)


def test_time_limit_that_expires_before_the_query_starts_cancels_it(settings: Settings) -> None:
    endless = "SELECT sum(sqrt(range)) FROM range(100000000000)"

    def slow_fill(views: Any, sql: str) -> None:  # as while files are copied from a bucket
        time.sleep(0.3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streaming.query._Views.fill", slow_fill)
        with pytest.raises(ServiceError, match=r"longer than 0\.1 s"):
            query(settings, endless, timeout_s=0.1)


def test_query_fails_at_the_memory_limit(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="more than 1GB of memory"):
        query(settings, "SELECT list(range) FROM range(1_000_000_000)")


def test_home_without_tables_is_reported_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"no tables yet in .*: run `imagestream demo`"):
        query(Settings(home=tmp_path), "SELECT 1")


def test_damaged_table_is_reported_with_its_name(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "tables" / "predictions" / "_delta_log"
    log.mkdir(parents=True)
    (log / "00000000000000000000.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(ServiceError, match=r"table predictions in .* cannot be read"):
        query(Settings(home=tmp_path), "SELECT 1")


def test_query_as_json_is_one_array_of_plain_values(settings: Settings) -> None:
    done = imagestream(
        settings,
        "query",
        "SELECT value, detail, NULL AS n, 'nan'::DOUBLE AS x, sum(1) AS s,"
        " MAP {'a': 1} AS m FROM quarantine GROUP BY ALL",
        "--format",
        "json",
    )
    assert json.loads(done.stdout) == [
        {"value": "AP8=", "detail": "\x1b[31mred", "n": None, "x": None, "s": 1, "m": {"a": 1}}
    ]


def test_query_as_csv_round_trips(settings: Settings) -> None:
    done = imagestream(settings, "query", 'FROM predictions ORDER BY "offset"', "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["label"] for row in rows] == LABELS
    assert json.loads(rows[0]["top_k"])[0] == {"label": "cat", "probability": 0.75}
    assert datetime.fromisoformat(rows[0]["scored_at"]) == NOON


def test_query_as_parquet_requires_a_file_and_writes_it_atomically(settings: Settings, tmp_path: Path) -> None:
    refused = imagestream(settings, "query", "FROM predictions", "--format", "parquet")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "give a file with --output FILE" in refused.stderr
    target = tmp_path / "out" / "rows.parquet"
    failing = "SELECT CASE WHEN range = 500_000 THEN error('late') ELSE 'x' END AS x FROM range(1_000_000)"
    assert imagestream(settings, "query", failing, "--format", "parquet", "-o", str(target)).returncode == 1
    assert list(target.parent.iterdir()) == []
    done = imagestream(settings, "query", "FROM predictions", "--format", "parquet", "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert pq.read_table(target).column("date").to_pylist()[0] == date(2024, 5, 7)
    assert list(target.parent.iterdir()) == [target]


def test_query_as_table_is_not_truncated_in_a_pipe(settings: Settings) -> None:
    done = imagestream(
        settings,
        "query",
        "SELECT range AS number, repeat('wide ', 30) AS w, detail, value FROM range(70), quarantine ORDER BY range",
    )
    assert "\n70 rows\n" in done.stdout
    assert done.stdout.count("wide " * 30) == 70
    assert "<2 bytes>" in done.stdout
    assert "\x1b" not in done.stdout


def test_predictions_are_listed_latest_first(settings: Settings) -> None:
    done = imagestream(settings, "predictions", "--limit", "2", "--format", "json")
    assert [row["source"] for row in json.loads(done.stdout)] == ["photos/5.jpg", "photos/4.jpg"]


def test_predictions_below_a_confidence_are_listed_lowest_first(settings: Settings, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    done = imagestream(
        settings, "predictions", "--label", "cat", "--below", "0.65", "--format", "json", "--json", str(summary)
    )
    assert [row["source"] for row in json.loads(done.stdout)] == ["photos/0.jpg", "photos/2.jpg"]
    assert json.loads(summary.read_text(encoding="utf-8"))["rows"] == 2
    injected = imagestream(settings, "predictions", "--label", "x' OR 'a' = 'a", "--format", "json")
    assert json.loads(injected.stdout) == []


def test_command_refuses_sql_that_writes_in_one_line(settings: Settings) -> None:
    done = imagestream(settings, "query", "DROP VIEW predictions")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: SQL: expected a SELECT, got DROP; queries read the tables and never change anything"
    ]


def test_pipe_that_closes_early_is_not_an_error(settings: Settings) -> None:
    command = f"{sys.executable} -c 'from streaming.cli import main; main()' --home \"$HOME_DIR\" query"
    done = subprocess.run(
        ["/bin/sh", "-c", f"{command} 'FROM range(200000)' --format csv | head -n 1"],
        env={"HOME_DIR": str(settings.home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("range\n", "")


def test_query_loads_neither_spark_nor_pandas_nor_tensorflow(settings: Settings) -> None:
    script = (
        "import sys; from streaming.cli.app import run; import streaming.cli.commands;"
        f"run(['--home', {str(settings.home)!r}, 'query', 'FROM predictions'])"
    )
    check = "import atexit, sys; atexit.register(lambda: print([m for m in sys.modules if m in"
    check += " ('pyspark', 'pandas', 'tensorflow', 'kafka', 'keras')], file=sys.stderr));"
    done = subprocess.run([sys.executable, "-c", check + script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == ["[]"]
