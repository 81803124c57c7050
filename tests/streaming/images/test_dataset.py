"""Images and labels in folders, CSVs and tables; excluded files are counted and reported."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import ServiceError
from streaming.images.dataset import Dataset, read_dataset

JPEG = b"\xff\xd8\xff"  # the signature is enough


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG + name.encode())
    return folder


def labels_of(found: Dataset) -> dict[str, str | None]:
    return {Path(file.path).relative_to(found.source).as_posix(): file.label for file in found.files}


# --- folders


def test_class_is_the_parent_folder_of_the_file(tmp_path: Path) -> None:
    names = [
        "Pomme d\u2019api/1.jpg",
        "Pe\u0302che/a b.png",
        "v1.2/x.tar.gz",
        "deep/er/y",
        "loose.png",
        ".hidden/h.png",
    ]
    folder = make_files(tmp_path / "images [1]*", *names, "v1.2/.DS_Store")
    found = read_dataset(folder)
    assert labels_of(found) == {
        "Pomme d\u2019api/1.jpg": "Pomme d\u2019api",
        "Pe\u0302che/a b.png": "P\u00eache",  # normalised to NFC, for any system that named the folder
        "v1.2/x.tar.gz": "v1.2",
        "deep/er/y": "er",
    }
    assert found.dropped == {"it is not in a class folder": 1, "it is hidden or belongs to an operating system": 2}
    assert found.examples["it is not in a class folder"] == "loose.png"
    assert [file.bytes for file in found.files] == [(folder / one).stat().st_size for one in labels_of(found)]
    assert read_dataset(folder, labelled=False).n_images == 5


def test_special_files_and_unreadable_names_are_skipped(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "images", "a/1.png", "b/2.png")
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "nowhere.png").symlink_to(folder / "absent")
    Path(os.fsdecode(os.fsencode(folder) + b"/a/\xff.png")).write_bytes(b"x")
    found = read_dataset(folder)
    assert labels_of(found) == {"a/1.png": "a", "b/2.png": "b"}
    assert found.dropped == {"its name is not UTF-8": 1}
    assert str(found.as_summary()).encode()  # the example can be encoded, too


def test_class_imbalance_is_reported(tmp_path: Path) -> None:
    names = [*(f"many/{n}" for n in range(21)), "few/1", "few/2"]
    found = read_dataset(make_files(tmp_path, *names))
    assert found.class_counts == {"few": 2, "many": 21}
    assert found.warnings() == ["imbalanced classes: 21 images of many, 2 of few"]
    make_files(tmp_path, "few/3")
    assert read_dataset(tmp_path).warnings() == []


def test_excluded_files_are_counted_by_reason(tmp_path: Path) -> None:
    disk = make_files(tmp_path / "disk", "1.png", "2")
    names = ["a/1.jpeg", "a/notes.txt", "a/._1.jpeg", "a/Thumbs.db", "__MACOSX/a/1.jpeg", "labels.csv", "b.zip"]
    folder = make_files(tmp_path / "images", *names, "a/wrong.jpg", "a/b/deep.PNG")
    for name in ("a/notes.txt", "labels.csv", "b.zip"):
        (folder / name).write_bytes(b"no image")
    pq.write_table(pa.table({"features": [1.0]}), folder / "features.parquet")
    (folder / "c").symlink_to(disk)
    (folder / "a" / "up").symlink_to(folder)
    found = read_dataset(folder)
    below = ["a/1.jpeg", "a/wrong.jpg", "a/b/deep.PNG", "c/1.png", "c/2"]
    assert labels_of(found) == {name: Path(name).parent.name for name in below}
    assert found.dropped == {
        "it is hidden or belongs to an operating system": 3,
        "neither its name nor its first bytes are those of an image": 2,
        "it is an archive: unpack it": 1,
        "it is a table next to folders of images: give the file itself to train on it": 1,
    }
    assert found.notes == (
        "1 class folders are nested: a/b is class b; to use the outer folders, give --label-pattern '^([^/]+)/'",
    )
    with pytest.raises(ServiceError, match=r"b\.zip is an archive: unpack it and give the folder"):
        read_dataset(folder / "b.zip")


def test_split_folders_are_merged_and_hugging_face_metadata_is_read(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "train/a/1.png", "test/a/2.png", "train/b/3.png")
    found = read_dataset(folder)
    assert found.class_counts == {"a": 2, "b": 1}
    assert found.notes[0].startswith("test, train: treated as one data set")
    (folder / "train" / "metadata.csv").write_text("file_name,label\na/1.png,cat\nb/3.png,None\n")
    (folder / "test" / "metadata.jsonl").write_text('{"file_name": "a/2.png", "label": 7}\n')
    found = read_dataset(folder)
    assert found.class_counts == {"7": 1, "None": 1, "cat": 1}
    assert "using the labels in test/metadata.jsonl, train/metadata.csv" in found.notes
    assert any(line.startswith("'None' is treated as a class") for line in found.warnings())
    (folder / "train" / "metadata.csv").write_text("file_name,text\na/1.png,a photo of a cat\n")
    (folder / "test" / "metadata.jsonl").write_text("[1]\n")
    found = read_dataset(folder)
    assert found.class_counts == {"a": 2, "b": 1}
    assert sum("using the folders' names as labels" in note for note in found.notes) == 2


def test_hugging_face_parquet_file_has_its_class_names(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": f"{n}.jpg"} for n in range(4)]
    features = {"label": {"names": ["Pe\u0302che", "kiwi"], "_type": "ClassLabel"}}
    table = pa.table({"image": images, "label": [0, 1, -1, 0]})
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(described), tmp_path / "train-00000.parquet")
    found = read_dataset(tmp_path)
    assert found.class_counts == {"P\u00eache": 2, "kiwi": 1}
    assert found.dropped == {"the label is empty": 1}
    assert found.table is not None
    assert (found.table.image, found.table.class_of) == ("image.bytes", {"0": "P\u00eache", "1": "kiwi", "-1": ""})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "images is not a folder"),
        (["1.png"], "images: expected at least two classes, got no labelled images; .*not in a class folder"),
        (["a/1.png", "a/2.png"], r"images: expected at least two classes, got only one \(a\)"),
        ([".a/1.png"], "images contains no images: expected one folder of images per class"),
    ],
)
def test_folder_that_cannot_be_trained_on_is_reported(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        read_dataset(make_files(tmp_path / "images", *names))


# --- patterns


@pytest.mark.parametrize(
    "pattern", [r"^([^/]+?)(?:_\d+)?/[^/]+$", r"(?P<number>\d*)/?(?P<label>[A-Z][^/]*?)(_\d+)?/[^/]*$"]
)
def test_label_pattern_extracts_the_label_from_the_path(tmp_path: Path, pattern: str) -> None:
    folder = make_files(tmp_path, "Apple Red_12/1.jpg", "Apple Red_3/2.jpg", "Pe\u0302che/3.jpg", "x.jpg")
    found = read_dataset(folder, label_pattern=pattern)
    assert found.class_counts == {"Apple Red": 2, "P\u00eache": 1}
    assert found.dropped == {"its path does not match the label pattern": 1}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[a", "is not a regular expression"),
        ("cats", "has no group: expected one for the label"),
        (r"(a)\1", "look-around and back-references are not supported"),
        (r"(?=(a))", "look-around and back-references are not supported"),
        ("(a)" * 400, "has 1,200 characters: expected at most 1,000"),
        ("(b)", "got no labelled images"),
    ],
)
def test_invalid_label_pattern_is_rejected(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        read_dataset(make_files(tmp_path, "a/1"), label_pattern=pattern)


def test_label_pattern_is_matched_in_linear_time(tmp_path: Path) -> None:
    """Python's `re` would need years for these."""
    folder = make_files(tmp_path, f"{'x' * 200}/{'a' * 200}.png", "b/1")
    with pytest.raises(ServiceError, match="got no labelled images"):
        read_dataset(folder, label_pattern=r"(x+x+)+y|(a|aa)+$|^(\w*)*!$")


# --- CSVs


def test_csv_labels_files_by_path_name_or_stem(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "images", "a/1.png", "a/2.png", "b/2.png", "b/Pe\u0302che 3.png", "4.png", "5.png")
    csv = tmp_path / "labels.csv"
    lines = ["id;label", "a/1.png;cat", "images/a/2.png;dog", "2.png;bird", "P\u00eache 3;cat", "4.png;dog", "absent;x"]
    csv.write_text("\n".join([*lines, "5.png;"]))
    found = read_dataset(folder, labels_csv=csv)
    assert labels_of(found) == {"a/1.png": "cat", "a/2.png": "dog", "b/Pe\u0302che 3.png": "cat", "4.png": "dog"}
    assert found.dropped == {
        "the label is empty": 1,
        "its name in the CSV matches several files: give paths": 1,
        "a row of the CSV names an image that does not exist": 1,
        "the CSV has no usable row for it": 2,
    }
    assert found.examples["a row of the CSV names an image that does not exist"] == "absent"
    assert read_dataset(folder, labels_csv=csv, labelled=False).n_images == 6


@given(st.binary(max_size=300))
def test_arbitrary_csv_bytes_are_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = make_files(tmp_path_factory.getbasetemp() / "any", "a/1", "b/2")
    csv = folder.parent / "any.csv"
    csv.write_bytes(b"name,label\n1,cat\n2,dog\n" + data)
    with suppress(ServiceError):  # and no other error
        assert read_dataset(folder, labels_csv=csv).n_images == 2


def test_only_one_source_of_labels_is_accepted(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "images", "a/1", "b/2")
    with pytest.raises(ServiceError, match="either a pattern or a CSV"):
        read_dataset(folder, label_pattern="(a)", labels_csv=tmp_path / "x.csv")
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": ["a", "b"]}), table)
    with pytest.raises(ServiceError, match="is a table with its own labels"):
        read_dataset(table, label_pattern="(a)")


# --- tables (read on the workers: tests/streaming/images/test_featurize.py)


def test_folder_of_parquet_files_is_one_table_with_counted_labels(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "sub").mkdir(exist_ok=True)
        rows = {"content": [b"1", b"2", b"3"], "label": pa.array([number, 7, None]), "name": ["a", "b", "c"]}
        pq.write_table(pa.table(rows), tmp_path / "sub" / f"{number}.parquet")
    found = read_dataset(tmp_path)
    assert (found.kind, found.n_images, found.class_counts) == ("parquet", 4, {"0": 1, "1": 1, "7": 2})
    assert found.dropped == {"the label is empty": 2}
    assert found.table is not None
    assert (found.table.image, found.table.name) == ("content", None)  # names are not unique
    everything = read_dataset(tmp_path, labelled=False)
    assert (everything.n_images, everything.dropped) == (6, {})


def test_unusable_table_is_rejected_in_one_line(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(ServiceError, match=message) as error:
            read_dataset(tmp_path / name)
        assert "\n" not in str(error.value)

    (tmp_path / "text.parquet").write_bytes(b"no parquet at all")
    refused("text.parquet", "cannot be read as parquet")
    pq.write_table(pa.table({"image": ["path.png"], "label": ["a"]}), tmp_path / "paths.parquet")
    refused("paths.parquet", "has no column of encoded images: .*; got image string, label string")
    pq.write_table(pa.table({"image": [b"x"], "class": ["a"]}), tmp_path / "unlabelled.parquet")
    refused("unlabelled.parquet", "expected a column label, got image, class")
    write_deltalake(tmp_path / "delta", pa.table({"image": [b"x"], "label": ["a"]}))
    refused("delta", r"expected at least two classes, got only one \(a\)")
    (tmp_path / "delta" / "_delta_log" / "00000000000000000000.json").write_text("{")
    refused("delta", "cannot be read as delta")
    (tmp_path / "a [b]" / "_delta_log").mkdir(parents=True)
    refused("a [b]", "cannot be read from a path that contains")


def test_delta_table_is_read_at_its_current_version(tmp_path: Path) -> None:
    rows = {"image": [b"1", b"2", b"3", b"4"], "label": ["a", "b", "a", "b"]}
    write_deltalake(tmp_path / "t", pa.table(rows))
    write_deltalake(tmp_path / "t", pa.table({"image": [b"5"], "label": ["c"]}), mode="append")
    DeltaTable(tmp_path / "t").delete("label = 'b'")
    assert read_dataset(tmp_path / "t").class_counts == {"a": 2, "c": 1}
