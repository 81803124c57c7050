from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from streaming.distributed.shards import identified
from streaming.images.dataset import digit_images, write_images

N = 300


@pytest.fixture(scope="session")
def zeros_and_ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 handwritten zeros and 150 ones."""
    folder = tmp_path_factory.mktemp("two-digits")
    images = list(digit_images(5_000))
    by_label = ([one for one in images if one[1] == label][: N // 2] for label in "01")
    return write_images(folder / "digits", chain(*by_label))


@pytest.fixture(scope="session")
def rows(spark: SparkSession, zeros_and_ones: Path) -> DataFrame:
    """One row per file; every tenth is for validation."""
    files = sorted(zeros_and_ones.rglob("*.png"))
    table = {
        "source": [str(path) for path in files],
        "label": [path.parent.name for path in files],
        "validation": [number % 10 == 0 for number in range(len(files))],
    }
    given = spark.createDataFrame(pa.table(table))  # of a list of rows, Spark would start more Python workers
    known = identified(given.selectExpr("source", "label", "cast(null as binary) as content")).drop("label", "content")
    return given.join(known, "source").selectExpr("*", "cast(null as binary) as content").persist()
