"""Fitting on Spark, compared with NumPy, scikit-learn and Spark ML on the same rows."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.ml import Pipeline
from pyspark.ml.classification import LogisticRegression as SparkLogisticRegression
from pyspark.ml.classification import MultilayerPerceptronClassifier
from pyspark.ml.feature import PCA as SparkPCA  # noqa: N811
from pyspark.ml.feature import StandardScaler
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from sklearn.datasets import load_digits
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from models.arrays import Features
from models.classifier import LogisticRegression
from models.errors import ModelError
from models.projection import PCA, GramSums, NoProjection, fit_pca
from models.randomized_pca import RangeSketch
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.storage.files import as_matrix, list_array
from streaming.training import accumulators as sums_module
from streaming.training import fit as fit_module
from streaming.training.accumulators import gram_sums, range_sketch
from streaming.training.evaluate import evaluate
from streaming.training.fit import fingerprint_of, fit, fit_classifier, fit_projection, in_order, variance_kept
from streaming.training.fit_options import FitOptions

CLASSES = tuple("0123456789")
ROWS = 800


def frame_of(spark: SparkSession, features: Features, labels: list[str], ids: list[str] | None = None) -> DataFrame:
    """Rows (image_id, label, features) in four partitions."""
    ids = ids or [sha256(b"%d" % number).hexdigest() for number in range(len(labels))]
    table = pa.table({"image_id": ids, "label": labels, "features": list_array(features)})
    return spark.createDataFrame(table).repartition(4)


@pytest.fixture(scope="module")
def features() -> Features:
    """(800, 64) grey values 0..1 of handwritten digits."""
    return (load_digits().data[:ROWS] / 16).astype(np.float32)


@pytest.fixture(scope="module")
def labels() -> list[str]:
    return [str(label) for label in load_digits().target[:ROWS]]


@pytest.fixture(scope="module")
def rows(spark: SparkSession, features: Features, labels: list[str]) -> Iterator[DataFrame]:
    frame = frame_of(spark, features, labels).persist()
    yield frame
    frame.unpersist()


@pytest.fixture(scope="module")
def pca(features: Features) -> PCA:
    sums = GramSums(features.shape[1])
    sums.add(features)
    return fit_pca(sums, 0.9)


# --- sums


@pytest.mark.parametrize("piece_bytes", [2**24, 5000], ids=["one piece", "several pieces"])
def test_partition_sums_equal_the_sums_of_all_rows(
    rows: DataFrame, features: Features, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_module, "PIECE_BYTES", piece_bytes)
    wide = features.astype(np.float64)
    sums = gram_sums(rows)
    assert sums.n == ROWS
    centred = wide - wide.mean(axis=0)
    np.testing.assert_allclose(sums.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sums.scatter, centred.T @ centred, rtol=1e-11, atol=1e-9)


def test_empty_features_are_rejected(rows: DataFrame) -> None:
    with pytest.raises(ServiceError, match="there are no features to fit on"):
        gram_sums(rows.where("false"))


def test_features_of_different_widths_are_rejected() -> None:
    with pytest.raises(ServiceError, match="features of different widths: 2 rows hold 3 values, first 1"):
        as_matrix(pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32())))


# --- Spark ML


def test_pca_and_logistic_regression_agree_with_spark_ml(
    spark: SparkSession, rows: DataFrame, features: Features, labels: list[str], pca: PCA
) -> None:
    """Spark's PCA does not centre the rows, so they are centred first; the sign of a component is arbitrary."""
    vectors = rows.select(
        array_to_vector(F.col("features").cast("array<double>")).alias("raw"), F.col("label").cast("double"), "image_id"
    )
    stages = [
        StandardScaler(inputCol="raw", outputCol="centred", withMean=True, withStd=False),
        SparkPCA(inputCol="centred", outputCol="features", k=pca.n_out),
        SparkLogisticRegression(family="multinomial", regParam=0.03, maxIter=6),
    ]
    model = Pipeline(stages=stages).fit(vectors)
    _, spark_pca, spark_regression = model.stages
    columns = [vector_to_array(name).alias(name) for name in ("raw", "features", "probability")]
    answers = model.transform(vectors).select("prediction", *columns).toArrow()
    raw, projected, probability = (
        np.array(answers.column(name).to_pylist()) for name in ("raw", "features", "probability")
    )
    ours = pca.transform(raw.astype(np.float32))
    signs = np.sign(np.sum(ours * projected, axis=0))
    np.testing.assert_allclose(ours * signs, projected, atol=1e-5)
    np.testing.assert_allclose(pca.components.T * signs, spark_pca.pc.toArray(), atol=1e-5)
    kept = spark_pca.explainedVariance.toArray()
    np.testing.assert_allclose(pca.explained_variance_ratio[: pca.n_out], kept, atol=1e-6)

    coefficients = spark_regression.coefficientMatrix.toArray() * signs
    head = Head(CLASSES, pca, LogisticRegression(coefficients, spark_regression.interceptVector.toArray()))
    got = head.probabilities(raw.astype(np.float32))
    np.testing.assert_allclose(got, probability, atol=1e-5)
    np.testing.assert_array_equal(got.argmax(axis=1), answers.column("prediction").to_numpy())


def test_regression_equals_spark_ml_on_the_projected_rows(
    spark: SparkSession, rows: DataFrame, features: Features, labels: list[str], pca: PCA
) -> None:
    options = FitOptions(reg_param=0.1, elastic_net=0.5, max_iter=5)
    ours = fit_classifier(rows, ROWS, CLASSES, pca, options)
    assert isinstance(ours, LogisticRegression)
    projected = frame_of(spark, pca.transform(features), labels)
    vectors = projected.select(array_to_vector("features").alias("features"), F.col("label").cast("double"))
    theirs = SparkLogisticRegression(regParam=0.1, elasticNetParam=0.5, family="multinomial", maxIter=5).fit(vectors)
    np.testing.assert_allclose(ours.coefficients, theirs.coefficientMatrix.toArray(), atol=1e-4)
    np.testing.assert_allclose(ours.intercept, theirs.interceptVector.toArray(), atol=1e-4)
    assert (ours.coefficients == 0).any()  # from the L1 penalty


def test_mlp_equals_spark_ml_on_standardised_rows(
    spark: SparkSession, rows: DataFrame, features: Features, labels: list[str]
) -> None:
    """A constant column and columns of very different scales: the scaling is folded into the first layer."""
    scaled_features = features * np.geomspace(0.01, 100, 64, dtype=np.float32) + 3
    scaled_features[:, 0] = 7
    frame = frame_of(spark, scaled_features, labels)
    options = FitOptions(classifier="mlp", layers=(24, 16), max_iter=15)
    ours = fit_classifier(frame, ROWS, CLASSES, NoProjection(64), options)

    ordered = frame.repartition(2, "image_id").sortWithinPartitions("image_id")
    vectors = ordered.select(
        array_to_vector(F.col("features").cast("array<double>")).alias("raw"), F.col("label").cast("double")
    ).persist()
    scaler = StandardScaler(inputCol="raw", outputCol="features", withMean=True, withStd=True).fit(vectors)
    network = MultilayerPerceptronClassifier(layers=[64, 24, 16, 10], maxIter=15, seed=42)
    scaled = scaler.transform(vectors).select("raw", "features", "label").persist()
    model = network.fit(scaled)
    columns = [vector_to_array(name).alias(name) for name in ("raw", "probability")]
    answers = model.transform(scaled).select("label", *columns).toArrow()
    raw, probability = (np.array(answers.column(name).to_pylist()) for name in ("raw", "probability"))
    np.testing.assert_allclose(ours.probabilities(raw.astype(np.float32)), probability, atol=1e-5)
    assert np.mean(probability.argmax(axis=1) == answers.column("label").to_numpy()) > 0.8


# --- projections


def test_partition_sketches_equal_the_sketch_of_all_rows(
    rows: DataFrame, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_module, "PIECE_BYTES", 3000)
    ours = range_sketch(rows, 40, 7)
    whole = RangeSketch(64, 40, 7)
    whole.add(features)
    assert ours.n == ROWS
    assert ours.squares == pytest.approx(whole.squares, rel=1e-12)
    np.testing.assert_allclose(ours.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(ours.sketch, whole.sketch, rtol=1e-9, atol=1e-9)


def test_randomized_pca_approximates_exact_pca(rows: DataFrame, features: Features, pca: PCA) -> None:
    by_k = fit_projection(rows, ROWS, FitOptions(projection="randomized_pca", n_components=10))
    assert (by_k.kind, by_k.n_out) == ("pca", 10)
    exact, ours = pca.transform(features)[:, :10], by_k.transform(features)
    assert abs(np.var(ours, axis=0).sum() / np.var(exact, axis=0).sum() - 1) < 0.02
    by_share = fit_projection(rows, ROWS, FitOptions(projection="randomized_pca", explained_variance=0.9))
    assert by_share.n_out == pca.n_out
    few = rows.where("label = '3'").limit(20)  # fewer rows than sketch columns
    assert fit_projection(few, 20, FitOptions(projection="randomized_pca", n_components=15)).n_out == 15


def test_random_projection_width_follows_the_number_of_rows(spark: SparkSession) -> None:
    rows = frame_of(spark, np.zeros((4, 400), np.float32), ["a", "b"] * 2)
    options = FitOptions(projection="random", eps=0.9, seed=5)
    ours = fit_projection(rows, ROWS, options)
    assert ours.n_out == johnson_lindenstrauss_min_dim(ROWS, eps=0.9) == 165
    again = fit_projection(rows, ROWS, options)
    for name, array in ours.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], array)
    assert fit_projection(rows, ROWS, FitOptions(projection="random", n_components=20)).n_out == 20


def test_unsuitable_projection_is_rejected_before_any_job(spark: SparkSession) -> None:
    wide = frame_of(spark, np.zeros((4, 62_720), np.float32), ["a", "b"] * 2)
    with pytest.raises(ModelError, match=r"PCA of 62,720 features needs 31.5 GB .* use a sparse random projection"):
        fit_projection(wide, 4, FitOptions())
    narrow = frame_of(spark, np.zeros((4, 8), np.float32), ["a", "b"] * 2)
    with pytest.raises(ModelError, match="expected 1 to 8, got 1188; a larger eps"):
        fit_projection(narrow, 4, FitOptions(projection="random"))


def test_features_of_a_flat_backbone_are_fitted_in_little_memory(spark: SparkSession) -> None:
    generator = np.random.default_rng(0)
    labels = ["a", "b"] * 30
    wide = np.maximum(generator.normal(size=(60, 62_720)), 0).astype(np.float32)
    wide[::2, :2000] += 1.0
    rows = in_order(frame_of(spark, wide, labels), wide.shape[1]).persist()
    for options in (
        FitOptions(projection="random", eps=0.5, reg_param=0.1, max_iter=3),
        FitOptions(projection="randomized_pca", n_components=5, max_iter=3),
    ):
        assert evaluate(rows, fit(rows, options).head).accuracy > 0.9
    rows.unpersist()


# --- the whole fit


@pytest.mark.parametrize(
    ("options", "few_bytes"),
    [
        (FitOptions(max_iter=4), 0),
        (FitOptions(max_iter=4, classifier="mlp", layers=(16,), projection="randomized_pca", n_components=12), 2**27),
    ],
    ids=["PCA and regression, several partitions", "randomized PCA and MLP, few partitions"],
)
def test_fit_is_deterministic_for_any_partitioning(
    spark: SparkSession,
    features: Features,
    labels: list[str],
    options: FitOptions,
    few_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit_module, "FEW_BYTES", few_bytes)
    monkeypatch.setattr(fit_module, "BYTES_PER_PARTITION", 40_000)  # several partitions
    rows = frame_of(spark, features, labels)
    found = []
    for other in (rows, rows.orderBy(F.desc("image_id")).repartition(5)):
        ordered = in_order(other, features.shape[1]).persist()
        found.append(fit(ordered, options))
        ordered.unpersist()
    first, second = found
    assert first.fingerprint == second.fingerprint == fingerprint_of(rows)[1]
    for ours, theirs in (
        (first.head.projection.to_arrays(), second.head.projection.to_arrays()),
        (first.head.classifier.to_arrays(), second.head.classifier.to_arrays()),
    ):
        for name, array in ours.items():
            np.testing.assert_array_equal(theirs[name], array)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"projection": "umap"}, "projection should be pca or random or randomized_pca or none, got 'umap'"),
        ({"classifier": "forest"}, "classifier should be logistic_regression or mlp, got 'forest'"),
        ({"explained_variance": 1.1}, "explained variance should be above 0 and at most 1, got 1.1"),
        ({"n_components": 0}, "n components should be 1 or more, got 0"),
        ({"eps": 1.0}, "eps should be between 0 and 1, got 1.0"),
        ({"layers": (8, 0)}, r"layers should be at most 16 widths of 1 or more, got \(8, 0\)"),
        ({"max_iter": 0}, "max iter should be 1 or more, got 0"),
        ({"reg_param": -1.0}, "reg param should be 0 or more, got -1.0"),
        ({"elastic_net": 2.0}, "elastic net should be from 0 to 1, got 2.0"),
        ({"block_size": 0}, "block size should be 1 or more, got 0"),
        ({"holdout": 0.0}, "holdout should be between 0 and 1, got 0.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_options_outside_their_limits_are_rejected(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServiceError, match=reason):
        FitOptions(**values)


def test_options_are_recorded_as_plain_values() -> None:
    record = FitOptions(layers=(64, 32), n_components=None).as_record()
    assert record["layers"] == "64,32"
    assert "n_components" not in record
    assert FitOptions(n_components=7).as_record()["n_components"] == 7


def test_fit_learns_digits_with_the_pca_of_one_pass(rows: DataFrame, features: Features, pca: PCA) -> None:
    fitted = fit(rows, FitOptions(explained_variance=0.9, max_iter=10))
    assert fitted.head.classes == CLASSES
    assert fitted.rows == ROWS
    assert isinstance(fitted.head.projection, PCA)
    np.testing.assert_allclose(fitted.head.projection.components, pca.components, atol=1e-5)
    assert 0.9 <= (variance_kept(fitted.head.projection) or 0) < 0.92
    assert evaluate(rows, fitted.head).accuracy > 0.95


def test_fingerprint_depends_on_the_rows_but_not_on_their_order(rows: DataFrame) -> None:
    few = rows.where("label in ('0', '1')").limit(60).persist()
    fingerprint = fingerprint_of(few)
    assert fingerprint_of(few.orderBy("image_id").coalesce(1)) == fingerprint
    first = few.agg(F.min("image_id")).collect()[0][0]
    other_label = F.when(F.col("image_id") == first, F.lit("2")).otherwise(F.col("label"))
    assert fingerprint_of(few.withColumn("label", other_label))[1] != fingerprint[1]
    assert fingerprint_of(few.where(F.col("image_id") != first))[1] != fingerprint[1]
    few.unpersist()


def test_single_class_is_rejected(rows: DataFrame) -> None:
    with pytest.raises(ServiceError, match=r"images of at least two classes, got \['3'\]"):
        fit(rows.where("label = '3'"), FitOptions())


def test_non_finite_features_are_rejected(spark: SparkSession, features: Features) -> None:
    invalid = features[:20].copy()
    invalid[7, 7] = np.nan
    with pytest.raises(ModelError, match="finite features"):
        fit(frame_of(spark, invalid, ["a", "b"] * 10), FitOptions())
