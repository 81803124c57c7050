"""The Spark session: it starts with the settings of a stream, and its failures are reported in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyspark.errors import PySparkException

from streaming.errors import ServiceError, encode
from streaming.platform.session import cause
from streaming.settings import read_settings

# In a separate process: Spark has one session per process.
START = """
import sys
from pathlib import Path
from streaming.errors import ServiceError
from streaming.pipeline.preflight import with_fixed_heap
from streaming.platform.session import spark_session
from streaming.settings import read_settings

home, jars, master, memory, *statements = sys.argv[1:]
asked = {"home": Path(home), "jars": Path(jars), "master": master, "driver_memory": memory}
settings, java_options = with_fixed_heap(read_settings().model_copy(update=asked))
try:
    for statement in statements:
        with spark_session(settings, "test", java_options=java_options) as spark:
            sockets = Path(spark.conf.get("spark.python.unix.domain.socket.dir"))
            spark.sql(statement).collect()
            rows = spark.range(10).mapInPandas(lambda rows: rows, "id long").count()
            print(rows, oct(sockets.stat().st_mode)[-3:], sockets)
except ServiceError as error:
    print(error)
"""


def start(home: Path, memory: str, *statements: str, **environment: str) -> list[str]:
    """Run each statement in a separate session of one process."""
    jars = read_settings().jars_dir.resolve()
    command = [sys.executable, "-c", START, str(home), str(jars), "local[1]", memory, *statements]
    done = subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True, timeout=300
    )
    return done.stdout.splitlines()


def test_consecutive_sessions_run_on_one_core_with_private_sockets_until_one_exhausts_the_memory(
    tmp_path: Path,
) -> None:
    home = tmp_path / "fran\u00e7ois m\u00fcller, #1 'x' ${y}"
    too_large = "SELECT length(repeat(id, 2000000000)) FROM range(1)"
    *sessions, error = start(home, "500m", "SELECT 1", "SELECT 2", too_large, LC_ALL="POSIX")
    assert list(tmp_path.iterdir()) == [home]  # Log4j writes to no other folder
    assert (home / "spark.log").is_file()
    rows, mode, sockets = sessions[0].split()
    assert (rows, mode) == ("10", "700")
    assert sessions == [sessions[0]] * 2
    assert not Path(sockets).exists()  # after the process has exited
    assert error.startswith("Spark's JVM ran out of its memory of 500m: set a larger --driver-memory;")


def test_too_little_memory_is_reported_with_the_minimum(tmp_path: Path) -> None:
    (error,) = start(tmp_path, "300m", "SELECT 1")
    assert "must be at least 471859200" in error
    assert str(tmp_path / "spark.log") in error


def test_jvm_that_exits_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    (error,) = start(tmp_path, "1g", "SELECT 1", SPARK_SUBMIT_OPTS="-XX:+UseParallelGC")
    assert "Multiple garbage collectors selected" in error


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such thing", "no such thing"),
        ("", "no reason given"),
        (
            "An error occurred while calling o1.x.\n: java.lang.IllegalArgumentException: too small\n\tat a.b",
            "IllegalArgumentException: too small",
        ),
        (
            "An error occurred while calling o1.x.\n: org.apache.spark.SparkException: Job aborted\n"
            "Traceback (most recent call last):\nstreaming.errors.Renamed: a worker's own words\n"
            + encode(ServiceError("a worker's own words"))
            + "\n\n\tat org.apache.spark.api.python",
            "a worker's own words",
        ),
    ],
)
def test_cause_is_the_message_of_the_innermost_error(text: str, line: str) -> None:
    assert cause(PySparkException(text)) == line
