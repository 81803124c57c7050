"""The split: it depends on content and seed only, and classes on one side only are reported."""

from collections.abc import Sequence
from hashlib import sha256

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812

from models.xxhash64 import HASH_BITS, spark_xxhash64
from streaming.errors import ServiceError
from streaming.images.groups import chosen_groups, group_ids
from streaming.images.split import Sides, Split, check_sides


def images(spark: SparkSession, of_class: dict[str, int]) -> DataFrame:
    rows = [
        (sha256(f"{label}{n}".encode()).hexdigest(), label) for label, count in of_class.items() for n in range(count)
    ]
    return spark.createDataFrame(rows, "image_id string, label string").repartition(4)


def held_out(split: Split, rows: DataFrame) -> set[str]:
    return {row.image_id for row in split.sides(rows)[1].select("image_id").collect()}


def test_split_is_by_hash_and_partitions_all_images(spark: SparkSession) -> None:
    rows = images(spark, {"a": 300, "b": 200})
    split = Split(42, 0.3)
    ids = [row.image_id for row in rows.collect()]
    below = (spark_xxhash64([one.encode() for one in ids], 42) >> 64 - HASH_BITS) < 0.3 * 2**HASH_BITS
    assert held_out(split, rows) == {one for one, out in zip(ids, below, strict=True) if out}
    training, holdout = split.sides(rows)
    assert training.count() + holdout.count() == 500


@pytest.mark.parametrize("seed", [0, 42, 2**31, 2**40])
def test_numpy_hash_equals_spark_hash(spark: SparkSession, seed: int) -> None:
    texts = ["", "x", "κλειδί", "0123456789" * 9, sha256(b"1").hexdigest(), "k" * 33]
    frame = spark.createDataFrame([(one,) for one in texts], "text string")
    found = [row[0] for row in frame.select(F.xxhash64("text", F.lit(seed))).collect()]
    assert spark_xxhash64([one.encode() for one in texts], seed).astype("int64").tolist() == found


def test_corrected_labels_and_more_images_change_no_side(spark: SparkSession) -> None:
    few, more = images(spark, {"a": 40, "b": 40}), images(spark, {"a": 400, "b": 90, "c": 50})
    split = Split(42, 0.2)
    common = {row.image_id for row in few.collect()}
    assert held_out(split, more) & common == held_out(split, few)
    corrected = few.withColumn("label", F.lit("another"))
    assert held_out(split, corrected) == held_out(split, few)


def test_seed_determines_the_split_and_validation_is_disjoint_from_the_holdout(spark: SparkSession) -> None:
    rows = images(spark, {"a": 300, "b": 300})
    assert held_out(Split(1, 0.2), rows) != held_out(Split(2, 0.2), rows)
    sides = Sides.of(0.2, 0.5, 42)
    fit, validation = ({row.image_id for row in part.select("image_id").collect()} for part in sides.training(rows))
    assert not fit & validation
    assert not (fit | validation) & held_out(sides.holdout, rows)
    assert 0.4 < len(validation) / len(fit | validation) < 0.6


def test_images_of_a_group_are_on_one_side(spark: SparkSession) -> None:
    rows = images(spark, {"a": 200, "b": 200}).withColumn("group_id", F.substring("image_id", 1, 1))
    out = held_out(Split(42, 0.2, "source"), rows)
    assert len({one[0] for one in out} & {row.image_id[0] for row in rows.collect() if row.image_id not in out}) == 0
    assert out


# --- errors and warnings


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1e-9, r"no image is held out \(a \(5\), b \(4\)\): each image is with probability 1e-09, by its"),
        (0.999999999, r"at least two classes, got \[\] on the training side \(in all: a \(5\), b \(4\)\); add images"),
    ],
)
def test_empty_side_error_says_what_to_do(spark: SparkSession, share: float, message: str) -> None:
    with pytest.raises(ServiceError, match=message) as refused:
        check_sides(images(spark, {"a": 5, "b": 4}), Split(42, share))
    assert "give another --holdout or --seed" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_class_on_one_side_only_is_named_with_its_count(spark: SparkSession) -> None:
    rows = images(spark, {"a": 50, "b": 50, "c": 1, "d": 1, "e": 1})
    split = Split(10, 0.3)
    out = held_out(split, rows)
    alone = {name: sha256(f"{name}0".encode()).hexdigest() in out for name in "cde"}
    assert set(alone.values()) == {True, False}, "the seed should put some of them on each side"
    lines = check_sides(rows, split)
    fitted, unknown = (", ".join(f"{name} (1)" for name in "cde" if alone[name] is side) for side in (False, True))
    assert lines[0].startswith(f"no image is held out of: {fitted}; metrics do not cover these classes")
    assert lines[1].startswith(f"every image is held out of: {unknown}; the model cannot learn these classes")
    assert check_sides(images(spark, {"a": 50, "b": 50}), split) == []


# --- groups


def groups(group_by: str, sources: Sequence[str | None]) -> list[str]:
    ids, keys = ([f"{kind}{n}" for n in range(len(sources))] for kind in ("id", "key"))
    names = pa.array([f"name{n}" for n in range(len(sources))])
    given = pa.array([*(key.encode() for key in keys[:-1]), None])  # older rows have no key; their name was the key
    found: list[str] = group_ids(group_by, pa.array(ids), names, pa.array(sources, pa.string()), given).to_pylist()
    return found


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("source", ["cam1/a.png", "cam1/b.png", "other", "id3"]),
        ("key", ["key0", "key1", "key2", "name3"]),
        ("^(cam[0-9]+)/", ["cam1", "cam1", "id2", "id3"]),
        ("(?P<day>x)|(?P<group>b)", ["id0", "b", "id2", "id3"]),
    ],
)
def test_group_is_taken_from_the_source_or_the_key(group_by: str, expected: list[str]) -> None:
    assert groups(group_by, ["cam1/a.png", "cam1/b.png", "other", None]) == expected


def test_pattern_over_hostile_sources_takes_linear_time() -> None:
    """Java's and Python's regular expressions take 2^60 steps for this one."""
    assert groups("^((a+)+)$", ["a" * 60 + "!"] * 100) == [f"id{n}" for n in range(100)]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("sourc", "has no group: expected one for the group"),
        ("(cam", "is not a regular expression"),
        ("(a)(?=b)", "look-around and back-references are not supported"),
        ("(" + "a" * 1_000 + ")", "has 1,002 characters: expected at most 1,000"),
    ],
)
def test_invalid_grouping_is_rejected_in_one_line(given: str, why: str) -> None:
    with pytest.raises(
        ServiceError, match="--group-by: expected source, key, none, or a regular expression"
    ) as refused:
        chosen_groups(given, None)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_default_is_no_grouping() -> None:
    assert chosen_groups(None, None) is chosen_groups("none", None) is None
    assert chosen_groups("source", None) == "source"
