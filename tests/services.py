"""Services that the tests of a run share, each started on demand and stopped at the end of the run.

All test processes share one broker, a second one that tests may stop and kill, one S3 server, and one home with a
trained model. The first process that needs one of them creates it, and the others wait for its lock. Each process has
at most one Spark session.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from pyspark.sql import SparkSession

from streaming.platform import kafka_node
from streaming.platform.broker import remembered_port, start_broker, stop_broker
from streaming.platform.kafka_node import free_port
from streaming.platform.session import spark_session
from streaming.settings import Settings
from tests.object_store import stop_object_store
from tests.prepare import BROKER_OPTIONS, QUICK_JVM, SET_UP, SPARK_OPTIONS, class_archives

BROKER, FRAGILE_BROKER = "broker", "fragile-broker"  # homes
OBJECT_STORE = "object-store"


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
    archives = class_archives()
    os.environ[SPARK_OPTIONS] = f"{QUICK_JVM} -XX:SharedArchiveFile={archives.spark} -Xlog:disable"
    kafka_node.JVM_OPTIONS = (*BROKER_OPTIONS, f"-XX:SharedArchiveFile={archives.broker}", "-Xlog:disable")
    return SET_UP / "jars"


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
