"""A real S3 server for tests: SeaweedFS from its wheel, on loopback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from streaming.platform.kafka_node import free_port, is_taken
from streaming.storage.store import open_store

BUCKET = "imagestream"
WEED = Path(sys.executable).with_name("weed")
KEY, SECRET = "testkey", "testsecret-5f1d"  # pragma: allowlist secret
READER_KEY = "readerkey"  # has permission to read and list
GRPC = 10_000  # offset of a service's gRPC port from its HTTP port
PATIENCE_S = 120.0


@dataclass(frozen=True)
class ObjectStoreServer:
    """A running server with an empty bucket."""

    pid: int
    port: int

    def environment(self, port: int | None = None) -> dict[str, str]:
        """The standard variables of S3 clients.

        Args:
            port: the port of a proxy in front of the server.
        """
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    @property
    def options(self) -> Mapping[str, str]:
        """The storage options of a client, as obstore and deltalake name them."""
        return {
            "aws_endpoint": f"http://127.0.0.1:{self.port}",
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
            "aws_region": "us-east-1",
            "aws_allow_http": "true",
        }


def start_object_store(home: Path) -> ObjectStoreServer:
    """The server of `home`, started by the first process that calls this."""
    home.mkdir(exist_ok=True)
    state = home / "state.json"
    with FileLock(home / "start.lock"):
        if state.exists():
            return ObjectStoreServer(**json.loads(state.read_text()))
        server, filer = _start(home)
        _await(server, filer)
        state.write_text(json.dumps(asdict(server)))
        return server


def stop_object_store(home: Path) -> None:
    state = home / "state.json"
    if state.exists():
        with suppress(psutil.Error):
            process = psutil.Process(json.loads(state.read_text())["pid"])
            if str(home) in process.cmdline():
                process.send_signal(signal.SIGKILL)
                process.wait(PATIENCE_S)
        state.unlink(missing_ok=True)


def _identity(name: str, key: str, *rights: str) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": rights}


def _start(home: Path) -> tuple[ObjectStoreServer, int]:
    identities = [_identity("tests", KEY, "Admin"), _identity("reader", READER_KEY, "Read", "List")]
    (home / "s3.json").write_text(json.dumps({"identities": identities}))
    master, volume, filer, s3 = (free_pair() for _ in range(4))
    command = [
        *(str(WEED), "-logtostderr=true", "server"),
        *("-ip", "127.0.0.1", "-ip.bind", "127.0.0.1", "-dir", str(home)),
        *("-master.port", str(master), "-master.volumeSizeLimitMB", "64", "-master.telemetry=false"),
        *("-volume.port", str(volume), "-volume.max", "20", "-filer", "-filer.port", str(filer)),
        *("-s3", "-s3.port", str(s3), "-s3.port.iceberg", "0", "-s3.port.lance", "0"),
        *("-s3.config", str(home / "s3.json")),
    ]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ)
    return ObjectStoreServer(process.pid, s3), filer


def _await(server: ObjectStoreServer, filer: int) -> None:
    """Create the bucket, and wait until an object can be stored in it."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        with suppress(OSError):
            # A bucket is a folder of the filer; the S3 gateway denies access to requests without a signature.
            created = _request(filer, "POST", f"/buckets/{BUCKET}/") in {HTTPStatus.CREATED, HTTPStatus.CONFLICT}
            if created and _request(server.port, "GET", "/") == HTTPStatus.FORBIDDEN:
                open_store(f"s3://{BUCKET}", server.options).create("ready", b"")
                return
        assert psutil.pid_exists(server.pid), "SeaweedFS exited at start"
        assert time.monotonic() < give_up, f"SeaweedFS did not answer within {PATIENCE_S:.0f} s"
        time.sleep(0.1)


def _request(port: int, method: str, path: str) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers={"Content-Length": "0"})
        return connection.getresponse().status
    finally:
        connection.close()


def free_pair() -> int:
    """A free port whose gRPC port is also free."""
    while is_taken(port := free_port() - GRPC):
        pass
    return port
