"""The split: a share of every class, and every image for good on its side."""

from hashlib import sha256

import pytest
from pyspark.sql import DataFrame, SparkSession

from streaming.images.split import Split, plan_split


def images(spark: SparkSession, of_class: dict[str, int]) -> DataFrame:
    rows = [
        (sha256(f"{label}{n}".encode()).hexdigest(), label) for label, count in of_class.items() for n in range(count)
    ]
    return spark.createDataFrame(rows, "image_id string, label string").repartition(4)


def held_out(split: Split, rows: DataFrame) -> dict[str, str]:
    return {row.image_id: row.label for row in split.sides(rows)[1].collect()}


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
def test_split_holds_out_the_share_of_every_class_exactly(spark: SparkSession, share: float) -> None:
    rows = images(spark, {"many": 400, "some": 50, "few": 3, "two": 2, "one": 1})
    split = plan_split(rows, share, 42)
    training, holdout = split.sides(rows)
    found = {row.label: row["count"] for row in holdout.groupBy("label").count().collect()}
    least = {"many": round(400 * share), "some": max(1, round(50 * share)), "two": 1}
    assert {label: found[label] for label in least} == least
    assert found["few"] in (1, 2)
    assert "one" not in found
    assert training.count() + holdout.count() == 456
    assert not {row.image_id for row in training.collect()} & set(held_out(split, rows))


def test_split_kept_holds_out_the_same_images_as_data_grows(spark: SparkSession) -> None:
    few, more = images(spark, {"a": 40, "b": 40}), images(spark, {"a": 400, "b": 90, "c": 50})
    first = plan_split(few, 0.2, 42)
    then = plan_split(more, 0.2, 42, first)
    before, after = held_out(first, few), held_out(then, more)
    common = {row.image_id for row in few.collect()}
    assert {image for image in after if image in common} == set(before)
    assert set(after.values()) == {"a", "b", "c"}


def test_split_follows_its_seed(spark: SparkSession) -> None:
    rows = images(spark, {"a": 60, "b": 60})
    assert held_out(plan_split(rows, 0.2, 1), rows) == held_out(plan_split(rows, 0.2, 1), rows)
    assert held_out(plan_split(rows, 0.2, 1), rows) != held_out(plan_split(rows, 0.2, 2), rows)


def test_an_image_of_a_class_without_threshold_is_trained_on(spark: SparkSession) -> None:
    rows = images(spark, {"a": 5, "b": 5})
    training, holdout = Split(42, {}).sides(rows)
    assert (training.count(), holdout.count()) == (10, 0)
