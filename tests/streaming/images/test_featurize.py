"""From files to rows of the table `features`: good images with the engine's features, bad ones reported by name."""

import shutil
from hashlib import sha256
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from pyspark.sql import SparkSession
from pyspark.sql import functions as F  # noqa: N812

from models.backbone import DEFAULT_BACKBONE, ExportedBackbone, export_backbone
from models.engine import LiteRTEngine
from models.scorer import decode_all
from streaming.images.dataset import digit_images, read_dataset, write_images
from streaming.images.featurize import BYTES_PER_TASK, IMAGES_PER_TASK, featurize, task_count
from streaming.images.image_folder import LabelledFile
from streaming.images.images_frame import images_frame
from streaming.images.labels import labelled_features
from streaming.images.split import Split
from streaming.storage.tables import Table


@pytest.fixture(scope="module")
def exported(exports: Path) -> ExportedBackbone:
    """The backbone of the shared model, with a twelfth of the default pixels."""
    return export_backbone(DEFAULT_BACKBONE, "imagenet", exports, input_size=(64, 64))


def rows_of(table: Table) -> list[dict[str, object]]:
    if not table.files():
        return []
    return duckdb.read_parquet(table.files()).order("source").to_arrow_table().to_pylist()


def test_good_files_become_rows_and_bad_files_are_reported(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "images", digit_images(9))
    good = read_dataset(folder).files
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


def test_second_run_featurizes_only_new_or_changed_files(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    files = read_dataset(write_images(tmp_path / "images", digit_images(9))).files
    table = Table(tmp_path, "features")
    assert featurize(spark, files[:4], exported, table).reused == 0
    again = featurize(spark, files, exported, table)
    assert (again.rows, again.reused) == (9, 4)
    assert len(rows_of(table)) == 9
    Path(files[0].path).write_bytes(Path(files[1].path).read_bytes())  # another image with the same name
    relabelled = [files[0], LabelledFile(files[2].path, "other"), *files[3:]]
    third = featurize(spark, relabelled, exported, table)
    assert (third.rows, third.reused) == (8, 6)
    assert len(rows_of(table)) == 11
    back = featurize(spark, files[2:3], exported, table)  # its first label is new again
    assert (back.rows, back.reused) == (1, 0)


def test_duplicates_and_conflicting_labels_are_counted(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "images", digit_images(4))
    first, second, *_ = read_dataset(folder).files
    copies = {"same.png": (first, first.label), "other.png": (second, "another"), "third.png": (second, second.label)}
    for name, (file, label) in copies.items():
        (folder / str(label)).mkdir(exist_ok=True)
        shutil.copy(file.path, folder / str(label) / name)
    result = featurize(spark, read_dataset(folder).files, exported, Table(tmp_path, "features"))
    assert (result.rows, result.duplicates, result.conflicting) == (7, 3, 1)
    assert result.warnings() == [
        "3 images identical to others, byte for byte",
        "1 image with more than one label: the same bytes are labelled differently",
    ]


def test_augmented_copies_are_stored_with_their_image_and_recomputed_by_each_run(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    files = read_dataset(write_images(tmp_path / "images", digit_images(3))).files
    table = Table(tmp_path, "features")
    featurize(spark, files, exported, table)
    result = featurize(spark, files, exported, table, augment=2)
    assert (result.rows, result.reused, result.copies) == (3, 3, 6)
    rows = rows_of(table)
    assert sorted((row["source"], row["augmentation"] or 0) for row in rows) == [
        (file.path, number) for file in files for number in (0, 1, 2)
    ]
    assert len({tuple(row["features"]) for row in rows}) == 9
    assert len({row["image_id"] for row in rows}) == 3
    assert featurize(spark, files, exported, table).copies == 0
    found = labelled_features(spark, table, exported.sha256)
    assert found.columns == ["image_id", "known_as", "label", "features"]
    assert found.count() == 3
    everything = labelled_features(spark, table, exported.sha256, augmented=True)
    assert everything.columns == ["image_id", "known_as", "label", "features", "augmentation"]
    assert everything.count() == 9
    training, holdout = Split(42, 0.4).sides(everything)
    assert not {row.image_id for row in training.collect()} & {row.image_id for row in holdout.collect()}


@pytest.mark.parametrize("kind", ["one file", "hugging face", "partitioned by label", "delta"])
def test_images_of_a_table_are_read_on_the_workers(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path, kind: str
) -> None:
    digits = [*digit_images(6), ("bad.png", "7", b"no image"), ("null.png", "7", None), ("unlabelled.png", None, b"x")]
    names, labels, contents = zip(*digits, strict=True)
    rows = pa.table({"image": pa.array(contents, pa.binary()), "label": [f" 0{one}" for one in labels[:-1]] + [None]})
    source = tmp_path / ("image table é" if kind == "delta" else "image [table].parquet")
    match kind:
        case "one file":
            pq.write_table(rows.append_column("name", [names]), source)
        case "hugging face":
            image = [{"bytes": content, "path": name} for name, content in zip(names, contents, strict=True)]
            pq.write_table(pa.table({"image": image, "label": rows["label"]}), source, row_group_size=4)
        case "partitioned by label":
            pq.write_to_dataset(rows, source, partition_cols=["label"])
        case "delta":
            write_deltalake(source, rows, partition_by=["label"])
    found = read_dataset(source)
    assert found.kind == ("delta" if kind == "delta" else "parquet")
    assert found.n_images == 8
    assert sum(found.class_counts.values()) == 8
    assert all(label.startswith("0") for label in found.class_counts)
    assert set(found.sample_images(4)) <= {content for content in contents if content is not None}
    table = Table(tmp_path, "features")
    result = featurize(spark, found, exported, table)
    assert (result.rows, result.n_bad) == (6, 2)
    assert sorted(why.split(":")[0] for why in result.bad.values()) == ["missing", "not_an_image"]
    stored = {row["image_id"]: row for row in rows_of(table)}
    assert {one: row["label_true"] for one, row in stored.items()} == {
        sha256(content).hexdigest(): f"0{label}" for _, label, content in digit_images(6)
    }
    if kind == "one file":
        assert {row["source"] for row in stored.values()} == {f"{source}#{name}" for name in names[:6]}
    if kind == "partitioned by label":  # only file and row number identify the images
        assert featurize(spark, found, exported, table).reused == 6


def test_bad_files_add_no_rows_and_are_listed_up_to_the_limit(
    spark: SparkSession, exported: ExportedBackbone, tmp_path: Path
) -> None:
    files = [LabelledFile(str(tmp_path / f"absent {number}.png"), "a") for number in range(7)]
    table = Table(tmp_path, "features")
    result = featurize(spark, files, exported, table, max_bad_shown=3)
    assert (result.rows, result.n_bad) == (0, 7)
    assert [Path(path).name for path in result.bad] == ["absent 0.png", "absent 1.png", "absent 2.png"]
    assert rows_of(table) == []


@pytest.mark.parametrize(
    ("images", "size", "cores", "tasks"),
    [
        (1, 0, 8, 1),
        (5, 0, 8, 5),
        (8, 0, 8, 8),
        (8 * IMAGES_PER_TASK, 0, 8, 8),
        (8 * IMAGES_PER_TASK + 1, 0, 8, 16),
        (100_000, 0, 2, 196),
        (100_000, 0, 64, 256),
        (0, 0, 4, 1),
        (1_000, 3 * BYTES_PER_TASK, 2, 4),
        (3, 30 * BYTES_PER_TASK, 2, 3),
    ],
)
def test_tasks_are_whole_rounds_over_the_cores_of_bounded_size(images: int, size: int, cores: int, tasks: int) -> None:
    assert task_count(images, size, cores) == tasks
    assert images <= tasks * IMAGES_PER_TASK
    assert tasks % cores == 0 or tasks <= max(1, images)


def test_large_files_are_distributed_over_all_tasks(spark: SparkSession) -> None:
    sizes = [9, 8, 7, 6, 1, 1, 1, 1]
    files = [LabelledFile(str(number), "a", size) for number, size in enumerate(sizes)]
    rows = images_frame(spark, files, lambda *_: 4).withColumn("part", F.spark_partition_id()).collect()
    parts = [{sizes[int(row.source)] for row in rows if row.part == part} for part in range(4)]
    assert sorted(map(max, parts)) == [6, 7, 8, 9]
    assert all(1 in part for part in parts)
