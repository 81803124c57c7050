"""Erasing an image from all tables and files, with a record for the audit, and changes by other programs."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.schema import Field, PrimitiveType
from pyspark.sql import SparkSession

from streaming.dashboard.reader import Reader
from streaming.errors import ServiceError
from streaming.images.corrections import add_labels
from streaming.jobs.audit import audit
from streaming.jobs.erase import erase, record_deleted
from streaming.jobs.maintain import maintain
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.table_features import TableFeatureError
from streaming.storage.tables import FEATURES, LABELS, Table
from tests.streaming.history import commit_batch


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    """Two batches of eight messages, one of them quarantined, with features and labels of some images."""
    settings = Settings(home=tmp_path / "home")
    commit_batch(settings, 0, {0: (0, 8)}, bad={3})
    commit_batch(settings, 1, {0: (8, 16)})
    features = [
        {"image_id": name, "content_sha256": content, "backbone_sha256": "b", "features": [1.0]}
        for name, content in (("0-0", "aa"), ("0-9", "aa"), ("0-1", "bb"))
    ]
    Table(settings.place.tables, "features").append(pa.Table.from_pylist(features, schema=FEATURES), "test", 0)
    labels = [{"image_id": "0-0", "label": "cat"}, {"image_id": "0-1", "label": "dog"}]
    Table(settings.place.tables, "labels").append(pa.Table.from_pylist(labels, schema=LABELS), "test", 0)
    return settings


def count(settings: Settings, table: str) -> int:
    return int(query(settings, f"SELECT count(*) AS n FROM {table}").column("n")[0].as_py())  # noqa: S608


def files_with(settings: Settings, *names: str) -> list[str]:
    """Data files of any table version that contain one of the image ids or hashes."""
    found = []
    for file in Path(settings.home).rglob("*.parquet"):
        if "_delta_log" not in file.parts:
            rows = pq.ParquetFile(file).read().to_pylist()
            found += [file.name for row in rows if set(names) & {row.get("image_id"), row.get("content_sha256")}]
    return found


def test_erased_image_is_in_no_file_and_the_audit_is_clean(home: Settings) -> None:
    assert len(files_with(home, "0-0", "aa", "0-9")) == 5
    result = erase(home, ["0-0"], "request 17")
    assert result.ids == ["0-0", "0-9"]  # the same content under two ids
    assert result.rows == {"features": 2, "labels": 1, "predictions": 2}
    assert result.messages == [("images", 0, 0), ("images", 0, 9)]
    assert not files_with(home, "0-0", "aa", "0-9")
    assert [count(home, name) for name in ("predictions", "features", "labels", "erased")] == [13, 1, 1, 2]
    report = audit(home)
    assert (report.clean, report.erased) == (True, 2)
    with pytest.raises(ServiceError, match="no table in .* has an image with the id 0-0"):
        erase(home, ["0-0"], "again")
    commit_batch(home, 2, {0: (16, 24)})
    maintain(home)
    assert audit(home).clean


def test_quarantined_image_is_erased_with_its_bytes(home: Settings) -> None:
    (image,) = query(home, "SELECT image_id FROM quarantine").column("image_id").to_pylist()
    assert erase(home, [image], "a").rows == {"quarantine": 1}
    assert count(home, "quarantine") == 0
    assert audit(home).clean


def test_rows_deleted_by_another_program_are_recorded_on_request(home: Settings) -> None:
    DeltaTable(home.place.table("predictions")).delete("offset >= 5 AND offset < 7")
    DeltaTable(home.place.table("quarantine")).delete()
    assert not audit(home).clean
    assert record_deleted(home, "a") == 3
    assert (audit(home).clean, audit(home).erased) == (True, 3)
    assert record_deleted(home, "a") == 0
    table = query(home, 'SELECT "table" AS t, count(*) AS n FROM erased GROUP BY 1 ORDER BY 1').to_pylist()
    assert table == [{"t": "predictions", "n": 2}, {"t": "quarantine", "n": 1}]


def test_tables_changed_by_another_program_remain_usable(home: Settings, tmp_path: Path) -> None:
    for name in ("predictions", "quarantine", "batches", "features", "labels"):
        place = home.place.table(name)
        DeltaTable(place).alter.add_columns([Field("theirs", PrimitiveType("string"))])
        DeltaTable(place).alter.set_table_properties({"delta.enableChangeDataFeed": "true"})
    DeltaTable(home.place.table("predictions")).optimize.z_order(["offset"])
    DeltaTable(home.place.table("predictions")).update(updates={"theirs": "'seen'"}, predicate="offset = 1")
    DeltaTable(home.place.table("features")).optimize.compact()
    commit_batch(home, 2, {0: (16, 24)}, bad={17})
    assert audit(home).clean
    (tmp_path / "labels.csv").write_text("image_id,label\n0-1,bird\n")
    assert add_labels(home, tmp_path / "labels.csv", "a").added == 1
    assert erase(home, ["0-1"], "a").rows == {"features": 1, "labels": 2, "predictions": 1}
    assert not files_with(home, "0-1")  # also not in the change data feed
    report = maintain(home)
    assert {table.name for table in report.tables} >= {"predictions", "erased"}
    assert audit(home).clean
    assert query(home, "SELECT count(theirs) AS n FROM predictions").to_pylist() == [{"n": 0}]


def test_deletion_vectors_are_refused_until_purged(home: Settings, spark: SparkSession) -> None:
    place = f"delta.`{home.place.table('predictions')}`"
    spark.sql(f"ALTER TABLE {place} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    spark.sql(f"DELETE FROM {place} WHERE offset IN (5, 6)")  # noqa: S608
    predictions = Path(home.place.table("predictions"))
    vectors = list(predictions.glob("deletion_vector_*.bin"))
    assert vectors
    refused: list[Callable[[], object]] = [
        lambda: query(home, "SELECT count(*) FROM predictions"),
        lambda: audit(home),
        lambda: erase(home, ["0-1"], "a"),
        lambda: Reader(home.place).version("predictions"),
        lambda: Table(home.place.tables, "predictions").files(),
    ]
    for read in refused:
        with pytest.raises(TableFeatureError, match=r"uses Delta's deletionVectors in 1 of its files.* REORG TABLE"):
            read()
    commit_batch(home, 2, {0: (16, 24)})  # the stream continues
    for vector in vectors:
        os.utime(vector, (0, 0))
    skipped = {table.name: table.skipped for table in maintain(home).tables}
    assert all(vector.exists() for vector in vectors)
    assert {name for name, why in skipped.items() if why is not None} == {"predictions"}
    assert DeltaTable(predictions).protocol().reader_features == ["deletionVectors"]
    assert spark.read.format("delta").load(str(predictions)).count() == 23 - 2

    # Run the statements in the message.
    found = re.search(r"run in Spark (ALTER TABLE .*) and (REORG TABLE .*)$", skipped["predictions"] or "")
    assert found is not None
    for statement in found.groups():
        spark.sql(statement)
    assert (count(home, "predictions"), count(home, "features")) == (21, 3)
    assert record_deleted(home, "a") == 2
    assert erase(home, ["0-0"], "a").rows == {"features": 2, "labels": 1, "predictions": 2}
    assert [table.skipped for table in maintain(home).tables] == [None] * 6
    assert audit(home).clean
