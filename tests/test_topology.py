"""The processes of docker-compose.yml on loopback: broker, Spark master and workers, stream, gateway and dashboard.

The home is in a bucket. Where the system permits, the executors run in a mount namespace in which the driver's working
directory and jars are empty, as on another machine.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pyspark
import pytest

from streaming.images.dataset import digit_images, write_images
from streaming.platform.java import find_java
from streaming.platform.kafka_node import free_port
from streaming.settings import Settings
from streaming.storage.table_log import open_delta
from tests.conftest import imagestream
from tests.object_store import SECRET
from tests.prepare import QUICK_JVM

IMAGES = 300
PER_BATCH = 60
PATIENCE_S = 600.0
LOOPBACK = "127.0.0.1"
HANDSHAKE = "known-to-the-cluster-of-the-topology-test"  # spark.authenticate.secret
API_KEY = "a key of the topology test"  # pragma: allowlist secret

# A command that creates a mount namespace, if the user may.
NAMESPACE = next(
    (
        command
        for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"])
        if shutil.which("unshare")
        and subprocess.run(
            [*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
        ).returncode
        == 0
    ),
    None,
)
HIDING = 'while [ "$1" != -- ]; do mount -t tmpfs none "$1" || exit; shift; done; shift; exec "$@"'

T = TypeVar("T")


@contextmanager
def process(name: str, logs: Path, command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process for the block, and stop it with its descendants; its output goes to a file."""
    with (logs / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield started
    finally:
        pids = [started.pid, *(child.pid for child in children(started.pid))]
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(30)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.wait(10)


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_executor(process: psutil.Process) -> bool:
    try:
        return "CoarseGrained" in " ".join(process.cmdline())
    except psutil.Error:  # it has just exited
        return False


def wait_for(what: str, condition: Callable[[], T], logs: Path) -> T:
    """Wait for a true result and return it; OSErrors and failed requests count as false."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        with suppress(OSError, httpx.HTTPError, ValueError):
            if result := condition():
                return result
        time.sleep(0.5)  # a query takes a tenth of that
    tails = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs.iterdir())
    pytest.fail(f"{what}: not within {PATIENCE_S:.0f} s\n{tails}")


def hidden(folders: Sequence[Path], command: list[str]) -> list[str]:
    """The command in a namespace where these folders are empty, if the system permits."""
    if NAMESPACE is None:
        return command
    return [*NAMESPACE, "sh", "-c", HIDING, "sh", *(str(folder.resolve()) for folder in folders), "--", *command]


class Cluster:
    """A Spark standalone cluster whose daemons are started as by docker-compose.

    Args:
        unseen: folders of the driver that are hidden from the workers.
    """

    def __init__(self, settings: Settings, directory: Path, unseen: Sequence[Path], stack: ExitStack) -> None:
        self._unseen = unseen
        self._directory = directory
        self._logs = directory / "logs"
        self._stack = stack
        conf = directory / "spark"
        conf.mkdir()
        self.defaults = conf / "spark-defaults.conf"
        self.defaults.write_text(
            f"spark.authenticate true\nspark.authenticate.secret {HANDSHAKE}\nspark.network.crypto.enabled true\n"
            f"spark.executor.extraJavaOptions {QUICK_JVM}\n"
        )
        spark_home = Path(pyspark.__file__).parent
        self._spark_class = str(spark_home / "bin" / "spark-class")
        java_home = find_java(settings.jars_dir.parent).parent.parent
        self._environment = {
            "SPARK_HOME": str(spark_home),
            "JAVA_HOME": str(java_home),
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_DAEMON_JAVA_OPTS": QUICK_JVM,
            "SPARK_CONF_DIR": str(conf),
        }
        port, self._page = free_port(), free_port()
        self.address = f"spark://{LOOPBACK}:{port}"
        self._start("master", "master.Master", "--port", str(port), "--webui-port", str(self._page))
        self.workers = [
            self._start(f"worker-{number}", "worker.Worker", self.address, *self._worker(number)) for number in (1, 2)
        ]
        # A worker without the secret, which must be refused.
        self._environment["SPARK_CONF_DIR"] = str(directory)
        self._start("unauthenticated", "worker.Worker", self.address, *self._worker(3))
        wait_for("two workers", lambda: self.state()["aliveworkers"] == len(self.workers), self._logs)

    def state(self) -> dict[str, Any]:
        """The state of the cluster, as reported by the master."""
        state: dict[str, Any] = httpx.get(f"http://{LOOPBACK}:{self._page}/json/").json()
        return state

    def _start(self, name: str, kind: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [self._spark_class, f"org.apache.spark.deploy.{kind}", "--host", LOOPBACK, *arguments]
        if kind == "worker.Worker":
            command = hidden(self._unseen, command)
        return self._stack.enter_context(process(name, self._logs, command, **self._environment))

    def _worker(self, number: int) -> list[str]:
        directory = str(self._directory / f"worker-{number}")
        return ["--cores", "1", "--memory", "1g", "--webui-port", "0", "--work-dir", directory]


def rows(settings: Settings) -> int:
    home = settings.place
    return open_delta(home.table("predictions")).count() if home.has_table("predictions") else 0


def check_secrets(cluster: Cluster, executors: list[psutil.Process], logs: Path) -> None:
    """No command line contains a secret, and a worker without the secret of the cluster is refused."""
    commands = [str(one.info["cmdline"]) for one in psutil.process_iter(["cmdline"])]
    assert not [one for one in commands if SECRET in one or HANDSHAKE in one]
    assert all(one.environ()["_SPARK_AUTH_SECRET"] == HANDSHAKE for one in executors)  # passed on by their worker
    log = (logs / "unauthenticated.log").read_text(errors="replace")
    assert "Connecting to master" in log
    assert "Successfully registered" not in log
    assert len(cluster.state()["workers"]) == len(cluster.workers)


def test_killed_spark_worker_loses_no_image(bucket_service: Settings, tmp_path: Path) -> None:
    service = bucket_service
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "key").write_text(API_KEY)
    first, *_ = (data for _, _, data in digit_images(1, IMAGES + 1))
    write_images(tmp_path / "digits", digit_images(IMAGES, 0))
    program = [sys.executable, "-m", "streaming", "--home", str(service.home)]
    hidden_file = service.work_dir / "of-the-driver"
    hidden_file.touch()
    environment = {
        "IMAGESTREAM_WORK": str(service.work),
        "IMAGESTREAM_BOOTSTRAP_SERVERS": str(service.bootstrap_servers),
        "IMAGESTREAM_JARS": str(service.jars),
        "IMAGESTREAM_TOPIC": service.topic,
        "IMAGESTREAM_GATEWAY_API_KEY_FILE": str(tmp_path / "key"),
        "SPARK_LOCAL_IP": LOOPBACK,
    }
    with ExitStack() as stack:
        cluster = Cluster(service, tmp_path, [service.work_dir, service.jars_dir], stack)
        gateway_port, page_port = free_port(), free_port()
        command = [*program, "stream", "--images-per-batch", str(PER_BATCH)]
        master = {"IMAGESTREAM_MASTER": cluster.address, "SPARK_CONF_DIR": str(cluster.defaults.parent)}
        stream = stack.enter_context(process("stream", logs, command, **environment, **master))
        command = [*program, "gateway", "--port", str(gateway_port)]
        stack.enter_context(process("gateway", logs, command, **environment))
        command = [*program, "dashboard", "--port", str(page_port)]
        stack.enter_context(process("dashboard", logs, command, **environment))
        assert imagestream(service, "publish", tmp_path / "digits", "--label-from", "parent")["sent"] == IMAGES

        wait_for("the first rows", lambda: rows(service) >= PER_BATCH, logs)
        executors = [one for one in children(cluster.workers[0].pid) if is_executor(one)]
        assert executors, "the worker to be killed has no executor"
        for executor in executors if NAMESPACE else ():
            inside = Path(f"/proc/{executor.pid}/root")
            assert not (inside / hidden_file.relative_to("/")).exists(), "executors see the driver's folder"
        check_secrets(cluster, executors, logs)
        before = rows(service)
        cluster.workers[0].kill()
        assert before < IMAGES
        wait_for("all rows", lambda: rows(service) == IMAGES, logs)

        with httpx.Client(base_url=f"http://{LOOPBACK}:{gateway_port}", headers={"X-API-Key": API_KEY}) as gateway:
            wait_for("the gateway", lambda: gateway.get("/readyz").is_success, logs)
            accepted = gateway.post("/images", content=first, headers={"content-type": "image/png"})
            assert accepted.status_code == 202, accepted.text
            image_id = accepted.json()["image_id"]
            answer = wait_for("its prediction", lambda: predicted(gateway, image_id), logs)
            assert answer["label"].isdecimal()
        wait_for("the dashboard", lambda: httpx.get(f"http://{LOOPBACK}:{page_port}").is_success, logs)
        assert stream.poll() is None
        stream.terminate()
        assert stream.wait(PATIENCE_S) == 0, (logs / "stream.log").read_text(errors="replace")[-3000:]

    assert imagestream(service, "audit")["clean"] is True
    assert rows(service) == IMAGES + 1
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:  # logs of all processes, working directories
        assert SECRET.encode() not in path.read_bytes(), path
        assert path == cluster.defaults or HANDSHAKE.encode() not in path.read_bytes(), path


def predicted(gateway: httpx.Client, image_id: str) -> dict[str, Any] | None:
    answer = gateway.get(f"/predictions/{image_id}")
    found: dict[str, Any] | None = answer.json()["predictions"][0] if answer.is_success else None
    return found
