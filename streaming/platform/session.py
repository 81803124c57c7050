"""The Spark session, the same for every job: jars from the home, Arrow to the workers, Delta, small local overheads."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from models.errors import ModelError
from streaming.environment import clean_environment
from streaming.errors import ServiceError, decode, restated
from streaming.platform.jars import install_jars, spark_jars
from streaming.platform.java import find_java
from streaming.platform.last_words import telling_line
from streaming.platform.machine import check_user
from streaming.platform.scratch import java_scratch, use_scratch
from streaming.settings import Settings
from streaming.storage.home import make_dir
from streaming.storage.store import shared_variables

SPARK_LOG = "spark.log"
GATEWAY_EXITED = "JAVA_GATEWAY_EXITED"  # PySpark knows no more than that
MAX_LAST_WORDS = 256 * 1024
LAST_ASCII = 0x7F
ROWS_PER_ARROW_BATCH = 64  # a batch of 64 images waits 0.1 s for its input, one of 250 about 2 s
BYTES_PER_ARROW_BATCH = 8 * 1024**2  # of large messages few are under way at a time

# Compile quickly rather than well: a JVM that only moves bytes between Kafka and Python gains nothing from more.
QUICK_START = "-XX:TieredStopAtLevel=1"
DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.databricks.delta.snapshotPartitions": "1",  # a small log needs no 50 tasks to be read
}
# For JVMs and Python workers: memory goes back to the system when a large message is done with.
GIVES_BACK = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**2),
    "MALLOC_ARENA_MAX": "2",
}
UNIX_SOCKETS = "spark.python.unix.domain.socket.enabled"
CONF = {
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_PER_ARROW_BATCH),
    "spark.sql.execution.arrow.maxBytesPerBatch": str(BYTES_PER_ARROW_BATCH),
    "spark.sql.adaptive.enabled": "false",  # our few shuffles are small: planning them anew costs more than it saves
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.enabled": "false",
    # Spark's usual way to write offsets starts ten processes (chmod, readlink) per micro-batch where Hadoop's native
    # library is missing, 60 ms of it. This one renames within Java, which is enough: a checkpoint has but one writer.
    "spark.sql.streaming.checkpointFileManagerClass": (
        "org.apache.spark.sql.execution.streaming.checkpointing.FileSystemBasedCheckpointFileManager"
    ),
    # Between the JVM and Python workers, TCP holds small micro-batches back for 40 ms (Nagle and delayed ACK).
    UNIX_SOCKETS: "true",
    **{f"spark.executorEnv.{name}": value for name, value in GIVES_BACK.items()},
    "spark.executorEnv.PYTHONSAFEPATH": "1",  # a worker imports nothing from the folder that it happens to run in
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "WARN",
}
MAX_SOCKET_DIR = 64  # letters: the system takes paths of up to 104 to 108, and Spark appends 43
LOOPBACK = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}  # where all is on one machine


@contextmanager
def spark_session(
    settings: Settings,
    name: str,
    *,
    delta: bool = False,
    java_options: str = "",
    conf: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[SparkSession]:
    """A Spark session with the home's jars, stopped on the way out.

    In a process that has a Spark session already, such as a notebook's or an application's, the job gets a new session
    in the same context, which stays as it is: only the settings of SQL apply, and the jars must be there.

    Args:
        delta: with Spark's own Delta reader and writer, which take seconds to load; the stream, training and
            retraining go through `deltalake` and Parquet files instead.
        java_options: for the JVM, e.g. `QUICK_START`.
        conf: Spark's own settings on top.

    Raises:
        ServiceError: the user has no name, there is no usable Java, a jar is missing and cannot be fetched, the home
            cannot be written, Spark does not start, or a job in the block fails.
    """
    log = make_dir(settings.work_dir) / SPARK_LOG
    running = SparkSession.getActiveSession()
    if running is not None:
        with _failures_of_jobs(log):
            yield _session_beside(running, CONF | dict(conf))
        return
    check_user()
    use_scratch(settings.work_dir)
    java = find_java(settings.work_dir)
    install_jars(settings.jars_dir, java)
    builder = (
        SparkSession.builder.master(settings.master)
        .appName(name)
        .config("spark.jars", ",".join(str(jar) for jar in spark_jars(settings.jars_dir)))
        .config("spark.driver.memory", settings.driver_memory)
        .config("spark.sql.warehouse.dir", str(settings.work_dir / "warehouse"))
        .config("spark.driver.extraJavaOptions", f"{_log4j(settings)} {shlex.join(java_scratch())} {java_options}")
    )
    local = settings.master.startswith("local")
    if local:
        network = LOOPBACK | _sockets_in(_socket_dir().name)
    else:  # executors have credentials of their own, which a setting of Spark's would show in logs and pages
        network = {f"spark.executorEnv.{name}": value for name, value in shared_variables().items()}
    for key, value in (CONF | (DELTA if delta else {}) | network | dict(conf)).items():
        builder = builder.config(key, value)
    # PySpark takes the first two, and the JVM the others, from the environment only, and only when they start.
    variables = {"JAVA_HOME": str(java.parent.parent), "PYSPARK_PYTHON": sys.executable, **GIVES_BACK}
    before = log.stat().st_size if log.exists() else 0
    with clean_environment(local=local, **variables), _output_to(log):
        try:
            spark = builder.getOrCreate()
        except (PySparkException, Py4JError, OSError) as error:
            raise ServiceError(f"Spark did not start ({_why(error, log, before)}); its log: {log}") from error
    try:
        with _failures_of_jobs(log):
            yield spark
    finally:
        spark.stop()


def _why(error: Exception, log: Path, before: int) -> str:
    """What Spark said last; where its JVM has ended, only its log, from byte `before` on, says why."""
    if GATEWAY_EXITED not in str(error):
        return cause(error)
    with log.open("rb") as file:
        file.seek(before)
        return telling_line(file.read(MAX_LAST_WORDS).decode("utf-8", "replace"))


@contextmanager
def _failures_of_jobs(log: Path) -> Iterator[None]:
    try:
        yield
    except (PySparkException, Py4JError) as error:
        message = f"a Spark job failed: {cause(error)}; its log: {log}"
        found = decode(str(error))
        raise (ServiceError(message) if found is None else restated(found, message)) from error


def _session_beside(running: SparkSession, conf: Mapping[str, str]) -> SparkSession:
    """A session of its own, with those of the settings that may still be chosen when the JVM runs."""
    session = running.newSession()
    for key, value in conf.items():
        if session.conf.isModifiable(key):
            session.conf.set(key, value)
    return session


@cache
def _socket_dir() -> "TemporaryDirectory[str]":
    """One for all sessions of the process, since the JVM keeps the folder of its first one; removed at the exit."""
    return TemporaryDirectory(prefix="imagestream-", ignore_cleanup_errors=True)


def _sockets_in(folder: str) -> dict[str, str]:
    """The workers' sockets in a folder where nobody else can connect; TCP, if its name is too long for them."""
    if len(folder) > MAX_SOCKET_DIR:
        return {UNIX_SOCKETS: "false"}
    return {"spark.python.unix.domain.socket.dir": folder}


def raised(error: Exception) -> Exception:
    """The error of ours that a Python worker raised, as its type, where a Spark job failed for it; else `error`."""
    if isinstance(error, PySparkException | Py4JError):
        return decode(str(error)) or error
    return error


def cause(error: BaseException) -> str:
    """What an error is about, in one line: of Spark's, the innermost Python error in its text, else its first line."""
    if isinstance(error, ServiceError | ModelError):
        return str(error)
    if not isinstance(error, PySparkException | Py4JError):
        return f"{type(error).__name__}: {error}"
    text = str(error)
    if found := decode(text):
        return str(found)
    errors = re.findall(r"^(?:: )?(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    if not errors:
        return text.strip().split("\n", 1)[0] or "no reason given"
    kind, message = errors[-1]
    return str(message) if kind == ModelError.__name__ else f"{kind}: {message}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Where processes started in the block write their output: the JVM, and so its Python workers, for good."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminals = {number: os.dup(number) for number in (1, 2)}
    with path.open("ab") as file:
        for number in terminals:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, terminal in terminals.items():
            os.dup2(terminal, number)
            os.close(terminal)


def _log4j(settings: Settings) -> str:
    """Spark logs to a file of the home; what its jobs raise reaches the caller as an exception."""
    path, log = settings.work_dir / "log4j2.properties", _property(str(settings.work_dir / SPARK_LOG))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""\
rootLogger.level = warn
rootLogger.appenderRef.file.ref = file
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d %p %c{{1}}: %m%n%ex
appender.file.policies.type = SizeBasedTriggeringPolicy
appender.file.policies.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 3
"""
    )
    return f"-Dlog4j2.configurationFile={path.as_uri()}"


def _property(text: str) -> str:
    """A text in a file of properties, which Java reads as Latin-1 and Log4j substitutes variables in."""
    units = text.replace("\\", "\\\\").replace("${", "$${").encode("utf-16-be")
    codes = (int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2))
    return "".join(chr(code) if code < LAST_ASCII else f"\\u{code:04x}" for code in codes)
