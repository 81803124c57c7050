"""SQL in a separate process: a query that exceeds its time or memory is cancelled."""

from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from streaming import query_process
from streaming.errors import NotFoundError, ServiceError
from streaming.query_process import open_guarded_query
from streaming.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = Settings(home=tmp_path_factory.mktemp("query"))
    write_deltalake(settings.place.table("labels"), pa.table({"image_id": ["a", "b", "c"], "label": ["x", "y", "y"]}))
    return settings


def rows(settings: Settings, sql: str, **options: Any) -> list[dict[str, Any]]:
    with open_guarded_query(settings, sql, **options) as reader:
        return reader.read_all().to_pylist()


def test_guarded_query_returns_rows(settings: Settings) -> None:
    found = rows(settings, "SELECT label, count(*) AS n FROM labels GROUP BY label ORDER BY label")
    assert found == [{"label": "x", "n": 1}, {"label": "y", "n": 2}]
    assert rows(settings, "SELECT * FROM labels WHERE label = 'z'") == []


@pytest.mark.parametrize(
    ("sql", "timeout_s", "message"),
    [
        ("SELECT length(repeat('x', 3_000_000_000)) AS n", 60.0, "SQL: .*memory"),
        ("SELECT levenshtein(repeat('ab', 200_000), repeat('ba', 200_000)) AS n", 0.5, r"took longer than 0\.5 s"),
        ("SELECT count(*) FROM range(1_000_000_000_000) a", 0.5, r"SQL: the query took longer than 0\.5 s"),
        ("SELECT regexp_matches(repeat('a', 50_000_000), '(a?){1000}b') AS n", 0.5, "SQL: "),
        ("SELECT nothing FROM labels", 60.0, "SQL: .*nothing"),
    ],
)
def test_failed_query_is_a_one_line_error_and_leaves_no_process(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, sql: str, timeout_s: float, message: str
) -> None:
    monkeypatch.setattr(query_process, "GRACE_S", 0.5)
    with pytest.raises(ServiceError, match=message) as ended:
        rows(settings, sql, timeout_s=timeout_s)
    assert "\n" not in str(ended.value)
    assert not [child for child in psutil.Process().children() if "query_main" in " ".join(child.cmdline())]


def test_closing_the_reader_cancels_the_query(settings: Settings) -> None:
    with open_guarded_query(settings, "SELECT repeat('x', 1000) AS x FROM range(100_000_000)") as reader:
        assert reader.read_next_batch().num_rows > 1
    assert not [child for child in psutil.Process().children() if "query_main" in " ".join(child.cmdline())]


def test_home_without_tables_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no tables yet in"):
        rows(Settings(home=tmp_path), "SELECT 1")
