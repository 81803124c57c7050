"""Projections as Spark ML Estimators: `ImagePCA` (by explained variance or k) and `SparseRandomProjection`."""

# ruff: noqa: N802, N803, N815  Spark ML's way of naming
import json
from collections.abc import Iterator, Mapping
from typing import Self

import pyarrow as pa
from pyspark.ml import Estimator, Model
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param import TypeConverters
from pyspark.ml.param.shared import HasInputCol, HasOutputCol, HasSeed
from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import StructType

from models.arrays import read_npz, write_npz
from models.bundle import PROJECTION
from models.projection import Projection, check_pca_memory, fit_pca, projection_from_arrays
from models.random_projection import johnson_lindenstrauss_dim, make_random_projection
from streaming.errors import ConfigurationError, DataError
from streaming.images.ml_worker import from_features
from streaming.ml.columns import FEATURES, as_floats, as_vector, check_input, check_outputs, column, computed
from streaming.ml.params import KeywordParams, given, input_of, param
from streaming.ml.storage import StoredStage
from streaming.training.accumulators import gram_sums

STAGE_FILE = "projection.json"


class _FeaturesToFeatures(HasInputCol, HasOutputCol, KeywordParams):
    """Base of stages from vectors or arrays of numbers to vectors; null stays null."""

    def transformSchema(self, schema: StructType) -> StructType:
        """Return the schema of the output of `transform`.

        Raises:
            ServiceError: the input column is missing or contains no features, or the output column already exists.
        """
        stage = type(self).__name__
        check_input(stage, schema, input_of(self), FEATURES)
        check_outputs(stage, schema, [self.getOutputCol()])
        return StructType(list(schema.fields)).add(self.getOutputCol(), VectorUDT())

    def _rows_to_fit(self, dataset: DataFrame) -> DataFrame:
        """Return the rows with features as the column `features` (array<float>)."""
        self.transformSchema(dataset.schema)
        name = input_of(self)
        rows = dataset.select(as_floats(column(name), dataset.schema[name].dataType).alias("features"))
        return rows.where(F.col("features").isNotNull())


class _ProjectionModel(Model, _FeaturesToFeatures, StoredStage):
    """Base of fitted projections."""

    def __init__(self, projection: Projection | None = None) -> None:
        super().__init__()
        self._projection = projection

    @property
    def projection(self) -> Projection:
        """The projection, whose `transform` maps (N, n_in) to (N, n_out).

        Raises:
            ServiceError: the model was created by its constructor, neither fitted nor loaded.
        """
        if self._projection is None:
            raise ConfigurationError(f"{type(self).__name__} has no projection: create it with fit() or load()")
        return self._projection

    def _transform(self, dataset: DataFrame) -> DataFrame:
        self.transformSchema(dataset.schema)
        name, n_in = input_of(self), self.projection.n_in
        broadcast = dataset.sparkSession.sparkContext.broadcast(self.projection)

        def project(features: Iterator[pa.Array]) -> Iterator[pa.Array]:
            return from_features(features, n_in, broadcast.value.transform)

        scratch = f"{self.uid}__computed"
        values = as_floats(column(name), dataset.schema[name].dataType)
        rows = dataset.withColumn(scratch, computed(project, values, "array<float>"))
        return rows.withColumn(self.getOutputCol(), as_vector(F.col(scratch))).drop(scratch)

    def to_files(self) -> Mapping[str, bytes]:
        facts = {"kind": self.projection.kind, "n_in": self.projection.n_in}
        return {STAGE_FILE: json.dumps(facts).encode(), PROJECTION: write_npz(self.projection.to_arrays())}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        facts = json.loads(files[STAGE_FILE])
        return cls(projection_from_arrays(facts["kind"], facts["n_in"], read_npz(files[PROJECTION], PROJECTION)))


class _PCAParams(_FeaturesToFeatures):
    explainedVariance = param(
        "explainedVariance",
        "fraction of the variance that the components must explain, above 0 and at most 1; ignored if k is set",
        TypeConverters.toFloat,
    )
    k = param("k", "number of components; determined by explainedVariance if not set", TypeConverters.toInt)

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(explainedVariance=0.9)

    def getK(self) -> int | None:
        """Return the number of components, or None."""
        return self.getOrDefault(self.k) if self.isDefined(self.k) else None


class ImagePCAModel(_ProjectionModel, _PCAParams):
    """A fitted PCA; `projection.explained_variance_ratio` is the curve over all components."""


class ImagePCA(Estimator[ImagePCAModel], _PCAParams, DefaultParamsReadable["ImagePCA"], DefaultParamsWritable):
    """Exact principal components from one pass over the data; see `models.projection`.

    Reads `inputCol` (vectors or arrays of D numbers; null rows are skipped) and writes `outputCol` (vectors of K
    numbers). The driver receives D² sums, regardless of the number of rows.

    Example:
        ImagePCA(inputCol="features", outputCol="pca", explainedVariance=0.9).fit(rows).transform(rows)
    """

    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        explainedVariance: float | None = None,
        k: int | None = None,
    ) -> None:
        named = given(locals())
        super().__init__()
        self._set(**named)

    def _fit(self, dataset: DataFrame) -> ImagePCAModel:
        rows = self._rows_to_fit(dataset)
        first = rows.first()
        if first is not None:
            check_pca_memory(len(first["features"]))  # fail here, not in a worker's traceback
        k = self.getK()
        pca = fit_pca(gram_sums(rows), None if k else self.getOrDefault(self.explainedVariance), k)
        return self._copyValues(ImagePCAModel(pca))


class _RandomParams(_FeaturesToFeatures, HasSeed):
    eps = param(
        "eps",
        "maximum relative distortion of squared distances, which determines the number of columns from that of the "
        "rows",
        TypeConverters.toFloat,
    )
    k = param("k", "number of columns; determined by eps if not set", TypeConverters.toInt)

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(eps=0.1, seed=0)

    def getK(self) -> int | None:
        """Return the number of columns, or None."""
        return self.getOrDefault(self.k) if self.isDefined(self.k) else None


class SparseRandomProjectionModel(_ProjectionModel, _RandomParams):
    """A sparse random projection of features of one width."""


class SparseRandomProjection(
    Estimator[SparseRandomProjectionModel],
    _RandomParams,
    DefaultParamsReadable["SparseRandomProjection"],
    DefaultParamsWritable,
):
    """Sparse random projection for features too wide for PCA; see `models.random_projection`.

    Reads `inputCol` (vectors or arrays of D numbers) and writes `outputCol` (vectors of K numbers). Only D and, without
    `k`, the number of rows are taken from the data. The same seed gives the same matrix.

    Example:
        SparseRandomProjection(inputCol="features", outputCol="projected", eps=0.1, seed=7).fit(rows)
    """

    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        eps: float | None = None,
        k: int | None = None,
        seed: int | None = None,
    ) -> None:
        named = given(locals())
        super().__init__()
        self._set(**named)

    def _fit(self, dataset: DataFrame) -> SparseRandomProjectionModel:
        rows = self._rows_to_fit(dataset)
        first = rows.first()
        if first is None:
            raise DataError("SparseRandomProjection: there are no rows with features")
        n_in, k = len(first["features"]), self.getK()
        if k is None:
            k = johnson_lindenstrauss_dim(rows.count(), self.getOrDefault(self.eps))
        return self._copyValues(SparseRandomProjectionModel(make_random_projection(n_in, k, self.getSeed())))
