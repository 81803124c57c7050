"""`BundleScorer`: predictions of a registered model for images and features, in a pipeline that is saved and loaded."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.ml import PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812

import streaming.ml
from models.backbone import ExportedBackbone
from models.errors import ModelError
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.ml import BundleScorer, DistributedCNNClassifier
from streaming.registry import open_registry
from streaming.storage.files import list_array
from tests.streaming.small_models import Digits, bundle_folder, fit_head, register_model, some_digits

N = 30


@pytest.fixture(scope="module")
def digits(exported: ExportedBackbone) -> Digits:
    return some_digits(exported, N)


@pytest.fixture(scope="module")
def head(digits: Digits) -> Head:
    return fit_head(digits.features, digits.labels)


@pytest.fixture(scope="module")
def bundle(exported: ExportedBackbone, head: Head, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    return bundle_folder(home, register_model(open_registry(home), exported, head, digits.images[:2]))


@pytest.fixture(scope="module")
def rows(spark: SparkSession, digits: Digits) -> DataFrame:
    table = pa.table({"id": range(N), "image": digits.images, "numbers": list_array(digits.features)})
    return spark.createDataFrame(table).withColumn("vector", array_to_vector("numbers")).persist()


@pytest.mark.parametrize("column", ["image", "numbers", "vector"])
def test_images_and_features_get_the_predictions_of_the_model(
    rows: DataFrame, bundle: Path, digits: Digits, head: Head, column: str
) -> None:
    scorer = BundleScorer(inputCol=column, bundle=str(bundle))
    found = scorer.transform(rows)
    assert found.schema == scorer.transformSchema(rows.schema)
    expected = head.probabilities(digits.features)
    values = vector_to_array("probability", "float32").alias("values")
    answers = found.orderBy("id").select(values, "prediction", "predictedLabel").collect()
    np.testing.assert_allclose([row["values"] for row in answers], expected, atol=1e-6)
    best = expected.argmax(axis=1)
    assert [int(row["prediction"]) for row in answers] == best.tolist()
    assert [row["predictedLabel"] for row in answers] == [head.classes[position] for position in best]
    assert scorer.classes == head.classes


def test_unreadable_row_has_no_prediction_and_a_reason(
    spark: SparkSession, rows: DataFrame, bundle: Path, digits: Digits
) -> None:
    images = spark.createDataFrame([(0, b"no image"), (1, None), (2, digits.images[0])], "id int, image binary")
    found = (
        BundleScorer(inputCol="image", bundle=str(bundle), reasonCol="why").transform(images).orderBy("id").collect()
    )
    assert [str(row["why"]).split(":")[0] for row in found] == ["not_an_image", "missing", "None"]
    assert [row["prediction"] is None for row in found] == [True, True, False]
    features = rows.limit(2).select("id", F.when(F.col("id") == 0, F.col("vector")).alias("vector"))
    scorer = BundleScorer(inputCol="vector", bundle=str(bundle), reasonCol="why", labelCol="answer")
    with pytest.warns(FutureWarning, match="set predictedLabelCol"):
        found = scorer.transform(features).orderBy("id").collect()
    assert [row["why"] for row in found] == [None, "missing: the row has no features"]
    assert [row["answer"] is None for row in found] == [False, True]


def test_spark_evaluator_accepts_predictions_and_saved_pipeline_contains_the_model(
    rows: DataFrame, bundle: Path, digits: Digits, head: Head, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    pipeline = PipelineModel([BundleScorer(inputCol="image", bundle=str(copy), probabilityCol="probability")])
    pipeline.save(str(tmp_path / "pipeline"))
    shutil.rmtree(copy)
    loaded = PipelineModel.load(str(tmp_path / "pipeline"))
    truth = F.array_position(
        F.array(*map(F.lit, head.classes)),
        F.element_at(F.array(*map(F.lit, digits.labels)), F.col("id").cast("int") + 1),
    )
    found = loaded.transform(rows).withColumn("label", (truth - 1).cast("double"))
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(found)
    expected = np.mean(np.array(head.classes)[head.probabilities(digits.features).argmax(axis=1)] == digits.labels)
    assert accuracy == pytest.approx(expected)
    assert accuracy > 0.8


def test_invalid_columns_or_bundle_are_rejected_in_one_line(rows: DataFrame, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="column 'id' should contain images .* or features .*, got bigint"):
        BundleScorer(inputCol="id", bundle=str(bundle)).transform(rows)
    with pytest.raises(ServiceError, match="BundleScorer needs a bundle"):
        BundleScorer(inputCol="image").transform(rows)
    with pytest.raises(ModelError, match=r"bundle .*nowhere (is refused|cannot be read)"):
        BundleScorer(inputCol="image", bundle=str(tmp_path / "nowhere")).transform(rows)
    with pytest.raises(ServiceError, match="the column 'numbers' already exists"):
        BundleScorer(inputCol="image", bundle=str(bundle), predictionCol="numbers").transform(rows)


def test_features_of_another_width_are_rejected_by_the_worker(spark: SparkSession, bundle: Path) -> None:
    narrow = spark.createDataFrame([([1.0, 2.0],)], "features array<double>")
    with pytest.raises(Exception, match="expected 1280 features per row, got 2"):
        BundleScorer(inputCol="features", bundle=str(bundle)).transform(narrow).collect()


def test_label_col_is_the_true_label_as_elsewhere_in_spark(rows: DataFrame, bundle: Path) -> None:
    scorer = BundleScorer(inputCol="vector", bundle=str(bundle), labelCol="id", predictedLabelCol="name")
    found = scorer.transform(rows)
    assert set(found.columns) == {*rows.columns, "probability", "prediction", "name"}
    assert (scorer.getLabelCol(), BundleScorer().getLabelCol()) == ("id", "label")


def test_every_stage_can_be_saved_and_loaded(spark: SparkSession, tmp_path: Path) -> None:
    stages = [getattr(streaming.ml, name) for name in streaming.ml.__all__]
    assert all(issubclass(stage, MLWritable) and issubclass(stage, MLReadable) for stage in stages)
    stage = DistributedCNNClassifier(inputCol="image", workers=3, epochs=2, learningRate=0.5)
    stage.save(str(tmp_path / "stage"))
    loaded = DistributedCNNClassifier.load(str(tmp_path / "stage"))
    assert loaded.extractParamMap() == stage.extractParamMap()
    assert loaded.uid == stage.uid
