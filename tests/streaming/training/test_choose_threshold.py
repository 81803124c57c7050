"""A threshold is chosen on images that the scoring model was not fitted on, and applied to every prediction."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from sklearn.metrics import f1_score

from models.arrays import Features
from models.classifier import LogisticRegression
from models.errors import ModelError
from models.paired import PairedCounts
from models.projection import NoProjection
from models.score_histogram import ScoreHistogram
from models.scorer import Head, load_scorer
from models.threshold import best_threshold
from models.threshold_aim import ThresholdAim
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, write_images
from streaming.ml.classifiers import _answered
from streaming.pipeline.score_columns import answer_columns
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.files import list_array
from streaming.training import choose_threshold
from streaming.training.choose_threshold import tuned_threshold, with_threshold
from streaming.training.evaluate import evaluate, predict
from streaming.training.fit import Fitted, fit
from streaming.training.fit_options import FitOptions
from streaming.training.gate import pair
from tests.conftest import imagestream

CLASSES = ("absent", "present")
OPTIONS = FitOptions(projection="none", threshold="f1", seed=3, max_iter=5)


def drawn(n: int, seed: int) -> tuple[Features, list[str]]:
    """(features, labels): one image in eight is `present`, with slightly different features."""
    generator = np.random.default_rng(seed)
    present = generator.random(n) < 1 / 8
    features = generator.normal(present[:, None] * [1.0, 0.7, 0.0, 0.0], 1.0)
    return features.astype(np.float32), [CLASSES[int(one)] for one in present]


def frame_of(spark: SparkSession, features: Features, labels: list[str]) -> DataFrame:
    ids = [sha256(one.tobytes()).hexdigest() for one in features]
    return spark.createDataFrame(pa.table({"image_id": ids, "label": labels, "features": list_array(features)}))


@pytest.fixture(scope="module")
def training(spark: SparkSession) -> Iterator[DataFrame]:
    rows = frame_of(spark, *drawn(800, 1)).repartition(2).persist()
    yield rows
    rows.unpersist()


@pytest.fixture(scope="module")
def fitted(training: DataFrame) -> Fitted:
    return with_threshold(fit(training, OPTIONS), training, OPTIONS)


@pytest.fixture(scope="module")
def head() -> Head:
    """Predicts `present` with the probability sigmoid(2 · first feature)."""
    coefficients = np.array([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    return Head(CLASSES, NoProjection(4), LogisticRegression(coefficients, np.zeros(2)))


def test_f1_threshold_finds_a_rare_class_more_often(fitted: Fitted) -> None:
    features, labels = drawn(4_000, 2)
    truth = np.array([CLASSES.index(one) for one in labels])
    probabilities = fitted.head.probabilities(features)
    assert fitted.head.threshold is not None
    tuned = f1_score(truth, fitted.head.answers(probabilities))
    default = f1_score(truth, replace(fitted.head, threshold=None).answers(probabilities))
    best = max(f1_score(truth, probabilities[:, 1] >= one) for one in np.linspace(0.02, 0.98, 97))
    assert tuned > default + 0.1
    assert tuned > best - 0.03


def test_threshold_is_deterministic(training: DataFrame, fitted: Fitted) -> None:
    assert with_threshold(fitted, training.repartition(5), OPTIONS).head.threshold == fitted.head.threshold


def test_augmented_copies_are_fitted_on_but_do_not_choose_the_threshold(
    training: DataFrame, fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def spy(scores: ScoreHistogram, aim: ThresholdAim) -> float:
        others, members = scores.of_class(1)
        seen.append((int(others.sum()), int(members.sum())))
        return best_threshold(scores, aim)

    monkeypatch.setattr(choose_threshold, "best_threshold", spy)
    rows = training.withColumn("augmentation", F.lit(None).cast("int"))
    copies = training.where("label = 'present'").withColumn("augmentation", F.lit(0))
    found = with_threshold(fitted, rows.union(copies), OPTIONS)
    present = training.where("label = 'present'").count()
    assert seen == [(800 - present, present)]
    # Fitted on twice as many of them, the model gives them higher probabilities.
    assert found.head.threshold > fitted.head.threshold  # type: ignore[operator]


def test_fixed_threshold_is_kept(training: DataFrame, fitted: Fitted) -> None:
    given = with_threshold(fitted, training, replace(OPTIONS, threshold="0.3"))
    assert given.head.threshold == 0.3
    assert with_threshold(given, training, replace(OPTIONS, threshold=None)) is given


def test_threshold_requires_two_classes_and_enough_images_of_both(
    spark: SparkSession, training: DataFrame, fitted: Fitted
) -> None:
    three = replace(fitted, head=replace(fitted.head, classes=("a", "b", "c")))
    with pytest.raises(ServiceError, match="requires two classes, got 3: omit --threshold"):
        with_threshold(three, training, OPTIONS)
    few = frame_of(spark, np.eye(4, dtype=np.float32), ["absent", "absent", "absent", "present"])
    with pytest.raises(ServiceError, match="got 3 of 'absent', 1 of 'present', .* another --seed or a fixed threshold"):
        with_threshold(fitted, few, OPTIONS)
    with pytest.raises(ModelError, match="f1, or cost:FP:FN .* got 'half'"):
        FitOptions(threshold="half")


def test_threshold_can_be_tuned_for_any_two_class_head(training: DataFrame, head: Head) -> None:
    high, low = (tuned_threshold(training, head, ThresholdAim(costs=costs)) for costs in ((10.0, 1.0), (1.0, 10.0)))
    assert low < high
    wide = replace(head, classes=("a", "b", "c"), classifier=LogisticRegression(np.eye(4)[:3], np.zeros(3)))
    with pytest.raises(ModelError, match="requires two classes, got 3"):
        tuned_threshold(training, wide, ThresholdAim())


def test_every_prediction_path_applies_the_threshold(spark: SparkSession, head: Head) -> None:
    strict = replace(head, threshold=0.9)
    features = np.zeros((4, 4), np.float32)
    features[:, 0] = [-1, 0.5, 1, 2]  # .12, .73, .88, .98 of `present`
    truth, strict_answers = ["absent", "present", "present", "present"], ["absent", "absent", "absent", "present"]
    probabilities = strict.probabilities(features)
    confidence = [1 - probabilities[0, 1], 1 - probabilities[1, 1], 1 - probabilities[2, 1], probabilities[3, 1]]

    label, sure, top, _ = answer_columns(probabilities, strict)  # in the stream and in rescoring
    assert label.to_pylist() == strict_answers
    np.testing.assert_allclose(sure.to_numpy(), confidence, rtol=1e-6)
    assert [row[0]["label"] for row in top.to_pylist()] == ["absent", "present", "present", "present"]

    rows = frame_of(spark, features, truth)
    predicted = {row.image_id: row for row in predict(rows, strict).collect()}
    ids = [row.image_id for row in rows.collect()]
    assert [predicted[one].predicted for one in ids] == strict_answers
    np.testing.assert_allclose([predicted[one].confidence for one in ids], confidence, rtol=1e-6)
    found = evaluate(rows, strict)
    assert found.confusion.tolist() == [[1, 0], [2, 1]]
    assert found.log_loss == evaluate(rows, head).log_loss  # the probabilities are unchanged
    assert pair(strict, rows, head, rows).counts == PairedCounts(2, 0, only_champion=2, neither=0)

    arrays = spark.createDataFrame([(one.tolist(),) for one in probabilities] + [(None,)], "p array<float>")
    position = [row[0] for row in arrays.select(_answered(F.col("p"), 0.9)).collect()]
    assert position == [*(1 + CLASSES.index(one) for one in strict_answers), None]


def test_mlp_on_pixels_is_registered_with_a_threshold(jars_dir: Path, exports: Path, tmp_path: Path) -> None:
    digits = [digit for digit in digit_images(700) if digit[1] in {"3", "8"}]
    write_images(tmp_path / "images", digits)
    settings = Settings(home=tmp_path / "home", jars=jars_dir, backbones=exports)
    settings.work_dir.mkdir()
    backbone = ("--backbone", "pixels", "--input-size", 14, "--projection", "none")
    fitting = ("--classifier", "mlp", "--layers", 8, "--max-iter", 12, "--threshold", 0.3)
    result = imagestream(settings, "train", "--images", tmp_path / "images", *backbone, *fitting)

    bundle = open_registry(settings.home).read(result["version"])
    entry = bundle.manifest.backbone
    assert (entry.name, entry.weights, entry.output, entry.n_features) == ("pixels", "none", "flat", 14 * 14 * 3)
    assert bundle.manifest.threshold == result["threshold"] == 0.3
    assert result["metrics"]["accuracy"] > 0.8
    scorer = load_scorer(bundle)
    decoded = scorer.decode([image for _, _, image in digits])
    probabilities = scorer.probabilities(scorer.features(decoded.images))
    is_eight = probabilities[:, 1].astype(np.float64) >= 0.3
    assert scorer.head.answers(probabilities).tolist() == is_eight.astype(int).tolist()
    assert np.mean(is_eight == np.array([label == "8" for _, label, _ in digits])) > 0.85
