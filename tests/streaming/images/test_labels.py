"""Labels: published with the images, given later by CSV, and the ones that training uses."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from streaming.errors import ServiceError
from streaming.images.corrections import add_labels
from streaming.images.labels import count_contradictory, labelled_features
from streaming.images.labels_csv import read_labels
from streaming.query import query
from streaming.reports.report import read_report
from streaming.settings import Settings
from streaming.storage.tables import FEATURES, Table


def stored(image: str, label: str | None, hour: int | None, value: float, **more: Any) -> dict[str, Any]:
    published = None if hour is None else datetime(2024, 5, 6, hour, tzinfo=UTC)
    row = {"image_id": image, "label_true": label, "published_at": published, "features": [value, value]}
    return row | {"backbone_sha256": "ours"} | more


def store(table: Table, *rows: dict[str, Any], version: int = 0) -> None:
    assert table.append(pa.Table.from_pylist(list(rows), schema=table.schema), "test", version)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "tables", "features")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def write_csv(directory: Path, text: str) -> Path:
    path = directory / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


# --- CSV files


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_is_read_with_any_usual_delimiter_and_unusable_rows_are_counted(tmp_path: Path, delimiter: str) -> None:
    lines = [
        "\ufeffnote, Name ,LABEL",
        'a,"one, two.png",cat',
        "b,./sub\\three.png,Pe\u0302che",
        "c,empty.png,",
        "d,nan.png,NaN",
        "e,,dog",
        "f,short.png",
        "",
        "g,twice.png,cat",
        "h,twice.png,cat",
        "i,torn.png,cat",
        "j,torn.png,dog",
        "k,torn.png,cat",
        f"l,long.png,{'x' * 201}",
        "m,\x1bescape.png,cat",
        "n,nul.png,c\0t",
    ]
    text = "\r\n".join(line if "one, two" in line else line.replace(",", delimiter) for line in lines)
    if delimiter != ",":
        text = text.replace('a,"one, two.png",cat', f"a{delimiter}one, two.png{delimiter}cat")
    found = read_labels(write_csv(tmp_path, text), ["path", "name"])
    assert found.key == "name"
    assert found.labels == {"one, two.png": "cat", "sub/three.png": "P\u00eache", "nan.png": "NaN", "twice.png": "cat"}
    assert found.dropped == {
        "the label is empty": 2,
        "the row does not name an image": 1,
        "rows give one image different labels": 3,
        "the label is longer than 200 characters": 1,
        "the row contains control characters": 2,
    }
    assert found.examples["rows give one image different labels"] == "torn.png"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header path,label and at least one row, got an empty file"),
        (b"path,text\na,b\n", "expected a header with the columns label and one of path, name, got 'path,text'"),
        ("name;label\nK\u00f6ln;cat\n".encode("latin-1"), "not UTF-8; save the file as CSV UTF-8"),
        (b"name,label\n" + b'"' + b"x" * 200_000 + b'",cat\n', "line 2: longer than 16,384 characters"),
        (b"name,label\n" + b"a,b\n" * 11, "line 12: more than 10 rows; split the file"),
    ],
    ids=["empty", "without label", "latin-1", "huge cell", "too many rows"],
)
def test_unusable_csv_is_rejected_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(ServiceError, match=message):
        read_labels(path, ["path", "name"], max_rows=10)
    with pytest.raises(ServiceError, match="cannot be read: No such file"):
        read_labels(tmp_path / "absent.csv", ["name"])


# --- labels given later


def predictions(settings: Settings) -> None:
    """Images one … four, of which two have the same name, and five, which has features only."""
    names = {"one": "photos/a/1.png", "two": "photos/b/2.png", "three": "photos/a/same.png", "four": "x/same.png"}
    rows = [
        {"image_id": image, "source": source, "label": "cat", "confidence": 0.9, "model_version": 1, "offset": n}
        for n, (image, source) in enumerate(names.items())
    ]
    store(Table(settings.place.tables, "predictions"), *rows)
    store(Table(settings.place.tables, "features"), stored("five", None, 1, 0.5, source=".\\win\\Pe\u0302che.png"))


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("image_id", ["one", "two", "five"]),
        ("source", ["photos/a/1.png", "./photos/b/2.png", "win/P\u00eache.png"]),
        ("name", ["1.png", "2.png", "Pe\u0302che.png"]),
    ],
)
def test_images_are_labelled_by_id_source_or_name(settings: Settings, header: str, named: list[str]) -> None:
    predictions(settings)
    lines = [f"{header},label", *(f"{name},dog" for name in named), "same.png,dog", "nowhere,dog", f"{named[0]} ,dog"]
    result = add_labels(settings, write_csv(settings.work_dir, "\n".join(lines)), "maria")
    assert result.added == 3
    ambiguous = {"several images have this name: give their image_id": 1} if header == "name" else {}
    assert result.left_out == {"the tables contain no such image": 2 - len(ambiguous)} | ambiguous
    assert result.examples["the tables contain no such image"][-1] == "nowhere"
    rows = query(settings, 'SELECT image_id, label, "by" FROM labels ORDER BY image_id').to_pylist()
    assert rows == [{"image_id": image, "label": "dog", "by": "maria"} for image in ("five", "one", "two")]


def test_reapplying_a_file_adds_nothing_even_after_a_correction(settings: Settings) -> None:
    predictions(settings)
    first = write_csv(settings.work_dir, "image_id,label\none,dog\ntwo,dog\n")
    assert (add_labels(settings, first, "a").added, add_labels(settings, first, "b").unchanged) == (2, 2)
    second = settings.work_dir / "second.csv"
    second.write_text("image_id,label\none,bird\ntwo,dog\n")
    result = add_labels(settings, second, "c")
    assert (result.added, result.unchanged) == (1, 1)
    again = add_labels(settings, first, "d")
    assert (again.added, again.unchanged, again.superseded) == (0, 1, 1)
    assert query(settings, "SELECT count(*) AS n FROM labels").to_pylist() == [{"n": 3}]
    assert read_report(settings).versions[0]["labelled"] == 2


def test_rows_naming_one_image_in_two_ways_must_agree(settings: Settings) -> None:
    predictions(settings)
    store(Table(settings.place.tables, "features"), stored("one", None, 2, 1.0, source="other/1b.png"), version=1)
    result = add_labels(settings, write_csv(settings.work_dir, "name,label\n1.png,dog\n1b.png,cat\n2.png,cat\n"), "a")
    assert result.added == 1
    assert result.left_out == {"rows give one image different labels": 1}


def test_labels_without_images_are_rejected(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="no images yet in .*: run `imagestream stream` or `train` first"):
        add_labels(settings, write_csv(settings.work_dir, "image_id,label\none,dog\n"), "a")
    assert not Path(settings.place.tables).exists()


# --- features with labels


def test_each_labelled_image_is_used_once_with_its_latest_label(spark: SparkSession, table: Table) -> None:
    commits = [
        [stored("trained", "cat", None, 1), stored("relabelled", "cat", 9, 2), stored("again", "dog", 9, 3)],
        [stored("relabelled", "dog", 11, 2), stored("trained", "dog", 9, 1), stored("again", "dog", 9, 3)],
        [stored("relabelled", "bird", 10, 2), stored("relabelled", None, 12, 2), stored("never", None, 9, 4)],
        [stored("theirs", "cat", 9, 5, backbone_sha256="theirs"), stored("done", "cat", 9, 6, projection_sha256="p")],
        [stored("again", "cat", 10, 3, backbone_sha256="theirs"), stored("again", "cat", 10, 3, projection_sha256="p")],
        [stored("tied", "b", 9, 7), stored("tied", "a", 9, 7)],
    ]
    for version, rows in enumerate(commits):
        store(table, *rows, version=version)
    found = labelled_features(spark, table, "ours")
    assert found.columns == ["image_id", "known_as", "label", "features"]
    assert sorted(tuple(row) for row in found.drop("known_as").collect()) == [
        ("again", "dog", [3.0, 3.0]),
        ("relabelled", "dog", [2.0, 2.0]),
        ("trained", "dog", [1.0, 1.0]),
    ]
    assert count_contradictory(spark, table, "ours") == 1  # tied
    assert labelled_features(spark, table, "unknown").isEmpty()


def test_later_label_overrides_the_published_one(spark: SparkSession, table: Table) -> None:
    store(
        table,
        stored("wrong", "cat", 23, 1),
        stored("late", None, 9, 2),
        stored("right", "dog", 9, 3),
        stored("never", None, 9, 4),
        stored("wrong", "cat", 23, 5, augmentation=1),
    )
    labels = Table(table.tables, "labels")
    assert {tuple(row) for row in labelled_features(spark, table, "ours").select("image_id", "label").collect()} == {
        ("wrong", "cat"),
        ("right", "dog"),
    }
    given = [
        ("wrong", "bird", 2),
        ("wrong", "dog", 3),
        ("wrong", "cat", 1),
        ("late", "cat", 1),
        ("elsewhere", "cat", 1),
    ]
    rows = [
        {"image_id": image, "label": label, "labelled_at": datetime(2024, 5, 6, hour, tzinfo=UTC), "by": "maria"}
        for image, label, hour in given
    ]
    store(labels, *rows)
    found = labelled_features(spark, table, "ours").select("image_id", "label").collect()
    assert {tuple(row) for row in found} == {("wrong", "dog"), ("late", "cat"), ("right", "dog")}
    copies = labelled_features(spark, table, "ours", augmented=True).where("augmentation IS NOT NULL").collect()
    assert [(row.image_id, row.label, row.features) for row in copies] == [("wrong", "dog", [5.0, 5.0])]


# --- the same bytes under several names


def test_same_bytes_under_several_names_are_one_image(spark: SparkSession, table: Table) -> None:
    store(
        table,
        stored("key 1", "cat", 9, 1, content_sha256="one", source="a/1.png"),
        stored("key 2", "cat", 10, 1, content_sha256="one", source="b/1.png"),
        stored("two", "dog", 9, 2, content_sha256="two"),
        stored("from before", "dog", 9, 3),
    )
    found = labelled_features(spark, table, "ours", group_by="source").drop("features").collect()
    assert {tuple(row) for row in found} == {
        ("one", "key 2", "cat", "a/1.png"),
        ("two", "two", "dog", "two"),
        ("from before", "from before", "dog", "from before"),
    }


def test_contradictory_labels_exclude_an_image_until_it_is_corrected(spark: SparkSession, table: Table) -> None:
    store(
        table,
        stored("key 1", "cat", 9, 1, content_sha256="one"),
        stored("key 2", "dog", 10, 1, content_sha256="one"),
        stored("key 3", "cat", 9, 2, content_sha256="two"),
        stored("key 3", "dog", 10, 2, content_sha256="two"),  # a correction, with the same name
        stored("key 4", None, 11, 2, content_sha256="two"),
        stored("key 1", "cat", 9, 1, content_sha256="one", backbone_sha256="theirs"),
    )

    def labels() -> dict[str, str]:
        return {row.image_id: row.label for row in labelled_features(spark, table, "ours").collect()}

    assert labels() == {"two": "dog"}
    assert count_contradictory(spark, table, "ours") == 1
    given = [("key 1", "bird", 1), ("key 2", "cow", 2), ("key 4", "cat", 1)]  # by any of the names
    rows = [
        {"image_id": image, "label": label, "labelled_at": datetime(2024, 5, 7, hour, tzinfo=UTC), "by": "maria"}
        for image, label, hour in given
    ]
    store(Table(table.tables, "labels"), *rows)
    assert labels() == {"one": "cow", "two": "cat"}
    assert count_contradictory(spark, table, "ours") == 0


def test_features_table_without_the_augmentation_column_is_read_and_extended(
    spark: SparkSession, tmp_path: Path
) -> None:
    before = pa.schema([field for field in FEATURES if field.name != "augmentation"])
    row = stored("old", "cat", 9, 1)
    write_deltalake(tmp_path / "features", pa.Table.from_pylist([row], schema=before))
    table = Table(tmp_path, "features")
    store(table, stored("new", "dog", 9, 2), stored("new", "dog", 9, 3, augmentation=1))
    assert {field.name for field in DeltaTable(tmp_path / "features").schema().fields} == set(FEATURES.names)
    found = labelled_features(spark, table, "ours", augmented=True).collect()
    assert sorted((row.image_id, row.augmentation or 0, row.features) for row in found) == [
        ("new", 0, [2.0, 2.0]),
        ("new", 1, [3.0, 3.0]),
        ("old", 0, [1.0, 1.0]),
    ]


def test_empty_table_is_reported_before_spark_reads_it(spark: SparkSession, table: Table) -> None:
    with pytest.raises(ServiceError, match=r"features is empty: there are no images to fit on"):
        labelled_features(spark, table, "ours")
