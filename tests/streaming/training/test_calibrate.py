"""Calibration images are drawn from the whole data set and all of its classes, in any order of its images."""

import io
from collections import Counter
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyspark.sql import DataFrame, SparkSession

from streaming.errors import ServiceError
from streaming.images.dataset import Dataset, read_dataset
from streaming.images.split import Split
from streaming.training import calibrate
from streaming.training.calibrate import IMAGES, calibration_images

CLASSES = 5
EACH = 120
SIZE = (4, 4)
SPLIT = Split(7, 0.5)


def png(label: int, number: int) -> bytes:
    """An image whose red value is its class."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (label, number, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["table", "folder"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """600 images, sorted by class."""
    root = tmp_path_factory.mktemp("sorted")
    images = [(label, png(label, number)) for label in range(CLASSES) for number in range(EACH)]
    if request.param == "table":
        table = pa.table({"image": [data for _, data in images], "label": [f"{label}" for label, _ in images]})
        pq.write_table(table, root / "images.parquet")
        return read_dataset(root / "images.parquet")
    for number, (label, data) in enumerate(images):
        path = root / f"{label}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return read_dataset(root)


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    images = [(sha256(png(label, n)).hexdigest(), f"{label}") for label in range(CLASSES) for n in range(EACH)]
    return spark.createDataFrame(images, "image_id string, label string").persist()


@pytest.fixture(scope="module")
def pixels(dataset: Dataset, rows: DataFrame) -> NDArray[np.uint8]:
    return calibration_images(dataset, SPLIT, rows, SIZE)


def identity(pixels: np.ndarray) -> set[tuple[int, int]]:
    return {(int(image[0, 0, 0]), int(image[0, 0, 1])) for image in pixels}


def test_calibration_images_are_distinct_balanced_over_the_classes_and_not_held_out(
    pixels: NDArray[np.uint8], rows: DataFrame
) -> None:
    """The first 400 rows of the table contain only four of the five classes."""
    assert pixels.shape == (IMAGES, *SIZE, 3)
    assert pixels.dtype == np.uint8
    assert len(identity(pixels)) == IMAGES
    assert Counter(label for label, _ in identity(pixels)) == dict.fromkeys(range(CLASSES), IMAGES // CLASSES)
    numbers = [number for _, number in identity(pixels)]
    assert max(numbers) > 0.9 * EACH > 0.1 * EACH > min(numbers)  # from all parts of a class
    held_out = {row.image_id for row in SPLIT.sides(rows)[1].select("image_id").collect()}
    assert not held_out & {sha256(png(*one)).hexdigest() for one in identity(pixels)}


@pytest.mark.parametrize("dataset", ["table"], indirect=True)
def test_calibration_is_deterministic_and_needs_training_images(
    dataset: Dataset, pixels: NDArray[np.uint8], rows: DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.testing.assert_array_equal(calibration_images(dataset, SPLIT, rows, SIZE), pixels)
    monkeypatch.setattr(calibrate, "CANDIDATES", 10)
    all_held_out = Split(42, 1.0)
    with pytest.raises(ServiceError, match="none of 10 candidate images"):
        calibration_images(dataset, all_held_out, rows, SIZE)
