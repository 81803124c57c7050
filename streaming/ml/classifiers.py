"""`BundleScorer`: a registered model version as a Spark ML Transformer, on images or on features."""

# ruff: noqa: N802, N803, N815  Spark ML's way of naming
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Self

import pyarrow as pa
from pyspark.ml import Transformer
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param import TypeConverters
from pyspark.ml.param.shared import HasInputCol, HasLabelCol, HasPredictionCol, HasProbabilityCol
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import DoubleType, StringType, StructType

from models.bundle import MANIFEST, Bundle, parse_manifest, read_bundle
from models.scorer import check_golden, load_head, load_scorer
from streaming.errors import ConfigurationError
from streaming.images.ml_worker import RESULT_DDL, from_features, from_images
from streaming.images.model_cache import cached_model
from streaming.ml.columns import (
    FEATURES,
    IMAGES,
    as_floats,
    as_vector,
    check_input,
    check_outputs,
    column,
    computed,
    is_image,
)
from streaming.ml.params import FromImages, given, input_of, param
from streaming.ml.storage import StoredStage

LINEAGE_FILE = "bundle.json"
NO_FEATURES = "missing: the row has no features"


class BundleScorer(Transformer, HasInputCol, HasLabelCol, HasProbabilityCol, HasPredictionCol, FromImages, StoredStage):
    """Scores images or features with a model version, by the same code as the stream.

    | column           | in or out | type |
    |------------------|-----------|------|
    | `inputCol`       | in        | images (bytes, or Spark's image struct): the whole model; or features (vectors or
    |                  |           | arrays): projection and classifier alone |
    | `probabilityCol` | out       | vector, the probability of each of `classes` |
    | `predictionCol`  | out       | double, the index of the predicted class, as expected by Spark's evaluators |
    | `predictedLabelCol` | out    | string, the name of the predicted class |
    | `labelCol`       | -         | the true label, as in all Spark ML stages; not read |
    | `reasonCol`      | out       | string, optional: why a row has no prediction |

    A row without a prediction has nulls. Saving the stage includes the model. In earlier releases `labelCol` was the
    column of predicted names: if it is set and there is no such input column, it still is, with a FutureWarning.

    Example:
        BundleScorer(inputCol="image", bundle=".imagestream/models/bundles/0f3a…").transform(images)
    """

    bundle = param(
        "bundle",
        "directory of a bundle: HOME/models/bundles/SHA256, with the SHA-256 that 'imagestream models verify N' prints",
        TypeConverters.toString,
    )
    predictedLabelCol = param(
        "predictedLabelCol", "name of the column of predicted class names", TypeConverters.toString
    )

    def __init__(
        self,
        *,
        inputCol: str | None = None,
        bundle: str | None = None,
        probabilityCol: str | None = None,
        predictionCol: str | None = None,
        labelCol: str | None = None,
        predictedLabelCol: str | None = None,
        reasonCol: str | None = None,
        handleInvalid: str | None = None,
    ) -> None:
        named = given(locals())
        super().__init__()
        self._setDefault(probabilityCol="probability", predictionCol="prediction", predictedLabelCol="predictedLabel")
        self._held: tuple[str | None, Bundle] | None = None
        self._set(**named)

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Return the stage of a bundle in memory."""
        stage = cls()
        stage._held = (None, bundle)
        return stage

    def getPredictedLabelCol(self) -> str:
        """Return the name of the column of predicted class names."""
        return self.getOrDefault(self.predictedLabelCol)

    def _names_column(self, schema: StructType) -> str:
        if self.isSet(self.labelCol) and not self.isSet(self.predictedLabelCol):
            name = self.getLabelCol()
            if name not in schema.names:
                warnings.warn(
                    f"labelCol={name!r} as the column of predicted names is deprecated: set predictedLabelCol",
                    FutureWarning,
                    stacklevel=4,
                )
                return name
        return self.getPredictedLabelCol()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the probabilities."""
        return self._bundle().manifest.classes

    def transformSchema(self, schema: StructType) -> StructType:
        """Return the schema of the output of `transform`.

        Raises:
            ServiceError: the input column is missing or of another type, or an output column already exists.
        """
        stage, name = type(self).__name__, input_of(self)
        check_input(stage, schema, name, IMAGES, FEATURES)
        reason = self.getReasonCol()
        answer = self._names_column(schema)
        names = [self.getProbabilityCol(), self.getPredictionCol(), answer, *([reason] if reason else [])]
        check_outputs(stage, schema, names)
        result = StructType(list(schema.fields))
        for name, field in zip(names, (VectorUDT(), DoubleType(), StringType(), StringType()), strict=False):
            result.add(name, field)
        return result

    def _transform(self, dataset: DataFrame) -> DataFrame:
        self.transformSchema(dataset.schema)
        given_column, kind = column(input_of(self)), dataset.schema[input_of(self)].dataType
        bundle = self._bundle()
        if is_image(kind):
            scored = _score_images(dataset, bundle, given_column)
        else:
            scored = _score_features(dataset, bundle, as_floats(given_column, kind))
        names = F.array(*map(F.lit, bundle.manifest.classes))
        answered = partial(_answered, threshold=bundle.manifest.threshold)
        results: dict[str, Callable[[Column], Column]] = {
            self.getProbabilityCol(): as_vector,
            self.getPredictionCol(): lambda values: (answered(values) - 1).cast("double"),
            # Spark infers that `element_at` of constant names is never null.
            self._names_column(dataset.schema): lambda values: F.when(
                values.isNotNull(), F.element_at(names, answered(values))
            ),
        }
        return self._with_results(dataset, scored, results)

    def _bundle(self) -> Bundle:
        """Return the bundle that the Param names, verified when it is first read, or the one that was loaded."""
        wanted = self.getOrDefault(self.bundle) if self.isDefined(self.bundle) else None
        if self._held is None or self._held[0] != wanted:
            if wanted is None:
                raise ConfigurationError(
                    "BundleScorer needs a bundle: the directory of a model version, HOME/models/bundles/SHA256"
                )
            bundle = read_bundle(Path(wanted))
            check_golden(bundle, load_scorer(bundle))
            self._held = (wanted, bundle)
        return self._held[1]

    def to_files(self) -> Mapping[str, bytes]:
        bundle = self._bundle()
        wanted = self._held[0] if self._held else None
        lineage = {"bundle": wanted, "sha256": bundle.sha256}
        manifest = bundle.manifest.model_dump_json().encode()
        return {MANIFEST: manifest, LINEAGE_FILE: json.dumps(lineage).encode(), **bundle.files}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        stage = cls()
        lineage = json.loads(files[LINEAGE_FILE])
        parts = {name: content for name, content in files.items() if name not in {MANIFEST, LINEAGE_FILE}}
        stage._held = (lineage["bundle"], Bundle(parse_manifest(files[MANIFEST]), lineage["sha256"], parts))
        return stage


def _answered(values: Column, threshold: float | None) -> Column:
    """Return the 1-based index of the predicted class, as `models.classifier.answers_of` does."""
    if threshold is not None:
        second = F.get(values, F.lit(1)).cast("double") >= threshold
        return F.when(values.isNotNull(), F.when(second, F.lit(2)).otherwise(F.lit(1)))
    return F.array_position(values, F.array_max(values)).cast("int")


def _score_images(dataset: DataFrame, bundle: Bundle, images: Column) -> Column:
    broadcast = dataset.sparkSession.sparkContext.broadcast(bundle)
    sha256 = bundle.sha256

    def score(columns: Iterator[pa.Array]) -> Iterator[pa.Array]:
        scorer = cached_model("scorer", sha256, lambda: load_scorer(broadcast.value))
        return from_images(columns, scorer.engine, scorer.fitting, scorer.probabilities)

    return computed(score, images, RESULT_DDL)


def _score_features(dataset: DataFrame, bundle: Bundle, features: Column) -> Column:
    broadcast = dataset.sparkSession.sparkContext.broadcast(load_head(bundle))
    n_in = bundle.manifest.projection.n_in

    def score(columns: Iterator[pa.Array]) -> Iterator[pa.Array]:
        for values in from_features(columns, n_in, broadcast.value.probabilities):
            reasons = pa.array([None if one.is_valid else NO_FEATURES for one in values], pa.string())
            yield pa.StructArray.from_arrays([values, reasons], ["values", "reason"])

    return computed(score, features, RESULT_DDL)
