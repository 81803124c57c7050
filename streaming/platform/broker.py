"""The embedded broker: a single-node Apache Kafka (KRaft, broker and controller in one process) on loopback.

It runs in its own process, which outlives the command that started it. Its data, log and configuration are in the
home's `broker/`; `broker.json` there has its port and process id. A broker that was killed restarts with its data:
Kafka recovers its own logs, and the kernel has released its locks.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from streaming.errors import ConfigurationError, ConflictError, NotFoundError, UnavailableError
from streaming.platform.jars import Progress, broker_classpath, install_jars
from streaming.platform.java import find_java
from streaming.platform.kafka_node import CONFIG_NAME, HOST, LOG_NAME, KafkaNode, free_port, is_taken
from streaming.platform.scratch import use_scratch
from streaming.settings import Settings
from streaming.storage.atomic_file import write_json
from streaming.storage.home import lock, make_dir

DEFAULT_PORT = 9092
COMMAND_TIMEOUT_S = 2.0  # on a busy machine, a new process may not show its command yet
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class BrokerState:
    """The content of `broker.json`: the port, which a later start reuses, and the process id."""

    port: int
    pid: int

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


def bootstrap_servers(settings: Settings) -> str:
    """The addresses of the configured brokers, or of the home's broker, which must be running.

    Raises:
        ServiceError: no broker is configured, and the home's broker is not running.
    """
    if settings.bootstrap_servers:
        return settings.bootstrap_servers
    state = running_broker(settings)
    if state is None:
        raise UnavailableError(
            f"no Kafka broker: the one of {settings.home} is not running; "
            "run `imagestream broker start`, or pass --bootstrap-servers HOST:PORT"
        )
    if settings.kafka_security_protocol != "PLAINTEXT":
        raise ConfigurationError(
            f"the broker of {settings.home} uses PLAINTEXT, not {settings.kafka_security_protocol}: set "
            "IMAGESTREAM_BOOTSTRAP_SERVERS to a secured broker, or unset IMAGESTREAM_KAFKA_SECURITY_PROTOCOL"
        )
    return state.address


def running_broker(settings: Settings) -> BrokerState | None:
    """The home's broker, if its process is alive."""
    state = _read_state(settings)
    return state if state is not None and _process(settings, state) is not None else None


def remembered_port(settings: Settings) -> int | None:
    """The last port of the home's broker."""
    state = _read_state(settings)
    return state.port if state is not None else None


def start_broker(
    settings: Settings, port: int | None = None, *, timeout_s: float = 90, on_progress: Progress | None = None
) -> tuple[BrokerState, bool]:
    """Start the home's broker, and wait until it answers; return its state, and False if it was already running.

    Args:
        port: the port to listen on; by default the last one or 9092, or a free one if that is taken.
        timeout_s: how long to wait for an answer.
        on_progress: called for the jars that are fetched, if any are missing.

    Raises:
        ServiceError: Java or jars are missing, the requested port is taken, or the broker ended or did not answer.
    """
    directory = make_dir(settings.broker_dir)
    with lock(directory / ".lock"):
        running = running_broker(settings)
        if running is not None:
            if port not in (None, running.port):
                raise ConflictError(f"the broker is running on port {running.port}, not {port}: stop it first")
            return running, False
        use_scratch(settings.work_dir)
        java = find_java(settings.work_dir)
        install_jars(settings.jars_dir, java, on_progress)
        port = _choose_port(settings, port)
        kafka = KafkaNode(directory, port, java, broker_classpath(settings.jars_dir))
        kafka.configure()
        kafka.format_storage()
        process = kafka.launch()
        state = BrokerState(port, process.pid)
        # Before it is ready, so that an interrupted start can be stopped.
        write_json(directory / "broker.json", asdict(state))
        try:
            kafka.await_ready(process, timeout_s)
        except BaseException:  # including KeyboardInterrupt: do not leave a process that is not ready
            process.terminate()
            raise
        return state, True


def stop_broker(settings: Settings, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the home's broker, or kill it after `timeout_s`; False if it was not running.

    Raises:
        ServiceError: it did not end.
    """
    state = _read_state(settings)
    process = _process(settings, state) if state is not None else None
    if process is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        if not _ends(process, timeout_s):
            process.kill()
            if not _ends(process, timeout_s):
                raise UnavailableError(
                    f"the broker, process {process.pid}, is still running {timeout_s:.0f} s after SIGKILL: "
                    "check its disk"
                )
    return True


def log_file(settings: Settings) -> Path:
    """The log of the home's broker; raises ServiceError if there is none, since the broker has never been started."""
    path = settings.broker_dir / LOG_NAME
    if not path.is_file():
        raise NotFoundError(f"no log at {path}: the broker has not been started yet; run `imagestream broker start`")
    return path


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log."""
    with path.open(errors="replace") as file:
        return list(deque(file, maxlen=count))


def added_lines(path: Path, poll_s: float = 0.5) -> Iterator[str]:
    """Yield each line that is added to a log from now on, without end, following log rotation."""
    file = path.open(errors="replace")
    file.seek(0, os.SEEK_END)
    try:
        while True:
            if line := file.readline():
                yield line
                continue
            time.sleep(poll_s)
            if path.exists() and path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = path.open(errors="replace")
    finally:
        file.close()


def _ends(process: psutil.Process, timeout_s: float) -> bool:
    """Whether a process ends in time. A zombie has ended, even if its parent, another process, never waits for it."""
    deadline = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(0)  # removes a zombie that is a child of this process
    return True


def _process(settings: Settings, state: BrokerState) -> psutil.Process | None:
    """The broker's process if it is alive. Process ids are reused, so its command must name our configuration."""
    try:
        process = psutil.Process(state.pid)
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while not (command := process.cmdline()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return process if str(settings.broker_dir / CONFIG_NAME) in command else None
    except psutil.Error:  # the process has ended, or is a zombie
        return None


def _read_state(settings: Settings) -> BrokerState | None:
    try:
        return BrokerState(**json.loads((settings.broker_dir / "broker.json").read_text()))
    except (OSError, ValueError, TypeError):  # never started, or damaged
        return None


def _choose_port(settings: Settings, port: int | None) -> int:
    if port is not None:
        if is_taken(port):
            raise ConflictError(f"port {port} is taken by another process: choose another --port, or omit it")
        return port
    preferred = remembered_port(settings) or DEFAULT_PORT
    return free_port() if is_taken(preferred) else preferred
