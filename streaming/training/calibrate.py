"""The images that 8-bit integers are calibrated on: spread over the data set and its classes, none of them held out."""

from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.scorer import decode_all
from streaming.errors import DataError, reported
from streaming.images.dataset import Dataset
from streaming.images.images_frame import images_frame
from streaming.images.sources import read_source
from streaming.images.split import Split

IMAGES = 100  # calibrated on more, the ranges hardly change
CANDIDATES = 4 * IMAGES  # some are held out, some do not decode
TASKS = 4


def calibration_images(dataset: Dataset, split: Split, rows: DataFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Up to `IMAGES` images of the data set that are on the training side, (N, height, width, 3) uint8.

    They are the first by the hash of their source, taken in turn from every class: a data set that is sorted by class,
    or by anything else, gives images of all its parts. Of the data set only names and labels are looked at, and the
    bytes of `CANDIDATES` images, which the workers decode.

    Args:
        rows: image_id of every image, and group_id where the split groups them.

    Raises:
        ServiceError: none of the candidates can be used.
    """
    images = images_frame(rows.sparkSession, dataset, lambda n, _: max(1, min(n, TASKS)))
    candidates = in_turn(images.select("source", "label"), "source", CANDIDATES).select("source").collect()
    # A list of names is a filter that Spark applies where it reads the table, before it moves any bytes.
    wanted = images.where(F.col("source").isin(*(row.source for row in candidates)))
    decoded = decoded_images(wanted, size, from_files=dataset.table is None)
    decoded = decoded.dropDuplicates(["image_id"]).persist()
    try:
        ids = F.broadcast(decoded.select("image_id"))
        training, _ = split.sides(rows.drop("features").join(ids, "image_id", "left_semi"))
        chosen = in_turn(training.dropDuplicates(["image_id"]), "image_id", IMAGES)
        found = decoded.join(F.broadcast(chosen.select("image_id")), "image_id").orderBy("image_id")
        pixels = [np.frombuffer(row.pixels, np.uint8) for row in found.select("pixels").collect()]
    finally:
        decoded.unpersist()
    if not pixels:
        raise DataError(
            f"none of the {CANDIDATES} images that were looked at can be used to calibrate 8-bit integers: expected at "
            "least one that decodes and is not held out; train on more images, or without --int8"
        )
    return np.stack(pixels).reshape(-1, *size, 3)


def in_turn(rows: DataFrame, column: str, n: int) -> DataFrame:
    """`n` of the rows (label, `column`, …): the first of every class by the hash of `column`, then the second, …"""
    order = (F.xxhash64(column), F.col(column))
    turn = F.row_number().over(Window.partitionBy("label").orderBy(*order))
    return rows.withColumn("turn", turn).orderBy("turn", *order).limit(n).drop("turn")


def decoded_images(images: DataFrame, size: tuple[int, int], *, from_files: bool) -> DataFrame:
    """Rows (image_id, pixels: uint8 of height × width × 3) of those of `images` (source, content) that decode.

    Args:
        from_files: the image is in the file that `source` names, not in `content`.
    """

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for source, value in zip(batch.column("source"), batch.column("content"), strict=True):
                content = _read(source.as_py()) if from_files else value.as_py()
                found = decode_all([content], size).images
                if content is not None and len(found):
                    columns = {"image_id": [sha256(content).hexdigest()], "pixels": [found[0].tobytes()]}
                    yield pa.RecordBatch.from_pydict(columns)

    return images.select("source", "content").mapInArrow(reported(decode), "image_id string, pixels binary")


def _read(path: str) -> bytes | None:
    try:
        return read_source(path)
    except OSError:
        return None
