"""Services that the tests of one run share, each started when the first test asks for it and ended with the run.

All test processes together have one broker, a second one that tests may stop and kill, and one home with a trained
model, made by whichever process needs them first while the others wait for its lock. Each process has at most one
Spark session.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from pyspark.sql import SparkSession

from streaming.platform.broker import remembered_port, start_broker, stop_broker
from streaming.platform.jars import install_jars
from streaming.platform.java import find_java
from streaming.platform.kafka_node import free_port
from streaming.platform.session import spark_session
from streaming.settings import Settings

CHECKOUT = Path(__file__).parent.parent
SET_UP = CHECKOUT / ".imagestream"  # jars, exported backbones and Java, as `make` fetched them
BROKER, FRAGILE_BROKER = "broker", "fragile-broker"  # homes


def directory_of_the_run(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """`place`, made by the first process of the run that asks for it."""
    with FileLock(f"{place}.lock"):
        if not place.exists():
            unfinished = place.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(place)
    return place


def shared_broker(home: Path, jars: Path, backbones: Path) -> Settings:
    """Settings with the address of a broker of the run, which the first process that asks starts in `home`."""
    home.mkdir(exist_ok=True)
    with FileLock(home / "start.lock"):
        if (SET_UP / "java").is_dir() and not (home / "java").exists():  # where `make` found no Java and installed one
            (home / "java").symlink_to(SET_UP / "java")
        settings = Settings(home=home, jars=jars, backbones=backbones, bootstrap_servers=None)
        state, _ = start_broker(settings, remembered_port(settings) or free_port())
    return settings.model_copy(update={"bootstrap_servers": state.address})


def stop_shared_brokers(run: Path) -> None:
    for home in (run / BROKER, run / FRAGILE_BROKER):
        if home.exists():
            stop_broker(Settings(home=home, bootstrap_servers=None))


def shared_jars() -> Path:
    """The checkout's own jars, fetched if they are not there yet."""
    with FileLock(_made(SET_UP) / "tests.lock"):
        install_jars(SET_UP / "jars", find_java(SET_UP))
    return SET_UP / "jars"


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


class SharedSpark:
    """The one Spark session of a test process; the commands that run in the process use it, too."""

    def __init__(self) -> None:
        self._block = None

    def start(self, home: Path, jars: Path) -> SparkSession:
        if self._block is None:
            settings = Settings(home=home, jars=jars, master="local[2,4]", driver_memory="1g")
            conf = {"spark.sql.shuffle.partitions": "2"}
            self._block = spark_session(settings, "tests", delta=True, conf=conf)
            self._session = self._block.__enter__()
        return self._session

    def stop(self) -> None:
        if self._block is not None:
            block, self._block = self._block, None
            with suppress(Exception):
                block.__exit__(None, None, None)
