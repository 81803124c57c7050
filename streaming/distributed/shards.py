"""Assignment of images to workers: deterministic for the same images and seed, and balanced."""

import hashlib
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import reported
from streaming.images.sources import read_if_possible

COLUMNS = ("image_id", "label", "validation", "source", "content")


def identified(images: DataFrame) -> DataFrame:
    """Add image_id, the SHA-256 of the image, to rows (source, label, content); skip images that cannot be read.

    Args:
        images: the rows; content is null if the image is in the file `source`.
    """

    def identify(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            ids = [
                _sha256(source.as_py(), content.as_py())
                for source, content in zip(batch.column("source"), batch.column("content"), strict=True)
            ]
            names = ["image_id", "source", "label", "content"]
            columns = [pa.array(ids, pa.string()), *(batch.column(name) for name in names[1:])]
            yield pa.RecordBatch.from_arrays(columns, names)

    rows = images.select("source", "label", "content")
    found = rows.mapInArrow(reported(identify), "image_id string, source string, label string, content binary")
    return found.where(F.col("image_id").isNotNull())


def shard(rows: DataFrame, workers: int, seed: int) -> DataFrame:
    """Partition rows (image_id, label, validation, source, content), one partition per worker.

    Training and validation images are assigned round-robin in the order of a hash. Only names are sorted, not images.
    """
    ordered = Window.partitionBy("validation").orderBy(F.xxhash64("image_id", F.lit(seed)), "image_id", "source")
    names = rows.select("image_id", "source", "validation")
    dealt = names.select("source", ((F.row_number().over(ordered) - 1) % workers).cast("int").alias("worker"))
    given = rows.join(dealt, "source").repartitionById(workers, "worker")
    return given.sortWithinPartitions("image_id", "source").select(*COLUMNS)


def _sha256(source: str | None, content: bytes | None) -> str | None:
    if content is None and source is not None:
        content = read_if_possible(source)
    return None if content is None else hashlib.sha256(content).hexdigest()
