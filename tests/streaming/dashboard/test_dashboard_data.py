"""The queries of the dashboard's pages, on real Delta tables."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from streaming.dashboard import data
from streaming.dashboard.actions import add_label
from streaming.dashboard.data import Filter, Window
from streaming.dashboard.reader import Reader
from streaming.errors import ServiceError
from streaming.settings import Settings
from streaming.storage.tables import BATCHES, PREDICTIONS, SCHEMAS, Table

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)
QUERY_ID = "00000000-0000-4000-8000-000000000001"
WINDOW = Window.last(timedelta(hours=1), NOW)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def commit(settings: Settings, batch_id: int, rows: list[dict[str, Any]], *, at: datetime, version: int = 1) -> None:
    """Commit a micro-batch of predictions at `at`, scored one second and published two seconds before."""
    lineage = {"model_version": version, "query_id": QUERY_ID, "batch_id": batch_id}
    predictions = [
        {
            "image_id": f"{batch_id}-{number}",
            "topic": "images",
            "partition": 0,
            "offset": 100 * batch_id + number,
            "published_at": at - timedelta(seconds=2),
            "scored_at": at - timedelta(seconds=1),
            "date": at.date(),
            "label": "cat",
            "confidence": 0.75,
            **lineage,
            **row,
        }
        for number, row in enumerate(rows)
    ]
    Table(settings.place.tables, "predictions").append(
        pa.Table.from_pylist(predictions, schema=PREDICTIONS), QUERY_ID, batch_id
    )
    batch = lineage | {
        "input_rows": len(rows) + 1,
        "predicted_rows": len(rows),
        "quarantined_rows": 1,
        "seconds": [("batch", 0.5)],
        "drift": [("rows", 200.0), ("psi_max", 0.1 * batch_id), ("psi_mean", 0.01)] if rows else None,
        "committed_at": at,
    }
    Table(settings.place.tables, "batches").append(pa.Table.from_pylist([batch], schema=BATCHES), QUERY_ID, batch_id)


def reader_of(settings: Settings) -> Reader:
    reader = Reader(settings.place)
    reader.version(*SCHEMAS)
    return reader


def test_queries_without_tables_return_no_rows(settings: Settings) -> None:
    reader = reader_of(settings)
    assert data.last_batches(reader) == []
    assert data.throughput(reader, WINDOW) == data.latency(reader, WINDOW) == data.accuracy(reader, WINDOW) == []
    assert data.latency_in_all(reader, WINDOW)["p50"] is None
    assert data.predictions(reader, Filter(judged="wrong"), limit=5) == data.PredictionsPage([], 0)
    assert data.choices(reader) == ([], [])
    assert data.reasons(reader) == data.quarantined(reader, None, limit=5) == data.drift(reader) == []
    assert data.versions(reader) == data.confusion(reader, 1) == data.swaps(reader, WINDOW) == []
    assert data.agreement(reader, 1) is None


def test_throughput_latency_and_swaps_are_limited_to_the_window(settings: Settings) -> None:
    commit(settings, 0, [{}] * 7, at=NOW - timedelta(hours=2))
    commit(settings, 1, [{}] * 5, at=NOW - timedelta(minutes=30))
    commit(settings, 2, [{}, {"published_at": NOW - timedelta(seconds=30)}], at=NOW - timedelta(seconds=20), version=2)
    reader = reader_of(settings)
    steps = data.throughput(reader, WINDOW)
    assert [(row["version"], row["images"], row["quarantined"]) for row in steps] == [(1, 6, 1), (2, 3, 1)]
    assert steps[0]["images_per_s"] == 6 / WINDOW.step_s
    assert [(row["images"], row["p50"]) for row in data.latency(reader, WINDOW)] == [(5, 2.0), (2, 6.0)]
    assert data.latency_in_all(reader, WINDOW)["images"] == 7
    (swap,) = data.swaps(reader, WINDOW)
    assert (swap["before"], swap["version"]) == (1, 2)
    assert [row["version"] for row in data.last_batches(reader)] == [2, 1, 1]


def test_predictions_are_filtered_and_listed_latest_first(settings: Settings) -> None:
    commit(settings, 0, [{"label": "cat"}, {"label": "dog", "confidence": 0.4}], at=NOW - timedelta(days=1))
    commit(settings, 1, [{"label": "cat", "source": "50%_off/It's.PNG", "confidence": 0.9}], at=NOW, version=2)
    reader = reader_of(settings)

    def offsets(selection: Filter, limit: int = 9, skip: int = 0) -> list[int]:
        return [row["offset"] for row in data.predictions(reader, selection, limit=limit, skip=skip).rows]

    assert offsets(Filter()) == [100, 1, 0]
    assert offsets(Filter(), limit=1, skip=1) == [1]
    assert data.predictions(reader, Filter(), limit=1).total == 3
    assert offsets(Filter(labels=("dog",))) == [1]
    assert offsets(Filter(versions=(2,))) == [100]
    assert offsets(Filter(confidence=(0.75, 0.9))) == [100, 0]
    assert offsets(Filter(source="it's.png")) == [100]
    assert offsets(Filter(source="%")) == [100]
    assert offsets(Filter(source="' OR true --")) == []
    assert data.choices(reader) == (["cat", "dog"], [2, 1])


def test_latest_given_label_overrides_the_published_label(settings: Settings) -> None:
    commit(settings, 0, [{"label_true": "cat"}, {"label_true": "dog"}, {}], at=NOW)
    reader = reader_of(settings)
    assert data.accuracy(reader, WINDOW)[0] | {"moment": 0} == {
        "moment": 0,
        "version": 1,
        "labelled": 2,
        "accuracy": 0.5,
    }

    for label in ("cat", "dog", "cat"):
        add_label(settings, "0-1", label)
    reader.version("labels")
    assert data.given_labels(reader, ["0-0", "0-1"]) == {"0-1": "cat"}
    assert data.accuracy(reader, WINDOW)[0]["accuracy"] == 1.0
    assert data.predictions(reader, Filter(judged="wrong"), limit=5).total == 0
    assert [row["truth"] for row in data.predictions(reader, Filter(judged="right"), limit=5).rows] == ["cat", "cat"]
    assert data.confusion(reader, 1) == [{"truth": "cat", "predicted": "cat", "images": 2}]


@pytest.mark.parametrize("label", ["", "  ", "x" * 201])
def test_blank_or_too_long_label_is_refused(settings: Settings, label: str) -> None:
    with pytest.raises(ServiceError, match="expected a label"):
        add_label(settings, "0-1", label)
    assert not Path(settings.place.tables).exists()


def test_reader_follows_commits_and_recreated_tables(settings: Settings) -> None:
    reader = Reader(settings.place)
    before = reader.version("predictions")
    commit(settings, 0, [{}], at=NOW)
    assert reader.version("predictions") != before
    commit(settings, 1, [{}], at=NOW)
    again = reader.version("predictions")
    assert reader.rows("SELECT count(*) AS n FROM predictions") == [{"n": 2}]

    Path(settings.place.tables).rename(Path(settings.place.tables).with_name("gone"))
    commit(settings, 0, [{}], at=NOW)
    commit(settings, 1, [{}, {}], at=NOW)
    assert reader.version("predictions") != again
    assert reader.rows("SELECT count(*) AS n FROM predictions") == [{"n": 3}]


def test_damaged_table_is_reported_with_its_name(settings: Settings) -> None:
    commit(settings, 0, [{}], at=NOW)
    (Path(settings.place.tables) / "predictions" / "_delta_log" / f"{1:020}.json").write_text("{")
    with pytest.raises(ServiceError, match="table predictions in .* cannot be read"):
        Reader(settings.place).version("predictions")
