"""`DistributedCNNClassifier`: a Spark ML Estimator that trains a CNN on Spark's workers."""

# ruff: noqa: N803, N815  Spark ML's way of naming
from pathlib import Path
from tempfile import TemporaryDirectory

from pyspark.ml import Estimator
from pyspark.ml.param import TypeConverters
from pyspark.ml.param.shared import HasInputCol, HasLabelCol, HasPredictionCol, HasProbabilityCol, HasSeed
from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import BinaryType, StringType

from models.cnn import build_network
from models.decode import BadImage, decode
from streaming.distributed.network import quiet_tensorflow
from streaming.distributed.options import TrainerOptions
from streaming.distributed.trainer import DistributedTrainer
from streaming.ml.classifiers import BundleScorer
from streaming.ml.columns import check_input
from streaming.ml.params import KeywordParams, given, input_of, param
from streaming.training.train_cnn import as_bundle

DEFAULTS = TrainerOptions()
GOLDEN_IMAGES = 4


class DistributedCNNClassifier(
    Estimator[BundleScorer],
    HasInputCol,
    HasLabelCol,
    HasProbabilityCol,
    HasPredictionCol,
    HasSeed,
    KeywordParams,
    DefaultParamsReadable["DistributedCNNClassifier"],
    DefaultParamsWritable,
):
    """Trains a CNN from images (encoded bytes) and labels (strings); its model is a `BundleScorer`.

    | column     | type |
    |------------|------|
    | `inputCol` | binary, encoded images; those that cannot be decoded are skipped |
    | `labelCol` | string, class names; rows without one are skipped |

    Example:
        DistributedCNNClassifier(inputCol="image", mode="synchronous", workers=4, epochs=20).fit(images)
    """

    architecture = param("architecture", "architecture: cnn_gray, cnn_color or a backbone", TypeConverters.toString)
    inputSize = param("inputSize", "side of the network's input in pixels", TypeConverters.toInt)
    mode = param("mode", "mode of combining updates: synchronous, asynchronous or hogwild", TypeConverters.toString)
    frequency = param("frequency", "interval of combining updates: batch or epoch", TypeConverters.toString)
    workers = param("workers", "number of parallel training tasks", TypeConverters.toInt)
    batchSize = param("batchSize", "number of images per step, over all workers", TypeConverters.toInt)
    epochs = param("epochs", "number of passes over the images", TypeConverters.toInt)
    learningRate = param("learningRate", "learning rate of the Adam optimizer", TypeConverters.toFloat)

    def __init__(
        self,
        *,
        inputCol: str | None = None,
        labelCol: str | None = None,
        probabilityCol: str | None = None,
        predictionCol: str | None = None,
        architecture: str | None = None,
        inputSize: int | None = None,
        mode: str | None = None,
        frequency: str | None = None,
        workers: int | None = None,
        batchSize: int | None = None,
        epochs: int | None = None,
        learningRate: float | None = None,
        seed: int | None = None,
    ) -> None:
        named = given(locals())
        super().__init__()
        self._setDefault(
            labelCol="label",
            architecture="cnn_gray",
            mode=str(DEFAULTS.mode),
            frequency=str(DEFAULTS.frequency),
            workers=DEFAULTS.workers,
            batchSize=DEFAULTS.batch_size,
            epochs=DEFAULTS.epochs,
            learningRate=DEFAULTS.learning_rate,
            seed=DEFAULTS.seed,
        )
        self._set(**named)

    def _fit(self, dataset: DataFrame) -> BundleScorer:
        rows = self._rows(dataset).persist()
        try:
            return self._train(rows)
        finally:
            rows.unpersist()

    def _rows(self, dataset: DataFrame) -> DataFrame:
        images, label, stage = input_of(self), self.getLabelCol(), type(self).__name__
        check_input(stage, dataset.schema, images, ("encoded images", BinaryType().__eq__))
        check_input(stage, dataset.schema, label, ("names of classes", StringType().__eq__))
        whole = dataset.where(F.col(label).isNotNull() & F.col(images).isNotNull())
        image_id = F.sha2(images, 256)
        return whole.select(
            image_id.alias("image_id"),
            F.col(label).alias("label"),
            F.lit(False).alias("validation"),
            F.concat_ws(":", image_id, F.monotonically_increasing_id()).alias("source"),  # unique even for duplicates
            F.col(images).alias("content"),
        )

    def _train(self, rows: DataFrame) -> BundleScorer:
        options = TrainerOptions(
            mode=self.getOrDefault(self.mode),  # type: ignore[arg-type]  # checked and converted there
            frequency=self.getOrDefault(self.frequency),  # type: ignore[arg-type]
            workers=self.getOrDefault(self.workers),
            batch_size=self.getOrDefault(self.batchSize),
            epochs=self.getOrDefault(self.epochs),
            learning_rate=self.getOrDefault(self.learningRate),
            seed=self.getSeed(),
        )
        architecture = self.getOrDefault(self.architecture)
        side = self.getOrDefault(self.inputSize) if self.isDefined(self.inputSize) else None
        size = None if side is None else (side, side)
        n_classes = rows.select("label").distinct().count()
        quiet_tensorflow()
        network = build_network(architecture, max(2, n_classes), input_size=size, seed=options.seed)
        trained = DistributedTrainer(network, options).fit(rows)
        few = [bytes(row.content) for row in rows.select("content").limit(4 * GOLDEN_IMAGES).collect()]
        golden = [data for data in few if not isinstance(decode(data, (1, 1)), BadImage)][:GOLDEN_IMAGES]
        with TemporaryDirectory(prefix="imagestream-") as scratch:
            scorer = BundleScorer.of(as_bundle(architecture, size, trained, golden, Path(scratch)))
        columns = ("probabilityCol", "predictionCol")
        named = {name: self.getOrDefault(name) for name in columns if self.isSet(name)}
        return scorer.setParams(inputCol=input_of(self), **named)
