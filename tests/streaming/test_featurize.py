"""Files to rows of the table `features`: the good ones as the engine computes them, the bad ones by name."""

from hashlib import sha256
from pathlib import Path

import duckdb
import numpy as np
import pytest
from pyspark.sql import SparkSession

from models.backbone import ExportedBackbone
from models.engine import LiteRTEngine
from models.scorer import decode_all
from streaming.dataset import LabelledFile, digit_images, list_images, write_images
from streaming.featurize import IMAGES_PER_TASK, featurize, task_count
from streaming.tables import Table


def rows_of(table: Table) -> list[dict[str, object]]:
    if not table.files():
        return []
    return duckdb.read_parquet(table.files()).order("source").to_arrow_table().to_pylist()


def test_good_files_become_rows_and_bad_ones_are_reported(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "images", digit_images(9))
    good = list_images(folder)
    content = Path(good[0].path).read_bytes()
    bad = {"empty.png": b"", "notes.txt": b"this is text", "cut.png": content[: len(content) // 2]}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    files = [*good, *(LabelledFile(str(folder / name), "0") for name in [*bad, "absent.png"])]
    table = Table(tmp_path, "features")
    result = featurize(spark, files, exported, table)

    assert result.rows == 9
    reasons = {Path(path).name: why.split(":")[0] for path, why in result.bad.items()}
    assert reasons == {
        "empty.png": "empty",
        "notes.txt": "not_an_image",
        "cut.png": "truncated",
        "absent.png": "missing",
    }
    assert "No such file" in result.bad[str(folder / "absent.png")]

    rows = rows_of(table)
    assert len(table.files()) == 2  # one per core
    assert [(row["source"], row["label_true"]) for row in rows] == [(file.path, file.label) for file in good]
    data = [Path(file.path).read_bytes() for file in good]
    assert [row["image_id"] for row in rows] == [sha256(one).hexdigest() for one in data]
    assert {row["backbone_sha256"] for row in rows} == {exported.sha256}
    assert {row["projection_sha256"] for row in rows} == {None}
    engine = LiteRTEngine(exported.flatbuffer)
    expected = engine(decode_all(data, engine.input_size).images)
    np.testing.assert_array_equal(np.array([row["features"] for row in rows], np.float32), expected)


def test_every_run_adds_its_rows(spark: SparkSession, exported: ExportedBackbone, tmp_path: Path) -> None:
    files = list_images(write_images(tmp_path / "images", digit_images(3)))
    table = Table(tmp_path, "features")
    for run in (1, 2):
        assert featurize(spark, files, exported, table).rows == 3
        assert len(rows_of(table)) == 3 * run


def test_files_that_are_all_bad_add_nothing_and_are_counted_to_the_limit(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    files = [LabelledFile(str(tmp_path / f"absent {number}.png"), "a") for number in range(7)]
    table = Table(tmp_path, "features")
    result = featurize(spark, files, exported, table, max_bad_shown=3)
    assert result.rows == 0
    assert [Path(path).name for path in result.bad] == ["absent 0.png", "absent 1.png", "absent 2.png"]
    assert rows_of(table) == []


@pytest.mark.parametrize(
    ("files", "cores", "tasks"),
    [
        (1, 8, 1),
        (5, 8, 5),
        (8, 8, 8),
        (8 * IMAGES_PER_TASK, 8, 8),
        (8 * IMAGES_PER_TASK + 1, 8, 16),
        (100_000, 2, 196),
        (100_000, 64, 256),
        (0, 4, 1),
    ],
)
def test_tasks_are_whole_rounds_over_the_cores_of_bounded_size(files: int, cores: int, tasks: int) -> None:
    assert task_count(files, cores) == tasks
    assert files <= tasks * IMAGES_PER_TASK
    assert tasks % cores == 0 or tasks <= max(1, files)
