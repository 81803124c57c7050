"""The gate: what a candidate must show beside the champion, and that chance alone does not pass."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from scipy.stats import norm

from models.classifier import LogisticRegression
from models.projection import NoProjection
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.files import list_array
from streaming.training.fit_options import GateOptions
from streaming.training.gate import PairedCounts, Verdict, decide, lower_bound, paired_counts, refuse_costly_int8

EQUAL = PairedCounts(both=200, neither=50)


def counts(only_candidate: int, only_champion: int, rows: int = 1000) -> PairedCounts:
    rest = rows - only_candidate - only_champion
    return PairedCounts(rest - 20, only_candidate, only_champion, 20)


@pytest.mark.parametrize(
    ("found", "margin", "promoted"),
    [
        (counts(60, 20), 0.0, True),
        (counts(60, 20), 0.05, False),  # better by 4 points, not by 5
        (counts(20, 60), 0.0, False),
        (counts(6, 5), 0.0, False),  # chance
        (counts(1, 0), 0.0, False),
        (EQUAL, 0.0, False),
        (EQUAL, -0.01, True),
        (counts(6, 8), -0.02, True),  # no worse by more than two points
        (counts(6, 8), -0.005, False),
        (counts(0, 60), -0.02, False),
    ],
)
def test_a_candidate_is_promoted_only_as_far_as_the_bootstrap_supports_it(
    found: PairedCounts, margin: float, promoted: bool
) -> None:
    verdict = decide(found, GateOptions(margin=margin), seed=42)
    assert verdict.promote is promoted
    assert f"accuracy {found.gain:+.4f} on the same {found.rows:,} images" in verdict.why
    assert verdict == decide(found, GateOptions(margin=margin), seed=42)


def test_more_confidence_asks_for_more() -> None:
    found = counts(30, 17)
    assert decide(found, GateOptions(confidence=0.9), seed=1).promote
    assert not decide(found, GateOptions(confidence=0.99), seed=1).promote


def test_the_bound_is_that_of_the_normal_approximation_where_it_holds() -> None:
    found = counts(400, 300, rows=10_000)
    spread = np.sqrt(0.07 - 0.01**2) / np.sqrt(10_000)
    for confidence in (0.5, 0.9, 0.95):
        assert lower_bound(found, confidence, seed=3) == pytest.approx(0.01 - norm.ppf(confidence) * spread, abs=3e-4)


def test_two_models_that_are_equally_good_pass_as_seldom_as_the_confidence_says() -> None:
    generator = np.random.default_rng(0)
    passed = 0
    for seed in range(300):
        only_candidate = int(generator.binomial(80, 0.5))
        passed += decide(counts(only_candidate, 80 - only_candidate), GateOptions(), seed).promote
    assert 0 < passed / 300 < 0.1


def test_nothing_in_common_is_no_reason_to_promote() -> None:
    verdict = decide(PairedCounts(), GateOptions(margin=-0.9), seed=0)
    assert not verdict.promote
    assert "nothing was compared" in verdict.why


@pytest.mark.parametrize(("cost", "promoted"), [(None, True), (-0.02, True), (0.01, True), (0.0101, False)])
def test_int8_that_costs_more_than_a_point_is_refused_whatever_it_is_compared_with(
    cost: float | None, promoted: bool
) -> None:
    verdict = refuse_costly_int8(Verdict(True, "the first model"), cost)
    assert verdict.promote is promoted
    assert verdict.why.endswith("the first model")


@pytest.mark.parametrize("values", [{"margin": 1.0}, {"margin": -1.0}, {"confidence": 0.4}, {"confidence": 1.0}])
def test_limits_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ServiceError, match=r"got (-?1\.0|0\.4)"):
        GateOptions(**values)


# --- counting on the workers

CLASSES = ("a", "b", "c")


def answering(order: list[int], width: int = 3) -> Head:
    """A model that answers the class `order[i]` where feature i is the largest."""
    coefficients = np.zeros((3, width))
    coefficients[order, range(3)] = 1.0
    return Head(CLASSES, NoProjection(width), LogisticRegression(coefficients, np.zeros(3)))


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> Iterator[DataFrame]:
    """Thirty images, ten of each class; the largest feature is the class's, but for two of each."""
    truth = np.arange(30) % 3
    shown = np.where(np.arange(30) < 6, (truth + 1) % 3, truth)
    features = np.eye(3, dtype=np.float32)[shown]
    labels = [CLASSES[one] for one in truth]
    table = pa.table({"image_id": [f"{n}" for n in range(30)], "label": labels, "features": list_array(features)})
    frame = spark.createDataFrame(table).repartition(3).persist()
    yield frame
    frame.unpersist()


def test_answers_of_two_models_are_paired_by_image(rows: DataFrame) -> None:
    right, turned = answering([0, 1, 2]), answering([2, 0, 1])  # the second is right where the first is not
    assert paired_counts(right, rows, turned, rows) == PairedCounts(0, 24, 6, 0)
    assert paired_counts(right, rows, right, rows) == PairedCounts(24, 0, 0, 6)
    half = answering([0, 1, 1])
    assert paired_counts(half, rows, right, rows) == PairedCounts(16, 2, 8, 4)


def test_models_of_different_backbones_are_compared_where_both_have_features(
    spark: SparkSession, rows: DataFrame
) -> None:
    wide = spark.createDataFrame(
        pa.table({"image_id": ["7", "8", "99"], "label": ["x"] * 3, "features": list_array(np.eye(3, 5, dtype="f4"))})
    )
    found = paired_counts(answering([0, 1, 2]), rows, answering([1, 2, 0], width=5), wide)
    # 7 is of class b and 8 of class c; the other model says b and c. Labels are the candidate's.
    assert found == PairedCounts(2, 0, 0, 0)
