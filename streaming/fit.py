"""Fitting on Spark: features with labels in, a projection and a classifier out, and what they are worth.

Data stays in the partitions. What reaches the driver is of the size of the model: sums of D² numbers, coefficients,
and a confusion matrix of C² counts.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.ml.classification import LogisticRegression as SparkLogisticRegression
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.arrays import Features
from models.classifier import LogisticRegression
from models.projection import PCA, GramSums, Projection, fit_pca
from models.scorer import Head
from streaming.errors import ServiceError
from streaming.files import list_array
from streaming.tables import FEATURES, Table, spark_schema

HOLDOUT_BUCKETS = 1_000
SUMS_DDL = "n long, total binary, gram binary"
SUMS_ON_DRIVER = 8
BYTES_PER_PARTITION = 32 * 1024**2  # of compressed features
PROBABILITY_FLOOR = 1e-15  # as scikit-learn's log_loss clips


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
class Evaluation:
    """How a model did on rows that it was not fitted on.

    Attributes:
        classes: (C) names.
        confusion: (C, C) counts, rows true and columns predicted.
        log_loss: mean negative log of the true class's probability, in nats.
    """

    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    log_loss: float

    @property
    def rows(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / max(1, self.rows))

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that occur of 2·true positives / (predicted + true)."""
        both = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * np.diag(self.confusion)[both > 0] / both[both > 0])) if both.any() else 0.0

    def as_metrics(self) -> dict[str, float]:
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "log_loss": self.log_loss,
            "holdout_rows": float(self.rows),
        }


@dataclass(frozen=True)
class Fitted:
    """A fitted projection and classifier, and what they were fitted on."""

    head: Head
    rows: int
    fingerprint: str


def split(rows: DataFrame, options: FitOptions) -> tuple[DataFrame, DataFrame]:
    """(training rows, holdout rows). An image's side depends on its id and the seed alone, so that it never changes
    side as data grows, and equal images never straddle."""
    bucket = F.pmod(F.xxhash64("image_id", F.lit(options.seed)), F.lit(HOLDOUT_BUCKETS))
    held_out = bucket < round(options.holdout * HOLDOUT_BUCKETS)
    return rows.where(~held_out), rows.where(held_out)


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


def evaluate(rows: DataFrame, head: Head) -> Evaluation:
    """Score rows (label, features) by the same NumPy code that the stream runs, and count.

    A row whose label the model does not know counts as an error, with the least probability there is.
    """
    known = sorted(set(head.classes) | {row.label for row in rows.select("label").distinct().collect()})

    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                features = as_matrix(batch.column("features"))
                yield _counts(features, batch.column("label"), head)

    counted = (
        rows.select("label", "features")
        .mapInArrow(count, "label string, predicted string, loss double")
        .groupBy("label", "predicted")
        .agg(F.count(F.lit(1)).alias("n"), F.sum("loss").alias("loss"))
        .collect()
    )
    position = {label: index for index, label in enumerate(known)}
    confusion = np.zeros((len(known), len(known)), np.int64)
    for row in counted:
        confusion[position[row.label], position[row.predicted]] += row.n
    log_loss = sum(row.loss for row in counted) / max(1, int(confusion.sum()))
    return Evaluation(tuple(known), confusion, log_loss)


def _counts(features: Features, labels: Any, head: Head) -> pa.RecordBatch:
    probabilities = head.probabilities(features).astype(np.float64)
    predicted = pa.array(head.classes).take(pa.array(probabilities.argmax(axis=1)))
    index = pc.index_in(labels, pa.array(head.classes)).fill_null(-1).to_numpy(zero_copy_only=False)
    of_true = np.where(index >= 0, probabilities[np.arange(len(index)), index], 0.0)
    loss = -np.log(np.clip(of_true, PROBABILITY_FLOOR, 1.0))
    return pa.RecordBatch.from_arrays([labels, predicted, pa.array(loss)], ["label", "predicted", "loss"])


def as_matrix(column: Any) -> Features:
    """An Arrow list column of N equal lengths D as (N, D) float32.

    Raises:
        ServiceError: rows of different widths.
    """
    width = len(column[0])
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(flat) != width * len(column):
        raise ServiceError(f"features of different widths: {len(column)} rows hold {len(flat)} values, first {width}")
    return np.asarray(flat, np.float32).reshape(len(column), width)


def variance_kept(projection: Projection) -> float | None:
    """The share of the variance that a PCA keeps; None for another projection."""
    if not isinstance(projection, PCA):
        return None
    return float(projection.explained_variance_ratio[: projection.n_out].sum())


def labelled_features(spark: SparkSession, features: Table, backbone_sha256: str) -> DataFrame:
    """Every labelled image in the table `features` that this backbone made, once: image_id, label, features.

    Spark reads the Parquet files of the table's present version, which `deltalake` lists in milliseconds; its own
    Delta reader takes ten seconds to warm up. An image that came more than once keeps its latest row, so the latest
    label wins.

    Raises:
        ServiceError: the table is empty.
    """
    files = features.files()
    if not files:
        raise ServiceError(f"the table {features.directory} is empty: there is nothing to fit on")
    cores = spark.sparkContext.defaultParallelism
    partitions = max(cores, features.bytes() // BYTES_PER_PARTITION)
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    rows = spark.read.schema(spark_schema(FEATURES)).parquet(*files)
    rows = rows.where(
        (F.col("backbone_sha256") == backbone_sha256)
        & F.col("label_true").isNotNull()
        & F.col("projection_sha256").isNull()
    )
    latest = F.max_by(
        F.struct(F.col("label_true").alias("label"), "features"),
        F.coalesce("published_at", F.timestamp_seconds(F.lit(0))),
    )
    return rows.groupBy("image_id").agg(latest.alias("row")).select("image_id", "row.label", "row.features")
