"""The broker of a home: start, restart, ports, stop, and errors in one line."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kafka import KafkaProducer
from kafka.errors import MessageSizeTooLargeError

from streaming.errors import ServiceError
from streaming.platform.broker import (
    bootstrap_servers,
    log_file,
    remembered_port,
    running_broker,
    start_broker,
    stop_broker,
)
from streaming.platform.kafka_node import CONFIG_NAME, PORTS, free_port, is_taken
from streaming.settings import Settings
from tests.faults.harness import has_ended, wait_until
from tests.producer.topics import messages

MIB = 1024**2
# A process with the command line of a broker, whose parent never waits for it.
NEGLIGENT_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", sys.argv[1]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def listener(port: int = 0) -> Iterator[int]:
    """A port in use, as by another process."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        yield int(taken.getsockname()[1])


@pytest.fixture
def own(jars_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A home without a broker; a broker that a test starts in it is stopped."""
    # The locale has no letters such as ç, and commas separate the entries of Kafka's lists.
    monkeypatch.setenv("LC_ALL", "POSIX")
    settings = Settings(home=tmp_path / "fran\u00e7ois m\u00fcller, #1", jars=jars_dir, bootstrap_servers=None)
    yield settings
    assert {path.name for path in tmp_path.glob("fran*")} <= {Path(settings.home).name}
    stop_broker(settings)


def send(servers: str, topic: str, *values: bytes) -> None:
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", max_request_size=64 * MIB)
    with contextlib.closing(producer):
        for value in values:
            producer.send(topic, value).get(timeout=300)


def test_free_ports_differ_and_are_not_in_use() -> None:
    with listener(free_port()) as taken:
        ports = [free_port() for _ in PORTS]  # the last ones after each port was tried
    assert taken in PORTS
    assert taken not in ports
    assert set(ports) <= set(PORTS)
    assert len(set(ports[:1_000])) == 1_000


def test_broker_starts_once_and_restarts_on_its_port_with_its_data(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, started = start_broker(own, free_port())
    assert started
    assert start_broker(own) == (first, False)
    # As reported by the kernel while it loads a program.
    hidden: list[list[str]] = [[], []]
    command_of = psutil.Process.cmdline
    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "cmdline", lambda process: hidden.pop() if hidden else command_of(process))
        assert running_broker(own) == first
    assert not hidden
    with pytest.raises(ServiceError, match=f"running on port {first.port}, not {first.port + 1}: stop it first"):
        start_broker(own, first.port + 1)

    send(first.address, "kept", b"one", b"two")
    psutil.Process(first.pid).kill()
    wait_until(lambda: has_ended(first.pid) and not is_taken(first.port), lambda: "the broker is running")
    assert running_broker(own) is None

    second, started = start_broker(own)
    assert started
    assert (second.port, second.pid != first.pid) == (first.port, True)

    def kept() -> list[bytes]:
        return sorted(message.value for message in messages(second.address, "kept"))

    wait_until(lambda: bool(kept()), lambda: "the topic is empty or missing")  # its partition has no leader at first
    assert kept() == [b"one", b"two"]

    assert stop_broker(own)
    assert not stop_broker(own)
    assert not is_taken(first.port)
    assert remembered_port(own) == first.port
    assert "shut down completed" in log_file(own).read_text()


def test_broker_chooses_and_remembers_another_port_if_its_own_is_in_use(own: Settings) -> None:
    with listener() as taken:
        (own.work_dir / "broker").mkdir(parents=True)
        (own.work_dir / "broker" / "broker.json").write_text(f'{{"port": {taken}, "pid": 0}}')
        state, _ = start_broker(own)
        assert state.port != taken
    assert bootstrap_servers(own) == state.address
    stop_broker(own)
    assert remembered_port(own) == state.port


def test_requested_port_in_use_is_a_one_line_error(own: Settings) -> None:
    with listener() as taken, pytest.raises(ServiceError, match=f"port {taken} is taken by another process"):
        start_broker(own, taken)


def test_broker_accepts_messages_of_20_mib_but_not_of_22(broker: Settings) -> None:
    servers = bootstrap_servers(broker)
    largest = os.urandom(20 * MIB)
    send(servers, "large", largest)
    assert [message.value for message in messages(servers, "large")] == [largest]
    with pytest.raises(MessageSizeTooLargeError):
        send(servers, "large", os.urandom(22 * MIB))


def test_given_address_takes_precedence_over_the_home_broker(own: Settings) -> None:
    assert bootstrap_servers(own.model_copy(update={"bootstrap_servers": "kafka:9092"})) == "kafka:9092"


def test_missing_broker_is_reported_with_the_start_command(own: Settings) -> None:
    with pytest.raises(ServiceError, match=r"run `imagestream broker start`, or pass --bootstrap-servers"):
        bootstrap_servers(own)
    with pytest.raises(ServiceError, match="has not been started"):
        log_file(own)


def test_reused_process_id_is_not_the_broker(own: Settings) -> None:
    (own.work_dir / "broker").mkdir(parents=True)
    (own.work_dir / "broker" / "broker.json").write_text(f'{{"port": 9092, "pid": {os.getpid()}}}')
    assert running_broker(own) is None
    assert not stop_broker(own)


def test_damaged_state_file_is_treated_as_missing(own: Settings) -> None:
    (own.work_dir / "broker").mkdir(parents=True)
    (own.work_dir / "broker" / "broker.json").write_text('{"port": 90')
    assert running_broker(own) is None
    assert remembered_port(own) is None


def test_jvm_that_exits_at_start_is_a_one_line_error_from_its_log(own: Settings) -> None:
    data = own.work_dir / "broker" / "data"
    data.mkdir(parents=True)
    (data / "meta.properties").write_text("version=1\ncluster.id=other\nnode.id=7\n")  # another node's data
    with pytest.raises(ServiceError, match=r"the broker ended while it started: .*node.*see .*server\.log") as error:
        start_broker(own, free_port())
    assert "\n" not in str(error.value)
    assert running_broker(own) is None


def test_unwritable_home_is_a_one_line_error(jars_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match=r"cannot write to .*: choose another home with --home"):
        start_broker(Settings(home=tmp_path / "file" / "home", jars=jars_dir))


def test_broker_that_its_parent_does_not_wait_for_is_stopped(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, bootstrap_servers=None)
    settings.broker_dir.mkdir(parents=True)
    command = [sys.executable, "-c", NEGLIGENT_PARENT, str(settings.broker_dir / CONFIG_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        (settings.broker_dir / "broker.json").write_text(json.dumps({"port": 9092, "pid": pid}))
        assert stop_broker(settings)
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert not stop_broker(settings)
