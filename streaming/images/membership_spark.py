"""Training-set membership on Spark: building a version's filter, and excluding its training images from comparisons."""

from collections.abc import Iterator
from functools import reduce

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.bloom_filter import BloomFilter, FittedOn
from streaming.errors import reported
from streaming.images.images_frame import arrow_function
from streaming.images.membership import as_bytes

PARTS = 4  # number of filters on the driver at a time: 1.8 MB each for a million images


def unseen_by(rows: DataFrame, model: FittedOn) -> DataFrame:
    """Return the rows on which a model was certainly not fitted; columns as for `seen_by`."""
    return rows.where(~seen_by(model, rows))


def seen_by(model: FittedOn, rows: DataFrame) -> Column:
    """Return a column: whether a model may have been fitted on a row.

    Args:
        model: the images that the model was fitted on.
        rows: columns image_id and, optionally, known_as and group_id; a match of any of them counts.
    """

    def contains(ids: pa.Array) -> pa.Array:
        return pa.array(model.contains(as_bytes(ids)))

    asked = arrow_function(contains, "boolean")
    names = [name for name in ("image_id", "known_as", "group_id") if name in rows.columns]
    return reduce(Column.__or__, [asked(F.col(name)) for name in names])


def gather(rows: DataFrame, salt: int) -> BloomFilter:
    """Return a Bloom filter of the ids and, if there are any, the groups of rows (image_id, group_id).

    Each partition fills its own filter, so no id is sent to the driver.
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
