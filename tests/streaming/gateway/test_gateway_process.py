"""`imagestream gateway` as a separate process: its address and its shutdown."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from streaming.platform.broker import bootstrap_servers
from streaming.settings import Settings
from tests.faults.harness import wait_until
from tests.producer.topics import messages
from tests.streaming.gateway.test_gateway import JPEG, JPEG_TYPE, message_at


@pytest.fixture
def process(broker: Settings, topic: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address that it printed."""
    command = [sys.executable, "-m", "streaming", "--home", str(tmp_path), "gateway", "--port", "0", "--topic", topic]
    command += ["--bootstrap-servers", bootstrap_servers(broker), "--json", str(tmp_path / "summary.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline()
            address = re.fullmatch(r"gateway: (http://127\.0\.0\.1:\d+)/docs\n", line)
            assert address, line
            assert json.loads((tmp_path / "summary.json").read_text())["url"] == address[1]
            yield running, address[1]
        finally:
            running.kill()


def _has_read_all(pid: int, port: int) -> bool:
    """Whether the process has accepted a connection at its port and read all that was sent."""
    accepted = psutil.Process(pid).net_connections("tcp")
    if not any(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in accepted):
        return False
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    queues = [queue for _, ours, theirs, _, queue, *_ in rows if f":{port:04X}" in (ours[-5:], theirs[-5:])]
    return all(queue == "00000000:00000000" for queue in queues)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_finishes_the_upload_in_progress(
    process: tuple[subprocess.Popen[str], str], broker: Settings, topic: str, number: signal.Signals
) -> None:
    running, url = process
    port = int(url.rpartition(":")[2])
    image = JPEG + os.urandom(10_000)

    def slowly() -> Iterator[bytes]:
        yield image[:5_000]
        # A connection that only the kernel has accepted would be closed.
        wait_until(lambda: _has_read_all(running.pid, port), lambda: "the upload was not accepted")
        running.send_signal(number)
        refused = False
        while not refused:  # it accepts no new connections and continues with this one
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                refused = True
        yield image[5_000:]

    response = httpx.post(f"{url}/images", content=slowly(), headers=JPEG_TYPE, timeout=300)
    assert response.status_code == 202
    assert running.wait(300) == 0
    assert running.stderr is not None
    assert running.stderr.read() == ""
    assert message_at(messages(bootstrap_servers(broker), topic), response.json()).value == image
