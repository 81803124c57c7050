"""The images that a version may have been fitted on: as recorded, or inferred for older bundles without a record."""

from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from models.arrays import write_npz
from models.backbone import ExportedBackbone
from models.bloom_filter import BloomFilter, FittedOn
from models.bundle import FITTED_ON, Bundle, TrainingData
from models.xxhash64 import HASH_BITS, spark_xxhash64
from streaming.images.membership import TrainingMembership, as_bytes, backbone_fitted_on, fitted_on
from streaming.images.membership_spark import gather, unseen_by
from streaming.registry import open_registry
from streaming.storage.home import Home
from streaming.storage.tables import Table
from tests.homes import local_home
from tests.streaming.small_models import TRAINING_DATA, fit_head, register_model, seen_images, some_digits

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)
CLASSES = ("cat", "dog")


def hash_of(name: str, seed: int = 42) -> int:
    return int(spark_xxhash64([name.encode()], seed)[0] >> 64 - HASH_BITS)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "tables", "features")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return local_home(tmp_path)


def store(table: Table, rows: list[dict[str, Any]], version: int = 0) -> None:
    assert table.append(pa.Table.from_pylist(rows, schema=table.schema), "test", version)


def bundle(files: dict[str, bytes] | None = None, **data: Any) -> Bundle:
    """A bundle with only the parts that determine its training images."""
    training = TrainingData(rows=10, holdout_rows=0, fingerprint="0" * 64, **data)
    manifest = SimpleNamespace(classes=CLASSES, training_data=training)
    return Bundle(cast("Any", manifest), sha256(repr(data).encode()).hexdigest(), files or {})


def seen(model: FittedOn, names: list[str]) -> set[str]:
    return {name for name, there in zip(names, model.contains([one.encode() for one in names]), strict=True) if there}


def test_recorded_training_images_are_read_without_the_tables(table: Table, home: Home) -> None:
    own = BloomFilter.empty(2, 614)
    own.add([b"one"])
    record = {FITTED_ON: write_npz(FittedOn(own).to_arrays())}
    assert seen(fitted_on(bundle(record, holdout={"cat": 2**HASH_BITS}), home), ["one", "two"]) == {"one"}


def test_training_images_are_gathered_on_the_workers_with_their_groups(spark: SparkSession) -> None:
    rows = [(f"image {n}", f"key {n}", f"group {n % 7}") for n in range(500)]
    frame = spark.createDataFrame(rows, "image_id string, known_as string, group_id string").repartition(7)
    training = frame.where("group_id < 'group 5'")
    model = FittedOn(gather(training, 614))
    assert seen(model, [f"group {n}" for n in range(7)]) == {f"group {n}" for n in range(5)}
    unseen = {row.image_id for row in unseen_by(frame, model).collect()}
    assert not unseen & {row.image_id for row in training.collect()}
    assert len(unseen) >= 0.95 * frame.where("group_id >= 'group 5'").count()
    # Without groups, and by its earlier name if the content hash was not stored.
    alone = FittedOn(gather(training.select("image_id"), 614))
    others = spark.createDataFrame([("new", "image 1"), ("other", "unknown")], "image_id string, known_as string")
    assert [row.image_id for row in unseen_by(others, alone).collect()] == ["other"]


# --- older bundles without a record


def test_older_version_was_fitted_on_all_images_not_held_out_by_its_thresholds(table: Table, home: Home) -> None:
    names = [sha256(b"%d" % n).hexdigest() for n in range(400)]
    labels = [CLASSES[n % 2] for n in range(400)]
    store(table, [{"image_id": name, "label_true": label} for name, label in zip(names, labels, strict=True)])
    thresholds = {"cat": int(0.25 * 2**HASH_BITS), "dog": int(0.5 * 2**HASH_BITS)}
    expected = {name for name, label in zip(names, labels, strict=True) if hash_of(name) >= thresholds[label]}
    found = seen(fitted_on(bundle(holdout=thresholds), home), names)
    assert expected <= found
    assert len(found - expected) <= 3  # false positives
    # All images of a class without a threshold were fitted on, and all images of a version without thresholds.
    assert {name for name, label in zip(names, labels, strict=True) if label == "dog"} <= seen(
        fitted_on(bundle(holdout={"cat": 1}), home), names
    )
    assert seen(fitted_on(bundle(), home), names) == set(names)


def test_older_version_may_have_been_fitted_on_earlier_labels_or_names(table: Table, home: Home) -> None:
    """The current labels put all of these in the holdout; with earlier labels they were fitted on."""
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
            {"image_id": "a bird", "label_true": "bird"},  # a class unknown to the version
            {"image_id": "unlabelled", "label_true": None},
        ],
    )
    given = [("labelled a cat", "cat", 1), ("labelled a cat", "dog", 2), ("unlabelled", "cat", 1)]
    rows = [
        {"image_id": image, "label": label, "labelled_at": NOW.replace(hour=hour), "by": "maria"}
        for image, label, hour in given
    ]
    store(Table(table.tables, "labels"), rows)
    names = ["came as a cat", "labelled a cat", "was stored before", "its content", "a dog", "a bird", "unlabelled"]
    assert seen(fitted_on(bundle(holdout=by_class), home), names) == set(names) - {"a dog", "a bird"}


def test_older_version_without_stored_images_was_fitted_on_none(table: Table, home: Home) -> None:
    assert seen(fitted_on(bundle(), home), ["any"]) == set()


# --- backbones trained by `train-cnn`


def test_training_images_of_a_backbone_are_kept_for_every_head_fitted_on_it(
    exported: ExportedBackbone, tmp_path: Path
) -> None:
    digits = some_digits(exported, 40)
    head, registry = fit_head(digits.features, digits.labels), open_registry(tmp_path)
    names = [sha256(image).hexdigest() for image in digits.images[:3]]
    of_cnn, of_head = (seen_images([image]).images for image in digits.images[:2])
    trained = replace(exported, weights="trained")

    def register(backbone: ExportedBackbone, model: FittedOn | None) -> Bundle:
        return registry.read(register_model(registry, backbone, head, digits.images[:2], seen=model))

    def found(bundle: Bundle) -> set[str] | None:
        images = backbone_fitted_on(registry, bundle, local_home(tmp_path))
        return None if images is None else seen(FittedOn(images), names)

    cnn = register(trained, FittedOn(of_cnn))
    assert found(cnn) == {names[0]}
    retrained = register(trained, FittedOn(of_head, of_cnn))
    assert found(retrained) == {names[0]}
    assert seen(fitted_on(retrained, local_home(tmp_path)), names) == set(names[:2])
    older = register(trained, None)  # retrained on the same network, without a record
    assert found(older) == {names[0]}
    assert found(register(exported, FittedOn(of_head))) is None  # weights from elsewhere


# --- batched membership


def test_membership_is_by_content_name_or_group(exported: ExportedBackbone, tmp_path: Path) -> None:
    digits = some_digits(exported, 40)
    head, registry = fit_head(digits.features, digits.labels), open_registry(tmp_path)
    images = BloomFilter.empty(3, 614)
    images.add([b"content", b"name", b"cam1"])
    grouped = TRAINING_DATA.model_copy(update={"group_by": "^(cam[0-9])/"})
    for data in (TRAINING_DATA, grouped):
        register_model(registry, exported, head, digits.images[:2], data, FittedOn(images))
    rows = pa.RecordBatch.from_pydict({
        "image_id": ["content", "other", "other", "other"],
        "known_as": ["other", "name", "other", "other"],
        "source": pa.array(["x", None, "cam1/x", "cam2/x"]),
        "key": pa.array([None, b"key", b"key", b"key"]),
    })  # fmt: skip
    membership = TrainingMembership(registry, local_home(tmp_path))
    assert membership.contains(registry.read(1).sha256, rows).tolist() == [True, True, False, False]
    assert membership.contains(registry.read(2).sha256, rows).tolist() == [True, True, True, False]
    for unknown in (None, "0" * 64):
        assert membership.contains(unknown, rows).all()


def test_null_name_becomes_empty_bytes() -> None:
    assert as_bytes(pa.array(["é", None])) == ["é".encode(), b""]
