"""Services that the tests of a run share, each started on demand and stopped at the end of the run.

All test processes share one broker, a second one that tests may stop and kill, one S3 server, and one home with a
trained model. The first process that needs one of them creates it, and the others wait for its lock. Each process has
at most one Spark session.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyspark
import pytest
from filelock import FileLock
from pyspark.sql import SparkSession

from streaming.platform import kafka_node
from streaming.platform.broker import remembered_port, start_broker, stop_broker
from streaming.platform.jars import broker_classpath, install_jars
from streaming.platform.java import find_java
from streaming.platform.kafka_node import free_port
from streaming.platform.session import spark_session
from streaming.settings import Settings
from tests.object_store import stop_object_store

CHECKOUT = Path(__file__).parent.parent
SET_UP = CHECKOUT / ".imagestream"  # jars, exported backbones and Java, fetched by `make`
BROKER, FRAGILE_BROKER = "broker", "fragile-broker"  # homes
OBJECT_STORE = "object-store"

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


def shared_directory(factory: pytest.TempPathFactory) -> Path:
    """A folder that is shared by all processes of this run."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """`place`, created by the first process of the run that calls this."""
    with FileLock(f"{place}.lock"):
        if not place.exists():
            unfinished = place.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(place)
    return place


def shared_broker(home: Path, jars: Path, backbones: Path) -> Settings:
    """Settings of a broker of the run, which the first process that calls this starts in `home`."""
    home.mkdir(exist_ok=True)
    with FileLock(home / "start.lock"):
        if (SET_UP / "java").is_dir() and not (home / "java").exists():  # if `make` found no Java and installed one
            (home / "java").symlink_to(SET_UP / "java")
        settings = Settings(home=home, jars=jars, backbones=backbones, bootstrap_servers=None)
        state, _ = start_broker(settings, remembered_port(settings) or free_port())
    return settings.model_copy(update={"bootstrap_servers": state.address})


def stop_shared_services(run: Path) -> None:
    stop_object_store(run / OBJECT_STORE)
    for home in (run / BROKER, run / FRAGILE_BROKER):
        if home.exists():
            stop_broker(Settings(home=home, bootstrap_servers=None))


def shared_jars() -> Path:
    """The checkout's jars, fetched if they are missing; also sets JVM options for quick starts of Spark and brokers."""
    SET_UP.mkdir(exist_ok=True)
    with FileLock(SET_UP / "tests.lock"):
        java = find_java(SET_UP)
        install_jars(SET_UP / "jars", java)
        spark, broker = _spark_archive(java), _broker_archive(java)
    os.environ[SPARK_OPTIONS] = f"{QUICK_JVM} -XX:SharedArchiveFile={spark} -Xlog:disable"
    kafka_node.JVM_OPTIONS = (*BROKER_OPTIONS, f"-XX:SharedArchiveFile={broker}", "-Xlog:disable")
    return SET_UP / "jars"


def _spark_archive(java: Path) -> Path:
    """The class data archive of Spark's classes, which saves two fifths of the CPU time of a JVM's start."""

    def create(archive: Path) -> None:
        options = f"{QUICK_JVM} -XX:ArchiveClassesAtExit={archive}"
        command = [sys.executable, "-c", TYPICAL_JOBS, str(SET_UP)]
        subprocess.run(command, env=os.environ | {SPARK_OPTIONS: options}, cwd=CHECKOUT, check=True)

    return _class_archive("tests", java, f"{pyspark.__version__} {TYPICAL_JOBS}", create)


def _broker_archive(java: Path) -> Path:
    """The class data archive of Kafka's classes, which saves half of the CPU time of a broker's start."""

    def create(archive: Path) -> None:
        command = [sys.executable, "-c", TYPICAL_BROKER, str(SET_UP), f"-XX:ArchiveClassesAtExit={archive}"]
        subprocess.run(command, cwd=CHECKOUT, check=True)

    content = f"{broker_classpath(SET_UP / 'jars')} {BROKER_OPTIONS} {TYPICAL_BROKER}"
    return _class_archive("broker-tests", java, content, create)


def _class_archive(name: str, java: Path, content: str, create: Callable[[Path], None]) -> Path:
    """A class data archive in the checkout, which `create` writes if it does not exist for this JVM and `content`.

    A JVM that cannot use it loads the classes from the jars. Source: "Class Data Sharing" in the manual of `java`.
    """
    release = java.resolve().parents[1] / "release"  # a JVM ignores an archive of any other build
    build = release.read_text(encoding="utf-8") if release.is_file() else ""
    key = hashlib.sha256(f"{java.resolve()} {build} {content}".encode()).hexdigest()[:12]
    archive = SET_UP / f"{name}-{key}.jsa"
    if not archive.exists():
        for old in SET_UP.glob(f"{name}-*.jsa"):
            old.unlink()
        unfinished = archive.with_suffix(".unfinished")
        create(unfinished)
        unfinished.rename(archive)
    return archive


class SharedSpark:
    """The Spark session of a test process, which commands in the process also use."""

    def __init__(self) -> None:
        self._block = None

    def start(self, home: Path, jars: Path) -> SparkSession:
        if self._block is None:
            settings = Settings(home=home, jars=jars, master="local[2,4]", driver_memory="1g")
            # Tests run many different queries: by default, code is generated and compiled again after 100 of them.
            conf = {"spark.sql.shuffle.partitions": "2", "spark.sql.codegen.cache.maxEntries": "5000"}
            self._block = spark_session(settings, "tests", delta=True, conf=conf)
            self._session = self._block.__enter__()
        return self._session

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the Python workers, in addition to those at the start of the session; may be changed."""
        return {} if self._block is None else self._session.sparkContext.environment

    def stop(self) -> None:
        if self._block is not None:
            block, self._block = self._block, None
            with suppress(Exception):
                block.__exit__(None, None, None)
