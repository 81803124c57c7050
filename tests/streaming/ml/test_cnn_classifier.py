"""A CNN trained on Spark's workers, as a Spark ML estimator."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.sql import DataFrame, SparkSession

from streaming.errors import ServiceError
from streaming.images.dataset import digit_images
from streaming.ml import DistributedCNNClassifier


@pytest.fixture(scope="module")
def digits(spark: SparkSession) -> DataFrame:
    """100 handwritten zeros and ones, bytes that are not an image, and an image without a label."""
    known = [(data, label) for _, label, data in digit_images(600) if label in ("0", "1")][:100]
    given = [*known, (b"no image", "0"), (known[0][0], None)]
    images, labels = zip(*given, strict=True)
    return spark.createDataFrame(pa.table({"image": images, "label": labels})).repartition(2).persist()


@pytest.mark.usefixtures("exports_here")
def test_cnn_pipeline_is_fitted_saved_and_loaded(digits: DataFrame, tmp_path: Path) -> None:
    network = DistributedCNNClassifier(
        inputCol="image", inputSize=32, workers=1, epochs=4, batchSize=16, learningRate=0.003, predictionCol="answer"
    )
    model = Pipeline(stages=[network]).fit(digits)
    model.save(str(tmp_path / "model"))
    scored = PipelineModel.load(str(tmp_path / "model")).transform(digits).where("label IS NOT NULL").collect()
    unreadable = [row for row in scored if bytes(row.image) == b"no image"]
    assert [row.answer for row in unreadable] == [None]
    answered = [row for row in scored if row.answer is not None]
    assert len(answered) == 100
    right = sum(row.predictedLabel == row.label for row in answered)
    assert right >= 90
    assert all(row.probability.sum() == pytest.approx(1, abs=1e-5) for row in answered)


def test_invalid_column_type_and_mode_are_rejected(digits: DataFrame) -> None:
    with pytest.raises(ServiceError, match="should contain encoded images, got string"):
        DistributedCNNClassifier(inputCol="label").fit(digits)
    with pytest.raises(ServiceError, match="mode should be one of"):
        DistributedCNNClassifier(inputCol="image", mode="sideways").fit(digits)
