"""The images that `train-cnn` trains on: each once, with the same label as in `train` and `retrain`."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession

from streaming.images.labels import given_labels, labelled_features
from streaming.storage.tables import FEATURES, LABELS, Table
from streaming.training.train_cnn import labels_of

NOW = datetime(2024, 5, 6, 12, tzinfo=UTC)


def test_train_cnn_uses_the_same_labels_as_evaluation(spark: SparkSession, tmp_path: Path) -> None:
    """`a` has two files; `b` is in two folders; `c` was corrected by its hash, `d` by the key of a message."""
    files = [
        ("a", "x/1.png", "cat"), ("a", "y/1.png", "cat"), ("b", "x/2.png", "cat"), ("b", "x/3.png", "dog"),
        ("c", "x/4.png", "cat"), ("d", "x/5.png", "cat"), ("e", "x/6.png", "dog"),
    ]  # fmt: skip
    table, labels = (Table(tmp_path / "tables", name) for name in ("features", "labels"))
    stored = [
        {"image_id": image, "content_sha256": image, "source": source, "label_true": label, "published_at": NOW}
        | {"backbone_sha256": "of the network", "features": [1.0]}
        for image, source, label in files
    ]
    streamed = {"image_id": "key", "content_sha256": "d", "backbone_sha256": "another", "features": [2.0]}
    assert table.append(pa.Table.from_pylist([*stored, streamed], schema=FEATURES), "test", 0)
    given = [{"image_id": image, "label": "bird", "labelled_at": NOW, "by": "maria"} for image in ("c", "key")]
    assert labels.append(pa.Table.from_pylist(given, schema=LABELS), "test", 0)

    images = spark.createDataFrame(files, "image_id string, source string, label string")
    trained = labels_of(images, given_labels(spark, table), "source").collect()
    assert {(row.image_id, row.source, row.label, row.group_id) for row in trained} == {
        ("a", "x/1.png", "cat", "x/1.png"),
        ("c", "x/4.png", "bird", "x/4.png"),
        ("d", "x/5.png", "bird", "x/5.png"),
        ("e", "x/6.png", "dog", "x/6.png"),
    }
    judged = labelled_features(spark, table, "of the network").collect()
    assert {(row.image_id, row.label) for row in judged} == {(row.image_id, row.label) for row in trained}
