"""The projections as Spark ML estimators, compared with NumPy and scikit-learn on the same rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import NaiveBayes
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder, TrainValidationSplit
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA as ReferencePCA  # noqa: N811

from models.arrays import Features
from models.errors import ModelError
from models.projection import PCA
from models.random_projection import johnson_lindenstrauss_dim, make_random_projection
from streaming.errors import ServiceError
from streaming.ml import ImagePCA, ImagePCAModel, SparseRandomProjection, SparseRandomProjectionModel
from streaming.storage.files import list_array

ROWS = 300


@pytest.fixture(scope="module")
def digits() -> Features:
    """(300, 64) grey values 0..1 of handwritten digits."""
    return (load_digits().data[:ROWS] / 16).astype(np.float32)


@pytest.fixture(scope="module")
def rows(spark: SparkSession, digits: Features) -> DataFrame:
    """id, label, and features as vectors and as arrays (`numbers`)."""
    labels = load_digits().target[:ROWS].astype(float)
    frame = spark.createDataFrame(pa.table({"id": range(ROWS), "label": labels, "numbers": list_array(digits)}))
    return frame.withColumn("features", array_to_vector("numbers")).coalesce(2).persist()


def matrix_of(rows: DataFrame, column: str) -> Features:
    found = rows.orderBy("id").select(vector_to_array(F.col(column), "float32").alias("values")).collect()
    return np.array([row["values"] for row in found], np.float32)


def test_pca_agrees_with_scikit_learn(rows: DataFrame, digits: Features) -> None:
    model = ImagePCA(inputCol="features", outputCol="pca", explainedVariance=0.9).fit(rows)
    reference = ReferencePCA(0.9).fit(digits.astype(np.float64))
    assert isinstance(model.projection, PCA)
    assert model.projection.n_out == reference.n_components_
    found = matrix_of(model.transform(rows), "pca")
    np.testing.assert_allclose(np.abs(found), np.abs(reference.transform(digits)), atol=1e-4)
    np.testing.assert_allclose(found, model.projection.transform(digits), atol=1e-6)


def test_vectors_and_arrays_are_equivalent_inputs(rows: DataFrame, digits: Features) -> None:
    """The other tests fit ImagePCA on vectors."""
    model = ImagePCA(inputCol="numbers", outputCol="pca", k=5).fit(rows)
    assert matrix_of(model.transform(rows), "pca").shape == (ROWS, 5)
    expected = make_random_projection(64, 20, seed=7).transform(digits)
    for column in ("features", "numbers"):
        narrow = SparseRandomProjection(inputCol=column, outputCol="random", k=20, seed=7).fit(rows)
        np.testing.assert_array_equal(matrix_of(narrow.transform(rows), "random"), expected)


def test_random_projection_width_follows_the_rows_and_eps(spark: SparkSession) -> None:
    wide = np.random.default_rng(0).random((40, 2_000), np.float32)
    rows = spark.createDataFrame(pa.table({"id": range(40), "features": list_array(wide)}))
    model = SparseRandomProjection(inputCol="features", outputCol="random", eps=0.3).fit(rows)
    assert model.projection.n_out == johnson_lindenstrauss_dim(40, 0.3)


def test_null_rows_are_excluded_from_the_fit_and_stay_null(rows: DataFrame) -> None:
    some = rows.withColumn("features", F.when(F.col("id") >= 40, F.col("features")))
    whole = ImagePCA(inputCol="features", outputCol="pca", k=3).fit(rows.where("id >= 40"))
    model = ImagePCA(inputCol="features", outputCol="pca", k=3).fit(some)
    np.testing.assert_allclose(model.projection.to_arrays()["mean"], whole.projection.to_arrays()["mean"], rtol=1e-6)
    found = model.transform(some)
    assert sorted(row["id"] for row in found.where("pca is null").collect()) == list(range(40))


def test_invalid_columns_or_options_are_rejected_in_one_line(spark: SparkSession, rows: DataFrame) -> None:
    with pytest.raises(ServiceError, match="ImagePCA: there is no column 'pixels': expected one of id, label"):
        ImagePCA(inputCol="pixels", outputCol="pca").fit(rows)
    with pytest.raises(ServiceError, match="column 'label' should contain features .* got double"):
        SparseRandomProjection(inputCol="label", outputCol="random").fit(rows)
    with pytest.raises(ServiceError, match="ImagePCAModel: the column 'label' already exists"):
        ImagePCA(inputCol="features", outputCol="other", k=2).fit(rows).setParams(outputCol="label").transform(rows)
    with pytest.raises(ServiceError, match="ImagePCAModel has no projection: create it with fit.. or load"):
        ImagePCAModel().setParams(inputCol="features").transform(rows)
    with pytest.raises(ServiceError, match="ImagePCA needs an inputCol"):
        ImagePCA(outputCol="pca").fit(rows)
    with pytest.raises(ModelError, match="k must be from 1 to"):
        ImagePCA(inputCol="features", outputCol="pca", k=65).fit(rows)
    with pytest.raises(ServiceError, match="no rows with features"):
        SparseRandomProjection(inputCol="features", outputCol="random").fit(rows.where("false"))
    too_wide = spark.range(1).select("id", F.array_repeat(F.lit(1.0), 62_720).alias("features"))
    with pytest.raises(ModelError, match="PCA of 62,720 features needs 31.5 GB"):
        ImagePCA(inputCol="features", outputCol="pca").fit(too_wide)


def test_models_and_estimators_are_saved_and_loaded(rows: DataFrame, tmp_path: Path) -> None:
    for estimator, loader in (
        (ImagePCA(inputCol="features", outputCol="out", explainedVariance=0.8), ImagePCAModel),
        (SparseRandomProjection(inputCol="features", outputCol="out", k=9, seed=3), SparseRandomProjectionModel),
    ):
        path = str(tmp_path / loader.__name__)
        estimator.save(f"{path}-estimator")
        again = type(estimator).load(f"{path}-estimator")
        assert again.explainParams() == estimator.explainParams()
        model = estimator.fit(rows)
        model.save(path)
        loaded = loader.load(path)
        assert loaded.uid == model.uid
        assert loaded.explainParams() == model.explainParams()
        np.testing.assert_array_equal(matrix_of(loaded.transform(rows), "out"), matrix_of(model.transform(rows), "out"))


def test_cross_validation_tunes_pca_with_a_spark_classifier(rows: DataFrame, tmp_path: Path) -> None:
    pca = ImagePCA(inputCol="features", outputCol="pca")
    pipeline = Pipeline(stages=[pca, NaiveBayes(featuresCol="pca", modelType="gaussian")])
    grid = ParamGridBuilder().addGrid(pca.k, [1, 12]).build()
    search = CrossValidator(
        estimator=pipeline,
        estimatorParamMaps=grid,
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        numFolds=2,
        seed=1,
        parallelism=2,
    )
    found = search.fit(rows.where("label < 3").select("label", "features"))
    assert found.avgMetrics[1] > 0.9 > found.avgMetrics[0]
    assert found.bestModel.stages[0].projection.n_out == 12
    found.save(str(tmp_path / "search"))
    best = CrossValidatorModel.load(str(tmp_path / "search")).bestModel
    assert isinstance(best, PipelineModel)
    assert best.stages[0].projection.n_out == 12


def test_train_validation_split_tunes_the_random_projection(rows: DataFrame) -> None:
    projection = SparseRandomProjection(inputCol="features", outputCol="random")
    search = TrainValidationSplit(
        estimator=Pipeline(stages=[projection, NaiveBayes(featuresCol="random", modelType="gaussian")]),
        estimatorParamMaps=ParamGridBuilder().addGrid(projection.k, [2, 40]).build(),
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        seed=1,
    )
    found = search.fit(rows.where("label < 3").select("label", "features"))
    assert found.validationMetrics[1] > found.validationMetrics[0]
    assert found.bestModel.stages[0].projection.n_out == 40
