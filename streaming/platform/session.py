"""Spark sessions, configured alike for all jobs: jars from the home, Arrow, Delta, low overhead in local mode."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from models.errors import ModelError
from streaming.environment import clean_environment
from streaming.errors import ServiceError, decode, with_message
from streaming.platform.jars import install_jars, spark_jars
from streaming.platform.java import find_java
from streaming.platform.log_tail import error_line
from streaming.platform.machine import check_user
from streaming.platform.scratch import java_scratch, use_scratch
from streaming.settings import Settings
from streaming.storage.bucket_store import shared_variables
from streaming.storage.home import make_dir

SPARK_LOG = "spark.log"
GATEWAY_EXITED = "JAVA_GATEWAY_EXITED"  # PySpark's only information if the JVM has ended
MAX_LOG_BYTES = 256 * 1024
OUT_OF_MEMORY = b"java.lang.OutOfMemoryError"
LAST_ASCII = 0x7F
ROWS_PER_ARROW_BATCH = 64  # a batch of 64 images waits 0.1 s for its input, one of 250 images about 2 s
BYTES_PER_ARROW_BATCH = 8 * 1024**2  # limits the number of large messages in a batch

# Only the fast compiler: a JVM that moves bytes between Kafka and Python does not benefit from optimised code.
QUICK_START = "-XX:TieredStopAtLevel=1"
DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.databricks.delta.snapshotPartitions": "1",  # by default, a small log is read with 50 tasks
}
# For JVMs and Python workers: memory of large messages is returned to the system.
RETURN_MEMORY = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**2),
    "MALLOC_ARENA_MAX": "2",
}
UNIX_SOCKETS = "spark.python.unix.domain.socket.enabled"
CONF = {
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_PER_ARROW_BATCH),
    "spark.sql.execution.arrow.maxBytesPerBatch": str(BYTES_PER_ARROW_BATCH),
    "spark.sql.adaptive.enabled": "false",  # the few shuffles are small, and replanning costs more than it saves
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.enabled": "false",
    # Without Hadoop's native library, Spark's default file manager starts ten processes (chmod, readlink) per
    # micro-batch, which takes 60 ms. This one renames within Java, which suffices for a single writer.
    "spark.sql.streaming.checkpointFileManagerClass": (
        "org.apache.spark.sql.execution.streaming.checkpointing.FileSystemBasedCheckpointFileManager"
    ),
    # Between the JVM and Python workers, TCP delays small micro-batches by 40 ms (Nagle and delayed ACK).
    UNIX_SOCKETS: "true",
    **{f"spark.executorEnv.{name}": value for name, value in RETURN_MEMORY.items()},
    "spark.executorEnv.PYTHONSAFEPATH": "1",  # workers do not import modules from their working directory
    "spark.ui.showConsoleProgress": "false",
    # Otherwise, each operation of a data frame makes several calls to the JVM to record its line for error messages.
    "spark.python.sql.dataFrameDebugging.enabled": "false",
    "spark.log.level": "WARN",
}
MAX_SOCKET_DIR = 64  # characters: socket paths are limited to 104 to 108, and Spark appends 43
LOOPBACK = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}  # in local mode


@contextmanager
def spark_session(
    settings: Settings,
    name: str,
    *,
    delta: bool = False,
    java_options: str = "",
    conf: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[SparkSession]:
    """A Spark session with the home's jars, which is stopped at the end of the block.

    If the process already has a Spark session, such as a notebook's, the job gets a new session in the same context:
    then only SQL settings apply, and the context must have the jars.

    Args:
        name: of the application.
        delta: whether to load Spark's Delta reader and writer, which takes seconds; the stream, training and retraining
            use `deltalake` and Parquet files instead.
        java_options: for the JVM, e.g. `QUICK_START`.
        conf: additional Spark settings.

    Raises:
        ServiceError: the user has no name, there is no usable Java, a jar is missing and cannot be fetched, the home
            cannot be written to, Spark does not start, or a job in the block fails.
    """
    log = make_dir(settings.work_dir) / SPARK_LOG
    running = SparkSession.getActiveSession()
    if running is not None:
        with _failures_of_jobs(log, settings.driver_memory):
            yield _session_in_context(running, CONF | dict(conf))
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
    else:  # executors have their own credentials, since Spark settings appear in logs and pages
        network = {f"spark.executorEnv.{name}": value for name, value in shared_variables().items()}
    for key, value in (CONF | (DELTA if delta else {}) | network | dict(conf)).items():
        builder = builder.config(key, value)
    # PySpark reads the first two, and the JVM the others, from the environment when they start.
    variables = {"JAVA_HOME": str(java.parent.parent), "PYSPARK_PYTHON": sys.executable, **RETURN_MEMORY}
    before = log.stat().st_size if log.exists() else 0
    with clean_environment(local=local, **variables), _output_to(log):
        try:
            spark = builder.getOrCreate()
        except (PySparkException, Py4JError, OSError) as error:
            raise ServiceError(
                f"Spark did not start ({_cause_from_log(error, log, before)}); its log: {log}"
            ) from error
    # As for SQL functions. Otherwise, RDD operations (a data frame of a list, for example) start separate workers.
    spark.sparkContext.environment["SPARK_SIMPLIFIED_TRACEBACK"] = "1"
    try:
        with _failures_of_jobs(log, settings.driver_memory):
            yield spark
    finally:
        with suppress(Py4JError, OSError):  # the JVM may have ended
            spark.stop()


def _cause_from_log(error: Exception, log: Path, before: int) -> str:
    """The cause of an error; if the JVM has ended, it is read from the log, from byte `before` on."""
    if GATEWAY_EXITED not in str(error):
        return cause(error)
    return error_line(_read_log(log, before).decode("utf-8", "replace"))


@contextmanager
def _failures_of_jobs(log: Path, memory: str) -> Iterator[None]:
    before = log.stat().st_size if log.exists() else 0
    try:
        yield
    except (PySparkException, Py4JError, ConnectionError) as error:
        # The error is only that the context was shut down, or that the JVM has ended.
        if OUT_OF_MEMORY in _read_log(log, before):
            message = f"Spark's JVM ran out of its memory of {memory}: set a larger --driver-memory; its log: {log}"
            raise ServiceError(message) from error
        if isinstance(error, ConnectionError):
            raise
        message = f"a Spark job failed: {cause(error)}; its log: {log}"
        found = decode(_text(error))
        raise (ServiceError(message) if found is None else with_message(found, message)) from error


def _read_log(log: Path, before: int) -> bytes:
    """The last `MAX_LOG_BYTES` of the log, without its first `before` bytes; empty if the file does not exist."""
    if not log.exists():
        return b""
    with log.open("rb") as file:
        file.seek(max(before, log.stat().st_size - MAX_LOG_BYTES))
        return file.read(MAX_LOG_BYTES)


def _session_in_context(running: SparkSession, conf: Mapping[str, str]) -> SparkSession:
    """A new session in a running context, with those settings that can still be changed."""
    session = running.newSession()
    for key, value in conf.items():
        if session.conf.isModifiable(key):
            session.conf.set(key, value)
    return session


@cache
def _socket_dir() -> "TemporaryDirectory[str]":
    """The folder for sockets of all sessions of the process, since the JVM keeps the first one; deleted at exit."""
    return TemporaryDirectory(prefix="imagestream-", ignore_cleanup_errors=True)


def _sockets_in(folder: str) -> dict[str, str]:
    """The setting for the workers' sockets in a private folder; TCP if its path is too long."""
    if len(folder) > MAX_SOCKET_DIR:
        return {UNIX_SOCKETS: "false"}
    return {"spark.python.unix.domain.socket.dir": folder}


def raised(error: Exception) -> Exception:
    """The error of this package that a Python worker raised, if a Spark job failed because of it; else `error`."""
    if isinstance(error, PySparkException | Py4JError):
        return decode(_text(error)) or error
    return error


def _text(error: Exception) -> str:
    """The message of an error of Spark, which is in the JVM: its class name if the JVM has ended."""
    try:
        return str(error)
    except (Py4JError, OSError):
        return type(error).__name__


def cause(error: BaseException) -> str:
    """The cause of an error, in one line: for Spark errors, the innermost Python error, or else the first line."""
    if isinstance(error, ServiceError | ModelError):
        return str(error)
    if not isinstance(error, PySparkException | Py4JError):
        return f"{type(error).__name__}: {error}"
    text = _text(error)
    if found := decode(text):
        return str(found)
    errors = re.findall(r"^(?:: )?(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    if not errors:
        return text.strip().split("\n", 1)[0] or "no reason given"
    kind, message = errors[-1]
    return str(message) if kind == ModelError.__name__ else f"{kind}: {message}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect the output of processes that are started in the block, permanently: the JVM and its Python workers."""
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
    """The JVM option for a configuration that logs to a file of the home; job errors are raised as exceptions."""
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
    """Escaped text for a properties file, which Java reads as Latin-1 and in which Log4j substitutes variables."""
    units = text.replace("\\", "\\\\").replace("${", "$${").encode("utf-16-be")
    codes = (int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2))
    return "".join(chr(code) if code < LAST_ASCII else f"\\u{code:04x}" for code in codes)
