from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyspark.sql import DataFrame, SparkSession

from streaming.distributed.shards import identified
from streaming.images.dataset import digit_images, write_images

N = 300
RowsOf = Callable[[DataFrame], DataFrame]


@pytest.fixture(scope="session")
def zeros_and_ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 handwritten zeros and 150 ones."""
    folder = tmp_path_factory.mktemp("two-digits")
    images = [(name, label, data) for name, label, data in digit_images(5_000) if label in ("0", "1")]
    few = [one for label in "01" for one in [image for image in images if image[1] == label][: N // 2]]
    return write_images(folder / "digits", few)


@pytest.fixture(scope="session")
def rows(spark: SparkSession, zeros_and_ones: Path) -> DataFrame:
    """The same as rows of files, every tenth to validate on."""
    files = sorted(zeros_and_ones.rglob("*.png"))
    table = [(str(path), path.parent.name, number % 10 == 0) for number, path in enumerate(files)]
    given = spark.createDataFrame(table, "source string, label string, validation boolean")
    known = identified(given.selectExpr("source", "label", "cast(null as binary) as content")).drop("label", "content")
    return given.join(known, "source").selectExpr("*", "cast(null as binary) as content").persist()


@pytest.fixture(scope="session")
def pixels(zeros_and_ones: Path) -> np.ndarray:
    """What one of the images looks like."""
    return np.asarray(Image.open(next(zeros_and_ones.rglob("*.png"))))
