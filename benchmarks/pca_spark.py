"""How fast is one-pass PCA on Spark compared with Spark ML's, and how much memory does it cost the driver?"""

import multiprocessing
import resource
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.ml.feature import PCA as SparkPCA  # noqa: N811
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from sklearn.decomposition import PCA

from benchmarks.pairs import Pair
from models.arrays import Features
from streaming.ml import ImagePCA
from streaming.platform.session import spark_session
from streaming.settings import Settings, read_settings
from streaming.storage.files import as_matrix, list_array

ROWS, WIDTH = 22_688, 1_280  # the test set of Fruits-360 with MobileNetV2
RANK = 200  # of the signal below the noise
BLOCK = 512
RUNS = 2
SHARE = 0.9


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch:
        settings = _settings(scratch)
        with spark_session(settings, "benchmark") as spark:
            rows = _rows(spark, ROWS).withColumn("vector", array_to_vector("features")).persist()
            ours: list[float] = []
            peer: list[float] = []
            k = _ours(rows)  # warm-up: compilation, Python workers, cached rows
            for _ in range(RUNS):
                for fit, took in ((_ours, ours), (_sparks, peer)):
                    clock = perf_counter()
                    fit(rows)
                    took.append(ROWS / (perf_counter() - clock))
            reference = PCA(SHARE).fit(as_matrix(rows.select("features").toArrow().column(0).combine_chunks()))
            same = f"k = {k}, scikit-learn's {reference.n_components_}"
            yield Pair(
                f"PCA({SHARE}) of {ROWS:,} × {WIDTH:,} on Spark ({same}), against Spark ML's PCA(k={WIDTH:,})",
                "rows/s", 5.0, ours, peer,
            )  # fmt: skip
        once, four_times = (_peak_in_a_process(scratch, n) for n in (ROWS, 4 * ROWS))
        question = f"peak memory of the driver (Python and JVM) at {ROWS:,} rows, against {4 * ROWS:,} rows"
        yield Pair(question, "MB", 0.9, [once], [four_times])


def _settings(scratch: str) -> Settings:
    settings = read_settings()
    return settings.model_copy(update={"home": Path(scratch), "jars": settings.jars_dir})


def _ours(rows: DataFrame) -> int:
    return ImagePCA(inputCol="features", outputCol="pca", explainedVariance=SHARE).fit(rows).projection.n_out


def _sparks(rows: DataFrame) -> int:
    return int(SparkPCA(k=WIDTH, inputCol="vector", outputCol="pca").fit(rows).getK())


def _rows(spark: SparkSession, count: int) -> DataFrame:
    """Rows (features: array<float>), generated on the workers, deterministically."""
    basis = np.random.default_rng(0).normal(size=(RANK, WIDTH)).astype(np.float32)

    def make(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for block in batch.column("id").to_pylist():
                rows = list_array(_block(block, min(BLOCK, count - block * BLOCK), basis))
                yield pa.RecordBatch.from_arrays([rows], ["features"])

    blocks = -(-count // BLOCK)
    return spark.range(0, blocks, 1, 8).mapInArrow(make, "features array<float>")


def _block(number: int, rows: int, basis: Features) -> Features:
    generator = np.random.default_rng(number + 1)
    signal = generator.normal(size=(rows, RANK)).astype(np.float32) @ basis
    return signal + generator.normal(size=(rows, WIDTH)).astype(np.float32)


def _peak_in_a_process(scratch: str, rows: int) -> float:
    """Peak memory in MB of a separate process and its JVM while fitting."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_fit_and_send_peak, args=(scratch, rows, there))
    process.start()
    there.close()
    peak: float = here.recv()
    process.join()
    return peak


def _fit_and_send_peak(scratch: str, rows: int, connection: Any) -> None:
    with spark_session(_settings(scratch), "benchmark") as spark:
        _ours(_rows(spark, rows))
        jvm = spark.sparkContext._jvm.java.lang.ProcessHandle.current().pid()
        status = Path(f"/proc/{jvm}/status").read_text(encoding="utf-8")
        jvm_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + jvm_kb) / 1024)
