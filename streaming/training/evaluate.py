"""Evaluation of a model on the workers, by the same NumPy code that the stream runs; merged on the driver."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.classifier import softmax
from models.evaluation import UNIT, Evaluation
from models.evaluation_sums import EvaluationSums
from models.scorer import Head
from streaming.errors import reported
from streaming.storage.files import as_matrix

SUMS_DDL = "sums binary"
SUMS_ON_DRIVER = 8  # maximum number of sums collected, of some hundred KB for ten classes


def evaluate(rows: DataFrame, head: Head) -> Evaluation:
    """Evaluate a head on rows (label, features).

    A row whose label is not a class of the model counts as an error with the smallest probability.
    """
    unknown = {row.label for row in rows.select("label").distinct().collect()} - set(head.classes)
    classes, n_outputs = (*head.classes, *sorted(unknown)), len(head.classes)

    def sum_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sums = EvaluationSums(classes, n_outputs)
        for batch in batches:
            if batch.num_rows:
                truth = pc.index_in(batch.column("label"), pa.array(classes)).to_numpy().astype(np.int64)
                sums.add(head.logits(as_matrix(batch.column("features"))), truth, head.threshold)
        yield pa.RecordBatch.from_pydict({"sums": [sums.to_bytes()]})

    def merge(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"sums": [_merged(batches, classes, n_outputs).to_bytes()]})

    cores = rows.sparkSession.sparkContext.defaultParallelism
    parts = rows.select("label", "features").coalesce(cores).mapInArrow(reported(sum_partition), SUMS_DDL)
    if cores > SUMS_ON_DRIVER:
        parts = parts.repartition(SUMS_ON_DRIVER).mapInArrow(reported(merge), SUMS_DDL)
    return _merged(parts.toArrow().to_batches(), classes, n_outputs).result()


def predict(rows: DataFrame, head: Head, *, floor: float | None = None) -> DataFrame:
    """Add the predicted class and its confidence (0 to 1) to rows.

    Args:
        rows: column features, which is dropped; other columns are kept.
        floor: also add the column loss: the negative log-likelihood of the label in nats, as a multiple of 2⁻²⁴.
            Smaller probabilities, and those of labels that are not classes of the model, are replaced by `floor`.
    """
    kept = [field for field in rows.schema.fields if field.name != "features"]
    names = [field.name for field in kept]

    def answer(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                probabilities = softmax(head.logits(as_matrix(batch.column("features"))))
                best = head.answers(probabilities)
                predicted = pa.array(head.classes).take(pa.array(best))
                confidence = pa.array(probabilities[np.arange(len(best)), best].astype(np.float64))
                columns = [*(batch.column(name) for name in names), predicted, confidence]
                if floor is not None:
                    columns.append(pa.array(_losses(probabilities, batch.column("label"), head.classes, floor)))
                yield pa.RecordBatch.from_arrays(columns, new_names)

    schema = rows.select(*names).schema.add("predicted", "string").add("confidence", "double")
    if floor is not None:
        schema = schema.add("loss", "double")
    new_names = schema.names
    return rows.mapInArrow(reported(answer), schema)


def sample_predictions(rows: DataFrame, head: Head, n: int, seed: int = 0) -> pa.Table:
    """Return predictions for a random sample of rows (image_id, label, features, …)."""
    order = (F.xxhash64("image_id", F.lit(seed)), "image_id")
    picked = predict(rows.orderBy(*order).limit(n), head)  # only n rows per partition are sorted globally
    return picked.orderBy(*order).toArrow()


def most_confident_mistakes(rows: DataFrame, head: Head, n: int) -> pa.Table:
    """Return the `n` wrong predictions for rows (image_id, label, features, …) with the highest confidence."""
    wrong = predict(rows, head).where(F.col("predicted") != F.col("label"))
    return wrong.orderBy(F.desc("confidence"), "image_id").limit(n).toArrow()


def _merged(batches: Iterable[pa.RecordBatch], classes: tuple[str, ...], n_outputs: int) -> EvaluationSums:
    merged = EvaluationSums(classes, n_outputs)
    for batch in batches:
        for data in batch.column("sums"):
            merged.merge(EvaluationSums.from_bytes(classes, n_outputs, data.as_py()))
    return merged


def _losses(
    probabilities: NDArray[np.float32], labels: pa.Array, classes: tuple[str, ...], floor: float
) -> NDArray[np.float64]:
    """Return the losses (N,) in nats of probabilities (N, C)."""
    truth = pc.index_in(labels, pa.array(classes)).fill_null(-1).to_numpy()
    of_true = np.where(truth < 0, 0.0, probabilities[np.arange(len(truth)), truth].astype(np.float64))
    return np.asarray(np.rint(-np.log(np.maximum(of_true, floor)) / UNIT) * UNIT)
