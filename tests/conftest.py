"""Shared fixtures: jars, backbones, a broker, homes with a trained model, and the command line."""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import hypothesis
import pytest
from filelock import FileLock
from pyspark.sql import SparkSession

from models.backbone import DEFAULT_BACKBONE, ExportedBackbone, export_backbone
from streaming.settings import Settings
from streaming.storage.store import open_store
from tests.forms import (
    FULL_TIMEOUT_S,
    form,
    leave_out_full_only,
    pytest_addoption,
    pytest_ignore_collect,
    pytest_terminal_summary,
    record,
    rng,
    seed,
)
from tests.object_store import BUCKET, WEED, ObjectStoreServer, start_object_store
from tests.prepare import CHECKOUT, EXPORTS, exports_in_this_process
from tests.schedule import pytest_xdist_make_scheduler
from tests.services import (
    BROKER,
    FRAGILE_BROKER,
    OBJECT_STORE,
    SharedSpark,
    made_once,
    shared_broker,
    shared_directory,
    shared_jars,
    stop_shared_services,
)

# No deadline, because machines differ in speed; the same examples in every run, so that results are reproducible.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

__all__ = [
    "CHECKOUT",
    "form",
    "pytest_addoption",
    "pytest_ignore_collect",
    "pytest_terminal_summary",
    "pytest_xdist_make_scheduler",
    "record",
    "rng",
    "seed",
]

# For xdist's processes and their children: there are more processes than cores, where OpenBLAS threads that wait for
# each other take ten times the CPU time.
for threads in ("OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(threads, "1")
# A process in the background of a script ignores SIGINT, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # during collection, which allocates many objects and leaves no garbage
SPARK = SharedSpark()
DAEMON = "spark.python.daemon.module"
TRAINED_ITERATIONS = 10  # of the classifier of the shared model and its retrainings; each is a Spark job
# Files that take minutes: they start first, so that no process runs one alone at the end.
LONGEST_FIRST = (
    "tests/faults/test_kill.py",
    "tests/models/test_backbone_contract.py",
    "tests/test_docs.py",
    "tests/streaming/jobs/test_audit_rules.py",
    "tests/test_demo.py",
    "tests/streaming/distributed/test_train_cnn.py",
    "tests/streaming/distributed/test_trainer.py",
    "tests/streaming/distributed/test_resume.py",
    "tests/streaming/training/test_tune.py",
    "tests/streaming/training/test_train.py",
    "tests/streaming/jobs/test_features.py",
    "tests/streaming/dashboard/test_dashboard.py",
    "tests/examples/test_cifar10_mlp.py",
    "tests/streaming/pipeline/test_stream.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for two cores: they keep both busy, and each further one would start and warm up Spark again."""
    return max(2, min(8, 3 * (os.cpu_count() or 1) // 2))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out_full_only(config, items)
    if config.getoption("full"):
        for item in items:
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT_S))
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(CHECKOUT).as_posix(), len(ranks)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude the collected tests from later garbage collections: they live as long as the process."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # for modules that report objects that were not collected at exit
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop Spark in each process, and the shared services in the main process, also after Ctrl-C."""
    SPARK.stop()
    factory = getattr(session.config, "_tmp_path_factory", None)
    if not hasattr(session.config, "workerinput") and factory is not None and factory._basetemp is not None:
        stop_shared_services(factory.getbasetemp())


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is shared by all processes of this run."""
    return shared_directory(tmp_path_factory)


@pytest.fixture(scope="session")
def jars_dir() -> Path:
    """The checkout's jars, fetched if they are missing."""
    return shared_jars()


@pytest.fixture(scope="session")
def exports() -> Path:
    """The folder of the checkout's exported backbones; their keys change with their contents."""
    return EXPORTS


@pytest.fixture(scope="session")
def exported(exports: Path, run_dir: Path) -> ExportedBackbone:
    """The default backbone with its ImageNet weights."""
    with FileLock(run_dir / "exported.lock"):
        return export_backbone(DEFAULT_BACKBONE, "imagenet", exports)


@pytest.fixture(scope="module")
def exports_here() -> Iterator[None]:
    """Backbones are exported in this process, which imports TensorFlow once, during the tests of the module."""
    with exports_in_this_process():
        yield


@pytest.fixture(scope="session")
def spark(jars_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SparkSession:
    """The one Spark session of the test process."""
    return SPARK.start(tmp_path_factory.mktemp("spark"), jars_dir)


@pytest.fixture(scope="module")
def workers_with_tensorflow(spark: SparkSession) -> Iterator[None]:
    """New Python workers have TensorFlow imported during the tests of the module, as in a session of `train-cnn`."""
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    conf = jvm.org.apache.spark.SparkEnv.get().conf()  # read by each task
    conf.set(DAEMON, "streaming.distributed.daemon")
    yield
    conf.remove(DAEMON)


@pytest.fixture(scope="session")
def broker(jars_dir: Path, exports: Path, run_dir: Path) -> Settings:
    """Settings of a real broker that all test processes share: each test uses a separate topic."""
    return shared_broker(run_dir / BROKER, jars_dir, exports)


@pytest.fixture(scope="session")
def object_store(run_dir: Path) -> ObjectStoreServer:
    """A real S3 server with a bucket that all test processes share: each test uses a separate prefix."""
    if not WEED.exists():
        pytest.skip("SeaweedFS has wheels for x86-64 only")
    return start_object_store(run_dir / OBJECT_STORE)


@pytest.fixture
def bucket_home(object_store: ObjectStoreServer) -> Iterator[str]:
    """The URI of an empty home for this test; the credentials are in the environment meanwhile."""
    with environment(**object_store.environment()):
        yield f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture
def bucket_service(
    object_store: ObjectStoreServer, broker: Settings, trained: Path, tmp_path: Path
) -> Iterator[Settings]:
    """Like `service`, with the home in a bucket."""
    with service_in_bucket(object_store, broker, trained, tmp_path / "work") as settings:
        yield settings


def suspend(pid: int) -> None:
    """Stop a process, and wait until each of its threads has stopped, which takes a while on a busy machine."""

    def is_running(stat: Path) -> bool:
        try:
            return not stat.read_text().rpartition(") ")[2].startswith(("T", "Z"))  # stopped, ended
        except OSError:  # the thread has ended
            return False

    os.kill(pid, signal.SIGSTOP)
    while any(map(is_running, Path(f"/proc/{pid}/task").glob("*/stat"))):
        time.sleep(0.01)


@contextmanager
def service_in_bucket(
    server: ObjectStoreServer, broker: Settings, trained: Path, work: Path, port: int | None = None
) -> Iterator[Settings]:
    """Settings of a service with a trained model and its home in a bucket, with credentials in the environment.

    Args:
        work: the working directory, which is created.
        port: the port of a proxy in front of the server.
    """
    work.mkdir()
    home = f"s3://{BUCKET}/{uuid4().hex}"
    with environment(**server.environment(port)), pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(port).items():
            patch.setitem(SPARK.environment, name, value)
        store = open_store(home)
        for path in [path for name in ("models", "tables") for path in (trained / name).rglob("*") if path.is_file()]:
            store.put(path.relative_to(trained).as_posix(), path.read_bytes())
        yield broker.model_copy(update={"home": home, "work": work, "topic": f"images-{uuid4().hex[:8]}"})


@pytest.fixture
def fragile_broker(jars_dir: Path, exports: Path, run_dir: Path) -> Iterator[Settings]:
    """A broker that the test may stop, kill and start; no other test uses it at the same time."""
    with FileLock(run_dir / f"{FRAGILE_BROKER}.lock"):
        yield shared_broker(run_dir / FRAGILE_BROKER, jars_dir, exports)


Code = int | tuple[int, ...]  # the expected exit code, or several


def imagestream(settings: Settings, *arguments: str | Path | float, code: Code = 0) -> dict[str, Any]:
    """Run a command of `imagestream` in this process, with its Spark session; return the summary of `--json`.

    For tests of the process itself (its start, signals, exit), see `imagestream_process`.
    """
    if arguments[0] in WITH_SPARK:
        SPARK.start(settings.work_dir.parent, settings.jars_dir)
    return _summary_of(command_here, settings, arguments, code)


def command_here(*arguments: str | Path | float) -> tuple[int, str, str]:
    """Run a command line in this process; return (exit code, standard output, standard error)."""
    from streaming.cli import commands  # noqa: F401  registers every command
    from streaming.cli.app import run

    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as ended:
        run([*map(str, arguments)])
    assert isinstance(ended.value.code, int | None)
    return ended.value.code or 0, out.getvalue(), err.getvalue()


WITH_SPARK = ("features", "report", "retrain", "stream", "train", "train-cnn", "tune")


def imagestream_process(settings: Settings, *arguments: str | Path | float, code: Code = 0) -> dict[str, Any]:
    """Like `imagestream`, but in a separate process, as from a shell."""
    return _summary_of(command_process, settings, arguments, code)


def _summary_of(
    run: Callable[..., tuple[int, str, str]], settings: Settings, arguments: Sequence[str | Path | float], code: Code
) -> dict[str, Any]:
    """Run a command; return the summary of `--json`, or its standard error if it wrote none."""
    summary = settings.work_dir / "summary.json"
    summary.unlink(missing_ok=True)
    with environment(**environment_of(settings)):
        exit_code, out, err = run("--home", settings.home, *arguments, "--json", summary)
    assert exit_code in (code if isinstance(code, tuple) else (code,)), f"{arguments}: {out}{err}"
    return json.loads(summary.read_text()) if summary.exists() else {"stderr": err}


def command_process(*arguments: str | Path | float) -> tuple[int, str, str]:
    """Run a command line in a separate process; return (exit code, standard output, standard error)."""
    command = [sys.executable, "-m", "streaming", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment variables of these settings."""
    given = {
        "IMAGESTREAM_JARS": settings.jars,
        "IMAGESTREAM_TOPIC": settings.topic,
        "IMAGESTREAM_WORK": settings.work,
        "IMAGESTREAM_BACKBONES": settings.backbones,
        "IMAGESTREAM_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
    }
    # One engine, so that predictions are bit-identical in every run; see tests/streaming/platform/test_engines.py.
    return {"IMAGESTREAM_ENGINE": "litert"} | {name: str(value) for name, value in given.items() if value}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def trained(jars_dir: Path, exports: Path, run_dir: Path) -> Path:
    """A home with one model version, trained on 300 digits; tests copy it and do not change it."""

    def train(home: Path) -> None:
        settings = Settings(home=home, jars=jars_dir, backbones=exports)
        # A twelfth of the pixels of the default size, and of the work of each test that scores images.
        small = ("--limit", 300, "--input-size", 64, "--max-iter", TRAINED_ITERATIONS)
        result = imagestream(settings, "train", "--dataset", "digits", *small)
        assert result["version"] == 1
        assert result["promoted"]

    return made_once(run_dir / "trained", train)


NewService = Callable[[], Settings]


@pytest.fixture(scope="session")
def new_service(broker: Settings, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> NewService:
    """A function that creates the settings of a new service: a home with a trained model, and a new topic."""

    def make() -> Settings:
        home = tmp_path_factory.mktemp("service") / "home"
        shutil.copytree(trained, home, symlinks=True)
        return broker.model_copy(update={"home": home, "topic": f"images-{uuid4().hex[:8]}"})

    return make


@pytest.fixture
def service(new_service: NewService) -> Settings:
    """A new service for this test."""
    return new_service()


@pytest.fixture
def fragile_service(fragile_broker: Settings, new_service: NewService) -> Settings:
    """A new service on the broker that may be stopped."""
    return new_service().model_copy(update={"bootstrap_servers": fragile_broker.bootstrap_servers})
