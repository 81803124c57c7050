"""The embedded broker: a real single-node Apache Kafka (KRaft, broker and controller in one) on loopback.

It is a process of its own, which outlives the command that started it. Its data, log and configuration lie in the
home's `broker/`; `broker.json` there remembers its port, and which process it is. A broker that was killed starts again
with its data: Kafka recovers its own logs, and the kernel has released its locks.
"""

import contextlib
import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from streaming.errors import ConfigurationError, ConflictError, NotFoundError, UnavailableError
from streaming.platform.jars import Progress, broker_classpath, install_jars
from streaming.platform.java import find_java
from streaming.platform.kafka_node import CONFIG_NAME, HOST, LOG_NAME, KafkaNode, free_port
from streaming.platform.scratch import use_scratch
from streaming.settings import Settings
from streaming.storage.home import locked, make_dir

DEFAULT_PORT = 9092
COMMAND_WITHIN_S = 2.0  # on a busy machine a process that has just been started shows no command yet
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class BrokerState:
    """What `broker.json` remembers: the port, which a later start takes again, and the process."""

    port: int
    pid: int

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


def bootstrap_servers(settings: Settings) -> str:
    """The brokers to talk to: the given ones, or else the home's own, which must be running.

    Raises:
        ServiceError: none was given, and the home's broker is not running.
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
            f"the broker of {settings.home} talks PLAINTEXT, not {settings.kafka_security_protocol}: name the secured "
            "one with IMAGESTREAM_BOOTSTRAP_SERVERS, or leave IMAGESTREAM_KAFKA_SECURITY_PROTOCOL out"
        )
    return state.address


def running_broker(settings: Settings) -> BrokerState | None:
    """The home's broker, if its process is alive."""
    state = _read_state(settings)
    return state if state is not None and _process(settings, state) is not None else None


def remembered_port(settings: Settings) -> int | None:
    """The port that the home's broker took last."""
    state = _read_state(settings)
    return state.port if state is not None else None


def start_broker(
    settings: Settings, port: int | None = None, *, timeout_s: float = 90, on_progress: Progress | None = None
) -> tuple[BrokerState, bool]:
    """Start the home's broker, and wait until it answers; (its state, False if it was running already).

    Args:
        port: the port to listen on; by default the remembered one, or 9092, or a free one when that is taken.
        on_progress: told of the jars that are fetched, if any is missing.

    Raises:
        ServiceError: no Java, no jars, the port that was asked for is taken, or the broker ended or did not answer.
    """
    directory = make_dir(settings.broker_dir)
    with locked(directory / ".lock"):
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
        _write_state(settings, state)  # before it is ready: an interrupted start can still be stopped
        try:
            kafka.await_ready(process, timeout_s)
        except BaseException:  # an interrupt too: what did not become ready must not stay behind
            process.terminate()
            raise
        return state, True


def stop_broker(settings: Settings, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the home's broker, cleanly if it obeys in time; False if it was not running. Its port stays remembered."""
    state = _read_state(settings)
    process = _process(settings, state) if state is not None else None
    if process is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            process.wait(timeout_s)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(timeout_s)
    return True


def log_file(settings: Settings) -> Path:
    """The log of the home's broker.

    Raises:
        ServiceError: there is none, for the broker has never been started.
    """
    path = settings.broker_dir / LOG_NAME
    if not path.is_file():
        raise NotFoundError(f"no log at {path}: the broker has not been started yet; run `imagestream broker start`")
    return path


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log."""
    with path.open(errors="replace") as file:
        return list(deque(file, maxlen=count))


def added_lines(path: Path, poll_s: float = 0.5) -> Iterator[str]:
    """Each line that is added to a log from now on, for ever; begins anew with each new file of that name."""
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


def is_taken(port: int) -> bool:
    """Whether something on this machine listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections do not count, as for Java
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _process(settings: Settings, state: BrokerState) -> psutil.Process | None:
    """The broker's process if it is alive; process ids are used again, so its command must name our configuration."""
    try:
        process = psutil.Process(state.pid)
        deadline = time.monotonic() + COMMAND_WITHIN_S
        while not (command := process.cmdline()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return process if str(settings.broker_dir / CONFIG_NAME) in command else None
    except psutil.Error:  # ended, or ended and not yet collected by its parent
        return None


def _read_state(settings: Settings) -> BrokerState | None:
    try:
        return BrokerState(**json.loads((settings.broker_dir / "broker.json").read_text()))
    except (OSError, ValueError, TypeError):  # never started, or damaged: then nothing is remembered
        return None


def _write_state(settings: Settings, state: BrokerState) -> None:
    whole = settings.broker_dir / "broker.json.new"
    whole.write_text(json.dumps(asdict(state)) + "\n")
    whole.replace(settings.broker_dir / "broker.json")


def _choose_port(settings: Settings, port: int | None) -> int:
    if port is not None:
        if is_taken(port):
            raise ConflictError(f"port {port} is taken by another process: pass another --port, or none for a free one")
        return port
    preferred = remembered_port(settings) or DEFAULT_PORT
    return free_port() if is_taken(preferred) else preferred
