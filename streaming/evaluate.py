"""What a model is worth: counted on the workers by the same NumPy code that the stream runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.arrays import Features
from models.scorer import Head
from streaming.files import as_matrix

PROBABILITY_FLOOR = 1e-15  # as scikit-learn's log_loss clips


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
