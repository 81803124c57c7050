"""A home at an `az://` URI on Azurite: store operations, and the commit protocol with killed drivers."""

import base64
import hashlib
import hmac
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from uuid import uuid4

import pytest

from streaming.errors import ServiceError
from streaming.platform.kafka_node import free_port
from streaming.query import query
from streaming.settings import Settings
from streaming.storage.store import open_store
from tests.conftest import environment
from tests.faults.harness import check_one_attempt, wait_until
from tests.faults.protocol import Driver, Spec, begin, check
from tests.streaming.history import new_topic

AZURITE = "azurite@3.35.0"
ACCOUNT = "devstoreaccount1"
# Azurite's well-known account key.
KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsu"  # pragma: allowlist secret
    "Fq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # pragma: allowlist secret
)
VERSION = "2021-08-06"  # of the Azure REST API


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables of a server with the container `home`."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which installs Azurite, was not found")
    folder = tmp_path_factory.mktemp("azurite")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), AZURITE]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install {AZURITE}: {installed.stderr.strip()[-200:]}")
    port = free_port()
    command = [
        *(str(folder / "node_modules/.bin/azurite-blob"), "--silent", "--inMemoryPersistence", "--disableTelemetry"),
        *("--blobHost", "127.0.0.1", "--blobPort", str(port), "--skipApiVersionCheck"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        wait_until(lambda: _create_container(port), (folder / "log").read_text, 60)
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        }
    finally:
        process.kill()
        process.wait()


def _create_container(port: int) -> bool:
    """Whether the container was created. Source: "Authorize with Shared Key", Azure Storage REST API reference."""
    now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    head = f"PUT{12 * chr(10)}x-ms-date:{now}\nx-ms-version:{VERSION}\n"
    text = f"{head}/{ACCOUNT}/{ACCOUNT}/home\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {
        "x-ms-date": now,
        "x-ms-version": VERSION,
        "content-length": "0",
        "authorization": f"SharedKey {ACCOUNT}:{signature}",
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    with suppress(OSError):
        connection.request("PUT", f"/{ACCOUNT}/home?restype=container", headers=headers)
        return connection.getresponse().status == 201
    return False


@pytest.fixture
def home(azurite: dict[str, str]) -> Iterator[str]:
    with environment(**azurite):
        yield f"az://home/{uuid4().hex}"


def test_store_operations(home: str, tmp_path: Path) -> None:
    store = open_store(home)
    store.check_access()
    store.check_conditional()
    assert store.create("a/b", b"one")
    assert not store.create("a/b", b"two")
    store.put("a/c", b"three")
    with store.open_output("a/d/e") as output:
        output.write(b"x" * 100_000)
    assert {one.key: one.bytes for one in store.list()} == {"a/b": 3, "a/c": 5, "a/d/e": 100_000}
    assert (store.folders(), store.folders("a")) == (["a"], ["d"])
    assert (store.get("a/b"), store.size("a/c"), store.get("none"), store.size("none")) == (b"one", 5, None, None)
    store.fetch("a/d/e", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == 100_000
    store.delete(["a/b", "a/c", "a/d/e", "none"])
    assert list(store.list()) == []


def test_missing_container_is_reported(home: str) -> None:
    with pytest.raises(ServiceError, match=r"^the bucket of az://none/home does not exist \(ContainerNotFound\)"):
        open_store("az://none/home").get("a")


@pytest.mark.parametrize("step", ["decide", "predictions", "batches"])
def test_new_driver_finishes_work_of_killed_driver(home: str, tmp_path: Path, step: str) -> None:
    settings = Settings(home=home, work=tmp_path / "work", topic=new_topic())
    begin(settings)
    spec = Spec(settings, tmp_path / "1", messages=30, per_batch=3)
    with Driver(replace(spec, signal_at=(step, 2, signal.SIGKILL))) as driver:
        driver.wait_killed()
    with Driver(spec) as driver:
        assert driver.wait_ended() == 0, driver.log_tail()
    check(settings, spec.messages)
    check_one_attempt(settings)
    rows = query(settings, "SELECT (SELECT count(*) FROM predictions) + (SELECT count(*) FROM quarantine) AS n")
    assert rows.to_pylist() == [{"n": 60}]
