"""Fitting a projection and a classifier on Spark, from labelled features.

Data stays in the partitions; only data of the size of the model reaches the driver: sums for PCA, coefficients,
weights.

Floating-point sums depend on their order, so the same rows give the same model only if they are added in the same
order. `in_order` ensures that for the features and `_projected` for the classifier, regardless of the input files and
partitions. Spark ML adds gradients with `treeAggregate` in the order in which tasks finish; with two sums at its last
level, as `_classifier_partitions` arranges, the order does not matter.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.ml.classification import LogisticRegression as SparkLogisticRegression
from pyspark.ml.classification import MultilayerPerceptronClassifier
from pyspark.ml.feature import StandardScaler
from pyspark.ml.functions import array_to_vector
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it
from pyspark.sql.types import ArrayType, DoubleType

from models.classifier import MLP, Classifier, LogisticRegression, mlp_from_spark
from models.projection import PCA, NoProjection, Projection, check_pca_memory, fit_pca
from models.random_projection import johnson_lindenstrauss_dim, make_random_projection
from models.randomized_pca import fit_randomized_pca
from models.scorer import Head
from streaming.errors import DataError, reported
from streaming.storage.files import as_matrix, list_array
from streaming.training.accumulators import gram_sums, range_sketch
from streaming.training.fit_options import FitOptions

BYTES_PER_PARTITION = 16 * 1024**2  # of features
CACHED_BYTES = 8 * 1024**2  # size of a batch of Spark's cache, whose default is 10,000 rows
# Spark's share of the heap, 0.6 by default, is for rows that it can also keep on disk. L-BFGS keeps 20 vectors of the
# size of the weights outside it: an MLP on 50,000 CIFAR-10 images ran out of 3 GB, and needs 2 GB with this share.
MEMORY_FOR_FITTING = {"spark.memory.fraction": "0.4"}
FEW_BYTES = 128 * 1024**2  # maximum size of projected features in two partitions
SKETCHED_COMPONENTS = 256  # components of a randomized PCA if their number is not given


@dataclass(frozen=True)
class Fitted:
    """A fitted projection and classifier, and the number and fingerprint of the rows they were fitted on."""

    head: Head
    rows: int
    fingerprint: str


def fit(training: DataFrame, options: FitOptions) -> Fitted:
    """Fit the projection, then the classifier on the projected rows.

    Args:
        training: columns image_id, label, features (array<float>); persisted by the caller, and in the order of
            `in_order` for a reproducible model.

    Raises:
        ServiceError: there are fewer than two classes.
        ModelError: the features are not finite, are constant, or do not suit the projection.
    """
    n, mixed, labels = training.agg(*_fingerprint_columns(), F.collect_set("label")).collect()[0]
    fingerprint, classes = _fingerprint(n, mixed), tuple(sorted(labels))
    if len(classes) < 2:  # noqa: PLR2004
        raise DataError(f"training needs images of at least two classes, got {list(classes)}")
    projection = fit_projection(training, n, options)
    classifier = fit_classifier(training, n, classes, projection, options)
    return Fitted(Head(classes, projection, classifier), n, fingerprint)


def fingerprint_of(rows: DataFrame) -> tuple[int, str]:
    """Return the number of rows and a hash of their images and labels, independent of their order."""
    n, mixed = rows.agg(*_fingerprint_columns()).collect()[0]
    return n, _fingerprint(n, mixed)


def _fingerprint_columns() -> tuple[Column, Column]:
    return F.count(F.lit(1)), F.bit_xor(F.xxhash64("image_id", "label"))


def _fingerprint(n: int, mixed: int | None) -> str:
    return hashlib.sha256(f"{n}:{mixed}".encode()).hexdigest()


def in_order(rows: DataFrame, n_features: int) -> DataFrame:
    """Return the rows partitioned and sorted in a way that depends only on the rows.

    Args:
        rows: columns image_id, features and, if an image_id is not unique, augmentation.
    """
    row_bytes = 4 * n_features
    partitions = max(2, math.ceil(rows.count() * row_bytes / BYTES_PER_PARTITION))
    cache_in_batches_of(rows, row_bytes)
    order = [name for name in ("image_id", "augmentation") if name in rows.columns]
    return rows.repartition(partitions, "image_id").sortWithinPartitions(*order)


def fit_projection(training: DataFrame, n: int, options: FitOptions) -> Projection:
    """Fit the projection in at most one pass over the rows' column features (array<float>)."""
    first = training.select(F.size("features")).first()
    width = int(first[0]) if first else 0
    k = options.n_components
    match options.projection:
        case "pca":
            check_pca_memory(width)
            return fit_pca(gram_sums(training), options.explained_variance, k)
        case "randomized_pca":
            # Twice the components plus 10, as Tropp et al. recommend, up to the maximum rank.
            size = max(1, min(2 * (k or SKETCHED_COMPONENTS) + 10, width, n - 1))
            check_pca_memory(width, size)
            return fit_randomized_pca(range_sketch(training, size, options.seed), options.explained_variance, k)
        case "random":
            return make_random_projection(width, k or johnson_lindenstrauss_dim(n, options.eps), options.seed)
        case "none":
            return NoProjection(width)


def fit_classifier(
    training: DataFrame, n: int, classes: tuple[str, ...], projection: Projection, options: FitOptions
) -> Classifier:
    """Fit the classifier on the projected features with Spark ML.

    Args:
        training: columns image_id, label, features (array<float>).
        classes: class names in the order of the outputs.
    """
    cache_in_batches_of(training, 8 * projection.n_out)
    rows = _projected(training, n, projection, classes).persist()
    try:
        if options.classifier == "mlp":
            return _fit_mlp(rows, (projection.n_out, *options.layers, len(classes)), options)
        return _fit_logistic_regression(rows, options)
    finally:
        rows.unpersist()


def _fit_logistic_regression(rows: DataFrame, options: FitOptions) -> LogisticRegression:
    estimator = SparkLogisticRegression(
        maxIter=options.max_iter, regParam=options.reg_param, elasticNetParam=options.elastic_net, family="multinomial"
    )
    model = estimator.fit(rows)
    return LogisticRegression(model.coefficientMatrix.toArray(), model.interceptVector.toArray())


def _fit_mlp(rows: DataFrame, layers: tuple[int, ...], options: FitOptions) -> MLP:
    """Fit Spark ML's MLP on standardised features, without which it converges poorly.

    The scaling x → (x − m) / s is folded into the first layer: (x − m) / s · W + b = x · (W / s) + (b − m / s · W).
    """
    scaler = StandardScaler(inputCol="features", outputCol="scaled", withMean=True, withStd=True).fit(rows)
    estimator = MultilayerPerceptronClassifier(
        layers=list(layers), maxIter=options.max_iter, blockSize=options.block_size, seed=options.seed
    )
    # Not persisted: Spark reads the rows once and persists its own blocks of them, 8 bytes per feature.
    scaled = scaler.transform(rows).select(F.col("scaled").alias("features"), "label")
    weights = estimator.fit(scaled).weights.toArray()
    mlp = mlp_from_spark(layers, weights)
    spread = scaler.std.toArray()
    scale = np.divide(
        1.0, spread, out=np.zeros_like(spread), where=spread > 0
    )  # a constant feature carries no information
    first = mlp.weights[0] * scale[:, None]
    bias = mlp.biases[0] - scaler.mean.toArray() @ first
    return MLP((first, *mlp.weights[1:]), (bias, *mlp.biases[1:]))


def _projected(rows: DataFrame, n: int, projection: Projection, classes: tuple[str, ...]) -> DataFrame:
    """Return rows (label: index in `classes`, features: vector) sorted by image_id."""

    def project(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                matrix = projection.transform(as_matrix(batch.column("features")))
                index = pc.index_in(batch.column("label"), pa.array(classes)).cast(pa.float64())
                wide = list_array(matrix).cast(pa.list_(pa.float64()))
                columns = [*(batch.column(name) for name in order), index, wide]
                yield pa.RecordBatch.from_arrays(columns, [*order, "label", "projected"])

    order = [name for name in ("image_id", "augmentation") if name in rows.columns]
    schema = rows.select(*order).schema.add("label", DoubleType()).add("projected", ArrayType(DoubleType()))
    projected = rows.select(*order, "label", "features").mapInArrow(reported(project), schema)
    partitions = _classifier_partitions(8 * n * projection.n_out)
    ordered = projected.repartition(partitions, "image_id").sortWithinPartitions(*order)
    return ordered.select(array_to_vector(F.col("projected")).alias("features"), "label")


def _classifier_partitions(projected_bytes: int) -> int:
    """Return two partitions, or eight, which `treeAggregate` (of depth 2) reduces to two: addition is commutative.

    Spark's RDD.treeAggregate uses scale = ceil(sqrt(8)) = 3, and hence 8 // 3 = 2 partitions at its second level.
    """
    return 2 if projected_bytes <= FEW_BYTES else 8


def cache_in_batches_of(rows: DataFrame, row_bytes: int) -> None:
    """Limit the size of the batches in Spark's cache: 10,000 wide rows, the default, may be gigabytes.

    Args:
        rows: any rows of the session; the limit is for those that it persists from now on.
        row_bytes: approximate size of a row.
    """
    batch = str(max(1, min(10_000, CACHED_BYTES // max(1, row_bytes))))
    rows.sparkSession.conf.set("spark.sql.inMemoryColumnarStorage.batchSize", batch)


def variance_kept(projection: Projection) -> float | None:
    """Return the fraction of the variance that a PCA explains; None for other projections."""
    if not isinstance(projection, PCA):
        return None
    return float(projection.explained_variance_ratio[: projection.n_out].sum())
