"""Images that a version was fitted on, on Spark: gathered on the workers, and left out where versions are compared."""

from collections.abc import Iterator
from functools import reduce

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.bloom_filter import BloomFilter, FittedOn
from streaming.errors import reported
from streaming.images.exposure import as_bytes
from streaming.images.images_frame import arrow_function

PARTS = 4  # filters that the driver holds at a time: 1.8 MB each for a million images


def unseen_by(rows: DataFrame, model: FittedOn) -> DataFrame:
    """Those of the rows that a model was certainly not fitted on; columns as for `seen_by`."""
    return rows.where(~seen_by(model, rows))


def seen_by(model: FittedOn, rows: DataFrame) -> Column:
    """Whether a model was possibly fitted on each of the rows.

    Args:
        rows: image_id, and known_as and group_id where they have them: a model that was fitted on an image by one of
            these names, or on its group, has seen it.
    """

    def contains(ids: pa.Array) -> pa.Array:
        return pa.array(model.contains(as_bytes(ids)))

    asked = arrow_function(contains, "boolean")
    names = [name for name in ("image_id", "known_as", "group_id") if name in rows.columns]
    return reduce(Column.__or__, [asked(F.col(name)) for name in names])


def gather(rows: DataFrame, salt: int) -> BloomFilter:
    """The filter of rows (image_id, and group_id where images are grouped): of the images, and of their groups.

    Each partition fills a filter of its own, so that no id reaches the driver.
    """
    names = [name for name in ("image_id", "group_id") if name in rows.columns]
    capacity = len(names) * rows.count()

    def fill(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        part = BloomFilter.empty(capacity, salt)
        for batch in batches:
            for column in batch.columns:
                part.add(as_bytes(column))
        yield pa.RecordBatch.from_pydict({"bits": [part.bits.tobytes()]})

    whole = BloomFilter.empty(capacity, salt)
    parts = rows.select(*names).coalesce(PARTS).mapInArrow(reported(fill), "bits binary").toArrow()
    for bits in parts.column("bits"):
        whole.merge(BloomFilter(np.frombuffer(bits.as_buffer(), np.uint8), salt))
    return whole
