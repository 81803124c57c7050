"""Files that the tests keep between runs, in the checkout: `python -m tests.prepare classes|backbones`, run by `make`.

Class data archives, from which JVMs start quickly, and exported backbones. Tests that do not find them create them.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pyspark
from filelock import FileLock

from models.architectures import BackboneSpec, Output, Size
from models.backbone import ExportedBackbone, export_backbone
from models.convert import convert
from streaming.platform import kafka_node
from streaming.platform.jars import broker_classpath, install_jars
from streaming.platform.java import find_java

CHECKOUT = Path(__file__).parent.parent
SET_UP = CHECKOUT / ".imagestream"  # jars, exported backbones and Java, fetched by `make`
EXPORTS, ARCHIVES = SET_UP / "backbones", SET_UP / "tests"

SPARK_OPTIONS = "SPARK_SUBMIT_OPTS"  # JVM options that Spark's launcher adds
# For short jobs: compile quickly rather than optimise, enlarge the code cache (48 MB by default with one tier, which
# causes code to be flushed), and collect garbage in one thread.
QUICK_JVM = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC"
BROKER_OPTIONS = kafka_node.JVM_OPTIONS
TYPICAL_JOBS = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pyspark import SparkContext

from streaming.platform.session import spark_session
from streaming.settings import Settings

with TemporaryDirectory() as folder:
    settings = Settings(home=Path(folder), jars=Path(sys.argv[1]) / "jars", master="local[2]", driver_memory="1g")
    with spark_session(settings, "classes", delta=True) as spark:
        rows = spark.range(100).selectExpr("id", "id % 7 AS k", "array(1.0, 2.0) AS v", "current_timestamp() AS t")
        rows.write.parquet(f"{folder}/rows")
        read = spark.read.parquet(f"{folder}/rows")
        read.groupBy("k").count().join(read, "k").orderBy("id").collect()
        read.select("id", "k").mapInArrow(lambda batches: batches, "id long, k long").toArrow()
        rows.select("id", "k").write.format("delta").save(f"{folder}/delta")
        assert spark.read.format("delta").load(f"{folder}/delta").count() == 100
    gateway = SparkContext._gateway
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait()  # the archive is written when the JVM exits
"""
TYPICAL_BROKER = """
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from kafka import KafkaConsumer, KafkaProducer

from streaming.platform import kafka_node
from streaming.platform.broker import start_broker, stop_broker
from streaming.settings import Settings

set_up = Path(sys.argv[1])
with TemporaryDirectory() as folder:
    if (set_up / "java").is_dir():
        (Path(folder) / "java").symlink_to(set_up / "java")
    settings = Settings(home=folder, jars=set_up / "jars", bootstrap_servers=None)
    start_broker(settings, kafka_node.free_port())  # formats the storage
    stop_broker(settings)
    kafka_node.JVM_OPTIONS += tuple(sys.argv[2:])
    address = start_broker(settings)[0].address
    try:
        with closing(KafkaProducer(bootstrap_servers=address, transactional_id="one")) as producer:
            producer.init_transactions()
            producer.begin_transaction()
            producer.send("typical", b"value").get(300)
            producer.commit_transaction()
        group = {"group_id": "one", "auto_offset_reset": "earliest", "consumer_timeout_ms": 60_000}
        with closing(KafkaConsumer("typical", bootstrap_servers=address, **group)) as consumer:
            assert next(consumer).value == b"value"
    finally:
        stop_broker(settings, 120)  # the archive is written when the JVM exits
"""


class Case(NamedTuple):
    """A backbone as it is exported for the tests."""

    weights: str
    output: Output
    input_size: Size | None
    n_features: int


# Random weights replace those that would have to be downloaded, and large networks get small inputs.
CASES = {
    "efficientnet_lite0": Case("imagenet", "pooled", None, 1280),
    "mobilenet_v2": Case("random", "flat", None, 62_720),
    "inception_v3": Case("random", "pooled", (75, 90), 2048),
    "xception": Case("random", "flat", (71, 80), 3 * 3 * 2048),
    "resnet50": Case("random", "pooled", (64, 48), 2048),
    "vgg16": Case("random", "flat", (32, 64), 2 * 512),
    "vgg19": Case("random", "pooled", (40, 40), 512),
    "cnn_gray": Case("random", "pooled", None, 16),
    "cnn_color": Case("random", "flat", (20, 34), 128),
    "pixels": Case("none", "flat", (8, 6), 8 * 6 * 3),
}

# Further exports that tests use: name, weights, output, side.
OTHERS: tuple[tuple[str, str, Output, int], ...] = (
    ("efficientnet_lite0", "imagenet", "pooled", 64),
    ("efficientnet_lite0", "imagenet", "pooled", 96),
    ("cnn_color", "random", "pooled", 64),
    ("pixels", "none", "flat", 14),
    ("pixels", "none", "flat", 32),
)


class ClassArchives(NamedTuple):
    """Class data archives of Spark's and Kafka's classes, which save half of the CPU time of a JVM's start."""

    spark: Path
    broker: Path


def class_archives() -> ClassArchives:
    """The archives for this Java and these jars, created if they do not exist; the jars are fetched if missing.

    A JVM that cannot use its archive loads the classes from the jars. Source: "Class Data Sharing" in the manual of
    `java`.
    """
    ARCHIVES.mkdir(parents=True, exist_ok=True)
    with FileLock(ARCHIVES / "lock"), ThreadPoolExecutor() as threads:
        java = find_java(SET_UP)
        install_jars(SET_UP / "jars", java)
        broker_content = f"{broker_classpath(SET_UP / 'jars')} {BROKER_OPTIONS} {TYPICAL_BROKER}"
        broker = threads.submit(_archive, "broker", java, broker_content, _record_broker)
        spark = threads.submit(_archive, "spark", java, f"{pyspark.__version__} {TYPICAL_JOBS}", _record_spark)
        return ClassArchives(spark.result(), broker.result())


def _archive(name: str, java: Path, content: str, record: Callable[[Path], None]) -> Path:
    release = java.resolve().parents[1] / "release"  # a JVM ignores an archive of any other build
    build = release.read_text(encoding="utf-8") if release.is_file() else ""
    key = hashlib.sha256(f"{java.resolve()} {build} {content}".encode()).hexdigest()[:12]
    archive = ARCHIVES / f"{name}-{key}.jsa"
    if not archive.exists():
        for old in ARCHIVES.glob(f"{name}-*.jsa"):
            old.unlink()
        unfinished = archive.with_suffix(".unfinished")
        record(unfinished)
        unfinished.rename(archive)
    return archive


def _record_spark(archive: Path) -> None:
    options = f"{QUICK_JVM} -XX:ArchiveClassesAtExit={archive}"
    command = [sys.executable, "-c", TYPICAL_JOBS, str(SET_UP)]
    subprocess.run(command, env=os.environ | {SPARK_OPTIONS: options}, cwd=CHECKOUT, check=True)


def _record_broker(archive: Path) -> None:
    command = [sys.executable, "-c", TYPICAL_BROKER, str(SET_UP), f"-XX:ArchiveClassesAtExit={archive}"]
    subprocess.run(command, cwd=CHECKOUT, check=True)


def export(name: str, exports: Path) -> ExportedBackbone:
    """The backbone of that name in `CASES`."""
    case = CASES[name]
    return export_backbone(name, case.weights, exports, output=case.output, input_size=case.input_size)


@contextmanager
def exports_in_this_process() -> Iterator[None]:
    """Export in this process, which imports TensorFlow once.

    For an export in its own process, see tests/models/test_backbone.py.
    """

    def convert_here(spec: BackboneSpec, weights: str, folder: Path) -> None:
        convert(spec.name, weights, folder, spec.output, spec.input_size)

    with patch("models.backbone._convert_in_subprocess", convert_here):
        yield


def main(what: str) -> None:
    """Create the class data archives or the exported backbones."""
    if what == "classes":
        class_archives()
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # before TensorFlow is imported
    with exports_in_this_process():
        for name in CASES:
            export(name, EXPORTS)
        for name, weights, output, side in OTHERS:
            export_backbone(name, weights, EXPORTS, output=output, input_size=(side, side))


if __name__ == "__main__":
    main(*sys.argv[1:])
