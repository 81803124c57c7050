"""What a version was possibly fitted on: recorded images, and those of bundles from before there was a record."""

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from models.arrays import write_npz
from models.bundle import FITTED_ON, Bundle, TrainingData
from models.fitted_on import BloomFilter, FittedOn
from models.xxhash64 import HASH_BITS, spark_xxhash64
from streaming.images.exposure import as_bytes, fitted_on
from streaming.images.fitted_on import gather, unseen_by
from streaming.tables import Table

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)
CLASSES = ("cat", "dog")


def hash_of(name: str, seed: int = 42) -> int:
    return int(spark_xxhash64([name.encode()], seed)[0] >> 64 - HASH_BITS)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "tables", "features")


def store(table: Table, rows: list[dict[str, Any]], version: int = 0) -> None:
    assert table.append(pa.Table.from_pylist(rows, schema=table.schema), "test", version)


def bundle(files: dict[str, bytes] | None = None, **data: Any) -> Bundle:
    """As much of a bundle as says what it was fitted on."""
    training = TrainingData(rows=10, holdout_rows=0, fingerprint="0" * 64, **data)
    manifest = SimpleNamespace(classes=CLASSES, training_data=training)
    return Bundle(cast("Any", manifest), sha256(repr(data).encode()).hexdigest(), files or {})


def seen(model: FittedOn, names: list[str]) -> set[str]:
    return {name for name, there in zip(names, model.contains([one.encode() for one in names]), strict=True) if there}


def test_what_is_recorded_is_read_and_no_table_asked(table: Table) -> None:
    own = BloomFilter.empty(2, 614)
    own.add([b"one"])
    record = {FITTED_ON: write_npz(FittedOn(own).to_arrays())}
    assert seen(fitted_on(bundle(record, holdout={"cat": 2**HASH_BITS}), table.directory.parent), ["one", "two"]) == {
        "one"
    }


def test_rows_are_gathered_on_the_workers_with_their_groups(spark: SparkSession) -> None:
    rows = [(f"image {n}", f"key {n}", f"group {n % 7}") for n in range(500)]
    frame = spark.createDataFrame(rows, "image_id string, known_as string, group_id string").repartition(7)
    training = frame.where("group_id < 'group 5'")
    model = FittedOn(gather(training, 614))
    assert seen(model, [f"group {n}" for n in range(7)]) == {f"group {n}" for n in range(5)}
    unseen = {row.image_id for row in unseen_by(frame, model).collect()}
    assert not unseen & {row.image_id for row in training.collect()}
    assert len(unseen) >= 0.95 * frame.where("group_id >= 'group 5'").count()
    # Without groups, and by the name under which it was known where its content was not stored.
    alone = FittedOn(gather(training.select("image_id"), 614))
    others = spark.createDataFrame([("new", "image 1"), ("other", "nobody")], "image_id string, known_as string")
    assert [row.image_id for row in unseen_by(others, alone).collect()] == ["other"]


# --- bundles from before there was a record


def test_an_older_version_was_fitted_on_all_that_its_thresholds_did_not_hold_out(table: Table) -> None:
    names = [sha256(b"%d" % n).hexdigest() for n in range(400)]
    labels = [CLASSES[n % 2] for n in range(400)]
    store(table, [{"image_id": name, "label_true": label} for name, label in zip(names, labels, strict=True)])
    thresholds = {"cat": int(0.25 * 2**HASH_BITS), "dog": int(0.5 * 2**HASH_BITS)}
    expected = {name for name, label in zip(names, labels, strict=True) if hash_of(name) >= thresholds[label]}
    found = seen(fitted_on(bundle(holdout=thresholds), table.directory.parent), names)
    assert expected <= found
    assert len(found - expected) <= 3  # false positives
    # A class that was too small for a threshold was fitted on as a whole, and so was everything without any.
    assert {name for name, label in zip(names, labels, strict=True) if label == "dog"} <= seen(
        fitted_on(bundle(holdout={"cat": 1}), table.directory.parent), names
    )
    assert seen(fitted_on(bundle(), table.directory.parent), names) == set(names)


def test_an_older_version_may_have_known_an_image_by_another_label_or_name(table: Table) -> None:
    """All of these are held out under their present label, and were fitted on under an earlier one."""
    by_class = {"cat": 0, "dog": 2**HASH_BITS}  # every cat was fitted on, no dog was
    store(
        table,
        [
            {"image_id": "came as a cat", "label_true": "cat", "published_at": NOW.replace(hour=1)},
            {"image_id": "came as a cat", "label_true": "dog", "published_at": NOW},
            {"image_id": "labelled a cat", "label_true": "dog"},
            {"image_id": "was stored before", "label_true": "cat"},
            {"image_id": "was stored before", "label_true": "dog", "content_sha256": "its content"},
            {"image_id": "another name", "label_true": "dog", "content_sha256": "its content"},
            {"image_id": "a dog", "label_true": "dog"},
            {"image_id": "an altered cat", "label_true": "cat", "augmentation": 1},
            {"image_id": "a bird", "label_true": "bird"},  # which the version does not know
            {"image_id": "unlabelled", "label_true": None},
        ],
    )
    given = [("labelled a cat", "cat", 1), ("labelled a cat", "dog", 2), ("unlabelled", "cat", 1)]
    rows = [
        {"image_id": image, "label": label, "labelled_at": NOW.replace(hour=hour), "by": "maria"}
        for image, label, hour in given
    ]
    store(Table(table.directory.parent, "labels"), rows)
    names = ["came as a cat", "labelled a cat", "was stored before", "its content", "a dog", "a bird", "unlabelled"]
    assert seen(fitted_on(bundle(holdout=by_class), table.directory.parent), names) == set(names) - {"a dog", "a bird"}


def test_an_older_version_without_any_stored_image_was_fitted_on_none_that_can_judge(table: Table) -> None:
    assert seen(fitted_on(bundle(), table.directory.parent), ["any"]) == set()


def test_nulls_are_no_name() -> None:
    assert as_bytes(pa.array(["é", None])) == ["é".encode(), b""]
