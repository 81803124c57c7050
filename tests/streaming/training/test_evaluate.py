"""Evaluation on Spark: the same metrics as from all rows at once, for any partitioning."""

from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from sklearn.datasets import load_digits

from models.arrays import Features
from models.classifier import LogisticRegression
from models.evaluation_sums import EvaluationSums
from models.projection import NoProjection
from models.scorer import Head
from streaming.storage.files import list_array
from streaming.training import evaluate as evaluate_module
from streaming.training.evaluate import evaluate, most_confident_mistakes, predict, sample_predictions

CLASSES = tuple("0123456789")
ROWS = 400


@pytest.fixture(scope="module")
def features() -> Features:
    """(400, 64) grey values 0..1 of handwritten digits."""
    return np.asarray(load_digits().data[:ROWS] / 16, np.float32)


@pytest.fixture(scope="module")
def labels() -> list[str]:
    """The labels; every hundredth image has one that the model does not know."""
    return ["unknown" if n % 100 == 7 else str(label) for n, label in enumerate(load_digits().target[:ROWS])]


@pytest.fixture(scope="module")
def rows(spark: SparkSession, features: Features, labels: list[str]) -> DataFrame:
    ids = [sha256(b"%d" % number).hexdigest() for number in range(ROWS)]
    sources = [f"photos/{number}.png" for number in range(ROWS)]
    columns = {"image_id": ids, "label": labels, "source": sources, "features": list_array(features)}
    return spark.createDataFrame(pa.table(columns)).repartition(4).persist()


@pytest.fixture(scope="module")
def head() -> Head:
    """A poor model, so that every kind of error occurs."""
    generator = np.random.default_rng(0)
    return Head(CLASSES, NoProjection(64), LogisticRegression(generator.normal(size=(10, 64)), np.zeros(10)))


@pytest.fixture(scope="module")
def answers(features: Features, labels: list[str], head: Head) -> list[tuple[str, str, str, float]]:
    """(image_id, label, predicted, confidence) of every row, without Spark."""
    probabilities = head.probabilities(features)
    return [
        (sha256(b"%d" % number).hexdigest(), label, CLASSES[row.argmax()], float(row.max()))
        for number, (label, row) in enumerate(zip(labels, probabilities, strict=True))
    ]


@pytest.mark.parametrize("on_driver", [8, 1], ids=["merged on the driver", "merged on the workers first"])
def test_evaluation_of_partitions_equals_that_of_all_rows(
    rows: DataFrame, features: Features, labels: list[str], head: Head, on_driver: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "SUMS_ON_DRIVER", on_driver)
    classes = (*CLASSES, "unknown")
    whole = EvaluationSums(classes, 10)
    whole.add(head.logits(features), np.array([classes.index(label) for label in labels]))
    found, expected = evaluate(rows, head), whole.result()
    assert found.classes == classes
    np.testing.assert_array_equal(found.confusion, expected.confusion)
    assert found.as_metrics() == pytest.approx(expected.as_metrics(), abs=1e-6)
    np.testing.assert_array_equal(found.support[-1:], [4])


def test_empty_evaluation_has_defined_metrics(rows: DataFrame, head: Head) -> None:
    found = evaluate(rows.where("false"), head)
    assert (found.rows, found.accuracy) == (0, 0.0)


def test_predictions_keep_the_other_columns(
    rows: DataFrame, head: Head, answers: list[tuple[str, str, str, float]]
) -> None:
    found = predict(rows.select("source", "features", "label", "image_id"), head).toArrow()
    assert found.column_names == ["source", "label", "image_id", "predicted", "confidence"]
    got = zip(*(found[name].to_pylist() for name in ("image_id", "label", "predicted")), strict=True)
    assert sorted(got) == sorted(answer[:3] for answer in answers)


def test_most_confident_mistakes_come_first(
    rows: DataFrame, head: Head, answers: list[tuple[str, str, str, float]]
) -> None:
    wrong = sorted((one for one in answers if one[1] != one[2]), key=lambda one: -one[3])
    found = most_confident_mistakes(rows, head, 12).to_pylist()
    assert [row["confidence"] for row in found] == pytest.approx([one[3] for one in wrong[:12]], abs=1e-6)
    assert all(row["predicted"] != row["label"] and row["source"].startswith("photos/") for row in found)


def test_sample_depends_on_the_seed_only(
    rows: DataFrame, head: Head, answers: list[tuple[str, str, str, float]]
) -> None:
    first, again, other = (
        sample_predictions(frame, head, 9, seed).to_pylist()
        for frame, seed in ((rows, 1), (rows.repartition(3, "label"), 1), (rows, 2))
    )
    assert [row["image_id"] for row in first] == [row["image_id"] for row in again]
    assert len({row["image_id"] for row in first}) == 9
    assert {row["image_id"] for row in first} != {row["image_id"] for row in other}
    expected = {one[0]: one[1:3] for one in answers}
    assert all(expected[row["image_id"]] == (row["label"], row["predicted"]) for row in first)
