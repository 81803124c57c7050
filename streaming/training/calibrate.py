"""The images for the calibration of 8-bit integers: spread over the data set and its classes, none of them held out."""

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
from streaming.images.sources import read_if_possible
from streaming.images.split import Split

IMAGES = 100  # more images hardly change the ranges
CANDIDATES = 4 * IMAGES  # some are held out or cannot be decoded
TASKS = 4


def calibration_images(dataset: Dataset, split: Split, rows: DataFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return up to `IMAGES` images of the training side, (N, height, width, 3) uint8.

        Images are selected by the hash of their source, round-robin over the classes, so that a sorted data set is
        covered evenly. Only names, labels and the bytes of `CANDIDATES` images are read; workers decode the images.

    Args:
        rows: columns image_id and, if the split is grouped, group_id.
        size: height and width in pixels.

    Raises:
        ServiceError: none of the candidates can be used.
    """
    images = images_frame(rows.sparkSession, dataset, lambda n, _: max(1, min(n, TASKS)))
    candidates = in_turn(images.select("source", "label"), "source", CANDIDATES).select("source").collect()
    # Spark pushes the filter on names down to the scan, before it reads any images.
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
            f"none of {CANDIDATES} candidate images can be used to calibrate 8-bit integers: expected at least one "
            "that can be decoded and is not held out; train on more images, or without --int8"
        )
    return np.stack(pixels).reshape(-1, *size, 3)


def in_turn(rows: DataFrame, column: str, n: int) -> DataFrame:
    """Return `n` of the rows (label, `column`, …), round-robin over the classes in order of the hash of `column`.

    Args:
        column: a column that identifies a row.
    """
    order = (F.xxhash64(column), F.col(column))
    turn = F.row_number().over(Window.partitionBy("label").orderBy(*order))
    return rows.withColumn("turn", turn).orderBy("turn", *order).limit(n).drop("turn")


def decoded_images(images: DataFrame, size: tuple[int, int], *, from_files: bool) -> DataFrame:
    """Return rows (image_id, pixels: uint8 of height × width × 3) of the images that can be decoded.

    Args:
        images: columns source and content.
        size: height and width in pixels.
        from_files: whether to read the file `source` instead of `content`.
    """

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for source, value in zip(batch.column("source"), batch.column("content"), strict=True):
                content = read_if_possible(source.as_py()) if from_files else value.as_py()
                found = decode_all([content], size).images
                if content is not None and len(found):
                    columns = {"image_id": [sha256(content).hexdigest()], "pixels": [found[0].tobytes()]}
                    yield pa.RecordBatch.from_pydict(columns)

    return images.select("source", "content").mapInArrow(reported(decode), "image_id string, pixels binary")
