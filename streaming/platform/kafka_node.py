"""A Kafka node on loopback, broker and controller in one JVM: its configuration, storage and process."""

import contextlib
import itertools
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from streaming.environment import child_environment
from streaming.errors import ServiceError, UnavailableError
from streaming.platform.java import QUICK_JVM
from streaming.platform.log_tail import error_line
from streaming.platform.scratch import java_scratch

HOST = "127.0.0.1"
# Below those of outgoing connections, from 32768 or 49152, which could take a port before a server listens on it, or
# while it restarts. Source: ip_local_port_range in ip(7); RFC 6335.
PORTS = range(15_000, 32_000)
MAX_BATCH_BYTES = 21 * 1024**2  # an image of 20 MiB with its key and headers
POLL_S = 0.1
CONFIG_NAME = "server.properties"
LOG_NAME = "server.log"
# Relative to the node's working directory: Kafka splits lists of paths at commas, and Java reads properties files as
# Latin-1, so the path of a home cannot be used.
DATA = "data"
JVM_OPTIONS = (
    # A batch that expands to more than the heap is rejected; if the node cannot recover, it exits.
    *("-Xms64m", "-Xmx512m"),
    *(*QUICK_JVM, "-Xshare:auto"),  # ready after 3.2 s instead of 5.0 s
)
LOG4J = """\
status = warn
shutdownHook = disable
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}} %p %m (%c{{1}})%n
appender.file.policies.type = SizeBasedTriggeringPolicy
appender.file.policies.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
"""

_start = random.SystemRandom().choice(PORTS)
_candidates: Iterator[int] = itertools.cycle(itertools.chain(range(_start, PORTS.stop), range(PORTS.start, _start)))


@dataclass(frozen=True)
class KafkaNode:
    """A node with its configuration, data and logs in `directory`.

    Attributes:
        port: of its plaintext listener on loopback.
        classpath: with Kafka's jars.
        extra: additional Kafka properties.
    """

    directory: Path
    port: int
    java: Path
    classpath: str
    extra: Mapping[str, str] = field(default_factory=dict)

    def configure(self) -> None:
        """Write the configuration. The quorum is static, so that the next start may use another port."""
        controller_port = free_port()
        properties = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "listeners": f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.voters": f"1@{HOST}:{controller_port}",
            "log.dirs": DATA,
            "num.partitions": max(2, os.cpu_count() or 1),
            # The default, 500 ms, doubles the CPU time of an idle broker and writes to the disk each time.
            "metadata.max.idle.interval.ms": 10_000,
            "auto.create.topics.enable": "true",
            "message.max.bytes": MAX_BATCH_BYTES,
            "replica.fetch.max.bytes": MAX_BATCH_BYTES,
            "replica.fetch.response.max.bytes": MAX_BATCH_BYTES,
            "group.initial.rebalance.delay.ms": 0,
            # The broker decompresses batches, and rejects those that are too large. Images do not compress anyway.
            "compression.type": "uncompressed",
            # Retention counts from the arrival of a message, not from the time when an image was taken.
            "log.message.timestamp.type": "LogAppendTime",
        }
        for internal in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
            properties |= {f"{internal}.replication.factor": 1, f"{internal}.num.partitions": 4}
        for internal in ("transaction.state.log", "share.coordinator.state.topic"):
            properties[f"{internal}.min.isr"] = 1
        properties |= self.extra
        lines = [f"{name}={value}\n" for name, value in properties.items()]
        self._config.write_text("".join(lines))
        (self.directory / "log4j2.properties").write_text(LOG4J.format(log=LOG_NAME))

    def format_storage(self) -> None:
        """Format the data directory with a cluster id, if it has none; Kafka requires it."""
        if (self.directory / DATA / "meta.properties").exists():
            return
        command = self._command("kafka.tools.StorageTool", "format", "-t", uuid4().hex[:22], "-c", str(self._config))
        done = subprocess.run(
            command, cwd=self.directory, env=child_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ServiceError(f"could not format the broker's storage: {error_line(done.stdout + done.stderr)}")

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the node's JVM in its own session, so that Ctrl-C and closing the terminal do not affect it."""
        self._log.unlink(missing_ok=True)  # so that its last lines are about this start
        with (self.directory / "jvm.log").open("wb") as output:
            return subprocess.Popen(
                self._command("kafka.Kafka", str(self._config)),
                cwd=self.directory,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Wait until the node answers an admin request.

        Raises:
            ServiceError: its process ended, with the last error in its log; or the timeout expired.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                log = "".join(_read(path) for path in (self._log, self.directory / "jvm.log"))
                raise ServiceError(f"the broker ended while it started: {error_line(log)}; see {self._log}")
            if self._answers():
                return
            time.sleep(POLL_S)
        raise UnavailableError(f"the broker did not answer within {timeout_s:.0f} s: see {self._log}")

    @property
    def _config(self) -> Path:
        return self.directory / CONFIG_NAME

    @property
    def _log(self) -> Path:
        return self.directory / LOG_NAME

    def _command(self, *arguments: str) -> list[str]:
        return [
            *(str(self.java), *JVM_OPTIONS, *java_scratch(), "-Dlog4j2.configurationFile=log4j2.properties"),
            *("-cp", self.classpath, *arguments),
        ]

    def _answers(self) -> bool:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        try:
            socket.create_connection((HOST, self.port), POLL_S).close()  # the client would log an error
            with contextlib.closing(KafkaAdminClient(bootstrap_servers=f"{HOST}:{self.port}")) as admin:
                return bool(admin.describe_cluster()["brokers"])
        except (OSError, KafkaError):
            return False


def free_port() -> int:
    """A free port on loopback, which no earlier call in this process returned."""
    return next(port for port in _candidates if not is_taken(port))


def is_taken(port: int) -> bool:
    """Whether a process on this machine listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore closed connections, as Java does
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
