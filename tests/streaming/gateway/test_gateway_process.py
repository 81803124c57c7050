"""`imagestream gateway` as a process of its own: where it listens, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from streaming.platform.broker import bootstrap_servers
from streaming.settings import Settings
from tests.faults.harness import wait_until
from tests.producer.topics import messages
from tests.streaming.gateway.test_gateway import JPEG, JPEG_TYPE, at


@pytest.fixture
def process(broker: Settings, topic: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it told."""
    command = [sys.executable, "-m", "streaming", "--home", str(tmp_path), "gateway", "--port", "0", "--topic", topic]
    command += ["--bootstrap-servers", bootstrap_servers(broker), "--json", str(tmp_path / "summary.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            said = running.stdout.readline()
            address = re.fullmatch(r"gateway: (http://127\.0\.0\.1:\d+)/docs\n", said)
            assert address, said
            assert json.loads((tmp_path / "summary.json").read_text())["url"] == address[1]
            yield running, address[1]
        finally:
            running.kill()


def _is_connected(pid: int, port: int) -> bool:
    """Whether the process has accepted a connection at its port."""
    found = psutil.Process(pid).net_connections("tcp")
    return any(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_the_upload_under_way(
    process: tuple[subprocess.Popen[str], str], broker: Settings, topic: str, number: signal.Signals
) -> None:
    running, url = process
    port = int(url.rpartition(":")[2])
    image = JPEG + os.urandom(10_000)

    def slowly() -> Iterator[bytes]:
        yield image[:5_000]
        # A connection that only the system knows of is nobody's yet.
        wait_until(lambda: _is_connected(running.pid, port), lambda: "the upload is taken in")
        time.sleep(0.5)  # for its head to be read
        running.send_signal(number)
        refused = False
        while not refused:  # it takes no more connections, and goes on with this one
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                refused = True
        yield image[5_000:]

    answer = httpx.post(f"{url}/images", content=slowly(), headers=JPEG_TYPE, timeout=30)
    assert answer.status_code == 202
    assert running.wait(30) == 0
    assert running.stderr is not None
    assert running.stderr.read() == ""
    assert at(messages(bootstrap_servers(broker), topic), answer.json()).value == image
