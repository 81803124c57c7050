"""The drift reference of a model: the distribution of its projections and confidences on held-out images."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.drift import COMPONENTS, DriftReference
from models.scorer import Head
from streaming.errors import reported
from streaming.storage.files import as_matrix, list_array

SAMPLE = 10_000  # number of images, which the driver collects; more would hardly change the deciles
BUCKETS = 1_000_000


def drift_reference(rows: DataFrame, head: Head, n: int) -> DriftReference:
    """Compute the reference from a deterministic sample of about `SAMPLE` held-out rows (image_id, features).

    Only the monitored components are sent to the driver: at most 64 numbers per image.

    Args:
        n: number of rows.
    """

    def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                projected = head.projection.transform(as_matrix(batch.column("features")))
                confidence = head.classifier.probabilities(projected).max(axis=1)
                watched = list_array(np.asarray(projected[:, :COMPONENTS], np.float32))
                columns = [batch.column("image_id"), watched, pa.array(confidence, pa.float32())]
                yield pa.RecordBatch.from_arrays(columns, ["image_id", "projected", "confidence"])

    share = min(1.0, SAMPLE / max(1, n))
    sampled = F.pmod(F.xxhash64("image_id"), F.lit(BUCKETS)) < max(1, round(BUCKETS * share))
    few = rows.where(sampled).select("image_id", "features")
    seen = few.mapInArrow(reported(look), "image_id string, projected array<float>, confidence float").toArrow()
    seen = seen.sort_by("image_id").combine_chunks()  # floating-point sums depend on their order
    confidence = seen.column("confidence").to_numpy()
    return DriftReference.of(as_matrix(seen.column("projected").combine_chunks()), confidence)
