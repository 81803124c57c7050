from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from streaming.platform.session import QUICK_START, spark_session
from streaming.settings import Settings


@pytest.fixture(scope="session")
def spark(jars_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """The one Spark of the test process: what starts one itself (train, retrain, stream) runs in a process apart."""
    settings = Settings(home=tmp_path_factory.mktemp("spark"), jars=jars_dir, master="local[2,4]", driver_memory="1g")
    with spark_session(settings, "tests", java_options=QUICK_START) as session:
        session.conf.set("spark.sql.shuffle.partitions", "2")
        yield session
