"""Fitting on Spark: features with labels in, a projection and a classifier out, and what they are worth.

Data stays in the partitions. What reaches the driver is of the size of the model: sums of D² numbers, coefficients,
and a confusion matrix of C² counts.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.ml.classification import LogisticRegression as SparkLogisticRegression
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.classifier import LogisticRegression
from models.projection import PCA, GramSums, Projection, fit_pca
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.files import as_matrix, list_array

SUMS_DDL = "n long, total binary, gram binary"
SUMS_ON_DRIVER = 8


@dataclass(frozen=True)
class FitOptions:
    """How to fit."""

    explained_variance: float = 0.90
    holdout: float = 0.2  # the share of images, by hash of their id, that no model is ever fitted on
    max_iter: int = 100
    reg_param: float = 0.03
    elastic_net: float = 0.0
    seed: int = 42


@dataclass(frozen=True)
class Fitted:
    """A fitted projection and classifier, and what they were fitted on."""

    head: Head
    rows: int
    fingerprint: str


def fit(training: DataFrame, options: FitOptions) -> Fitted:
    """Fit PCA in one pass, then logistic regression on the projected rows.

    Args:
        training: columns image_id, label, features (array<float>); persisted by the caller.

    Raises:
        ServiceError: fewer than two classes.
    """
    classes = tuple(sorted(row.label for row in training.select("label").distinct().collect()))
    if len(classes) < 2:  # noqa: PLR2004
        raise ServiceError(f"training needs images of at least two classes, got {list(classes)}")
    projection = fit_pca(gram_sums(training), options.explained_variance)
    classifier = fit_logistic_regression(training, classes, projection, options)
    n, mixed = training.agg(F.count(F.lit(1)), F.bit_xor(F.xxhash64("image_id", "label"))).collect()[0]
    fingerprint = hashlib.sha256(f"{n}:{mixed}".encode()).hexdigest()
    return Fitted(Head(classes, projection, classifier), n, fingerprint)


def gram_sums(rows: DataFrame) -> GramSums:
    """Row count, sum and Gram matrix of the column `features`, added up per partition, then merged.

    Where there are many partitions their sums are merged on the workers first, so that the driver holds at most
    `SUMS_ON_DRIVER` of them at a time, of 8·D² bytes each.
    """

    def add_up(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sums: GramSums | None = None
        for batch in batches:
            if batch.num_rows:
                features = as_matrix(batch.column("features"))
                sums = sums or GramSums(features.shape[1])
                sums.add(features)
        yield from _sums_as_batches(sums)

    def merge(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from _sums_as_batches(_merged(batches))

    cores = rows.sparkSession.sparkContext.defaultParallelism
    parts = rows.select("features").coalesce(cores).mapInArrow(add_up, SUMS_DDL)
    if cores > SUMS_ON_DRIVER:
        parts = parts.repartition(SUMS_ON_DRIVER).mapInArrow(merge, SUMS_DDL)
    merged = _merged(parts.toArrow().to_batches())
    if merged is None:
        raise ServiceError("there are no features to fit on")
    return merged


def _sums_as_batches(sums: GramSums | None) -> Iterator[pa.RecordBatch]:
    if sums is not None:
        parts = {"n": [sums.n], "total": [sums.total.tobytes()], "gram": [sums.gram.tobytes()]}
        yield pa.RecordBatch.from_pydict(parts)


def _merged(batches: Iterable[pa.RecordBatch]) -> GramSums | None:
    merged: GramSums | None = None
    for batch in batches:
        for n, total, gram in zip(*batch.to_pydict().values(), strict=True):
            width = len(total) // 8
            merged = merged or GramSums(width)
            merged.merge(GramSums(width, n, np.frombuffer(total), np.frombuffer(gram).reshape(width, width)))
    return merged


def fit_logistic_regression(
    training: DataFrame, classes: tuple[str, ...], projection: Projection, options: FitOptions
) -> LogisticRegression:
    """Multinomial logistic regression by Spark ML, distributed, on the projected features."""
    rows = projected(training, projection, classes).withColumn("features", array_to_vector(F.col("projected")))
    rows = rows.select("features", "label").persist()
    try:
        estimator = SparkLogisticRegression(
            maxIter=options.max_iter,
            regParam=options.reg_param,
            elasticNetParam=options.elastic_net,
            family="multinomial",
        )
        model = estimator.fit(rows)
    finally:
        rows.unpersist()
    return LogisticRegression(model.coefficientMatrix.toArray(), model.interceptVector.toArray())


def projected(rows: DataFrame, projection: Projection, classes: tuple[str, ...]) -> DataFrame:
    """Rows (label, features) as (label: index in `classes`, projected: array<double>)."""

    def project(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                matrix = projection.transform(as_matrix(batch.column("features")))
                index = pc.index_in(batch.column("label"), pa.array(classes)).cast(pa.float64())
                wide = list_array(matrix).cast(pa.list_(pa.float64()))
                yield pa.RecordBatch.from_arrays([index, wide], ["label", "projected"])

    return rows.select("label", "features").mapInArrow(project, "label double, projected array<double>")


def variance_kept(projection: Projection) -> float | None:
    """The share of the variance that a PCA keeps; None for another projection."""
    if not isinstance(projection, PCA):
        return None
    return float(projection.explained_variance_ratio[: projection.n_out].sum())
