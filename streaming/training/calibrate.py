"""The images that 8-bit integers are calibrated on: some of those that a model is fitted on, none that is held out."""

from hashlib import sha256
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import DataFrame

from models.scorer import decode_all
from streaming.errors import ServiceError
from streaming.images.dataset import Dataset
from streaming.images.split import Split

IMAGES = 100  # calibrated on more, the ranges hardly change
LOOKED_AT = 4 * IMAGES


def calibration_images(dataset: Dataset, split: Split, rows: DataFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Up to `IMAGES` images of the data set that lie on the training side, (N, height, width, 3) uint8.

    Args:
        rows: image_id of every image, and group_id where the split groups them.

    Raises:
        ServiceError: among the first few hundred images there is none that will do.
    """
    found = {sha256(data).hexdigest(): data for data in islice(dataset.some_images(LOOKED_AT), LOOKED_AT)}
    ids = rows.sparkSession.createDataFrame(pa.table({"image_id": list(found)}))
    training, _ = split.sides(rows.drop("features").join(ids, "image_id", "left_semi"))
    chosen = [found[row.image_id] for row in training.select("image_id").orderBy("image_id").limit(IMAGES).collect()]
    images = decode_all(chosen, size).images
    if not len(images):
        raise ServiceError("not one of the images that were looked at can be used to calibrate 8-bit integers")
    return images
