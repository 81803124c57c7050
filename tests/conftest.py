"""Fixtures that all tests share: jars, backbones, a broker, homes with a trained model, and the command line."""

import atexit
import gc
import json
import os
import shutil
import subprocess
import sys
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
from tests.services import (
    BROKER,
    CHECKOUT,
    FRAGILE_BROKER,
    OBJECT_STORE,
    SET_UP,
    SharedSpark,
    directory_of_the_run,
    made_once,
    shared_broker,
    shared_jars,
    stop_shared_services,
)

# No deadline, because machines differ; the same examples in every run, so that a test that passes keeps passing.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

__all__ = [
    "CHECKOUT",
    "form",
    "pytest_addoption",
    "pytest_ignore_collect",
    "pytest_terminal_summary",
    "record",
    "rng",
    "seed",
]

# For xdist's processes and all that tests start: there are more of them than cores, and threads of OpenBLAS that wait
# for each other there take ten times the CPU time.
for threads in ("OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(threads, "1")
gc.disable()  # until all tests are collected, which makes much and leaves no garbage
SPARK = SharedSpark()
TRAINED_ITERATIONS = 20  # of the shared model's classifier, a Spark job each, and of every retraining of it
# Files that take minutes of a process: they begin first, so that none of them is the last to end.
LONGEST_FIRST = (
    "tests/faults/test_kill.py",
    "tests/models/test_backbone_contract.py",
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
    """Two processes per core: half of a test is waiting for a JVM, Kafka or a browser."""
    return min(8, 2 * (os.cpu_count() or 1))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out_full_only(config, items)
    if config.getoption("full"):
        for item in items:
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT_S))
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(CHECKOUT).as_posix(), len(places)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was collected lives as long as the process: later collections of garbage need not look at it."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # for modules that complain of what they do not see collected at the end
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what the run started, also after Ctrl-C: Spark in each process, the broker in the last one that ends."""
    SPARK.stop()
    factory = getattr(session.config, "_tmp_path_factory", None)
    if not hasattr(session.config, "workerinput") and factory is not None and factory._basetemp is not None:
        stop_shared_services(factory.getbasetemp())


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share."""
    return directory_of_the_run(tmp_path_factory)


@pytest.fixture(scope="session")
def jars_dir() -> Path:
    """The checkout's own jars, fetched if they are not there yet."""
    return shared_jars()


@pytest.fixture(scope="session")
def exports() -> Path:
    """The checkout's own exported backbones; their key tells when one is out of date."""
    return SET_UP / "backbones"


@pytest.fixture(scope="session")
def exported(exports: Path) -> ExportedBackbone:
    """The default backbone with its ImageNet weights."""
    return export_backbone(DEFAULT_BACKBONE, "imagenet", exports)


@pytest.fixture(scope="session")
def spark(jars_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SparkSession:
    """The one Spark session of the test process."""
    return SPARK.start(tmp_path_factory.mktemp("spark"), jars_dir)


@pytest.fixture(scope="session")
def broker(jars_dir: Path, exports: Path, run_dir: Path) -> Settings:
    """Settings with the address of a real broker, the same for all test processes: every test takes its own topic."""
    return shared_broker(run_dir / BROKER, jars_dir, exports)


@pytest.fixture(scope="session")
def object_store(run_dir: Path) -> ObjectStoreServer:
    """A real S3 server with a bucket, the same for all test processes: every test takes a prefix of its own."""
    if not WEED.exists():
        pytest.skip("SeaweedFS has wheels for x86-64 only")
    return start_object_store(run_dir / OBJECT_STORE)


@pytest.fixture
def bucket_home(object_store: ObjectStoreServer) -> Iterator[str]:
    """The URI of an empty home of this test alone; for its time the credentials are in the environment."""
    with environment(**object_store.environment()):
        yield f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture
def bucket_service(
    object_store: ObjectStoreServer, broker: Settings, trained: Path, tmp_path: Path
) -> Iterator[Settings]:
    """As `service`, with its home in a bucket."""
    with service_in_bucket(object_store, broker, trained, tmp_path / "work") as settings:
        yield settings


@contextmanager
def service_in_bucket(
    server: ObjectStoreServer, broker: Settings, trained: Path, work: Path, port: int | None = None
) -> Iterator[Settings]:
    """Settings of a service with a trained model and its home in a bucket, with credentials in the environment.

    Args:
        work: made for it.
        port: of a proxy before the server.
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
    """A broker that the test may stop, kill and start: no other test uses it meanwhile."""
    with FileLock(run_dir / f"{FRAGILE_BROKER}.lock"):
        yield shared_broker(run_dir / FRAGILE_BROKER, jars_dir, exports)


Code = int | tuple[int, ...]  # the exit code that is expected, or several


def imagestream(settings: Settings, *arguments: str | Path | float, code: Code = 0) -> dict[str, Any]:
    """Run a command of `imagestream` in this process, with its Spark session; returns what it wrote for `--json`.

    Where the command's own process is what is tested (its start, its signals, its end), see `imagestream_process`.
    """
    if arguments[0] in WITH_SPARK:
        SPARK.start(settings.work_dir.parent, settings.jars_dir)
    return _summary_of(command_here, settings, arguments, code)


def command_here(*arguments: str | Path | float) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line run in this process."""
    from streaming.cli import commands  # noqa: F401  registers every command
    from streaming.cli.app import run

    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as ended:
        run([*map(str, arguments)])
    assert isinstance(ended.value.code, int | None)
    return ended.value.code or 0, out.getvalue(), err.getvalue()


WITH_SPARK = ("features", "report", "retrain", "stream", "train", "train-cnn", "tune")


def imagestream_process(settings: Settings, *arguments: str | Path | float, code: Code = 0) -> dict[str, Any]:
    """As `imagestream`, but as a process of its own, as from a shell."""
    return _summary_of(command_process, settings, arguments, code)


def _summary_of(
    run: Callable[..., tuple[int, str, str]], settings: Settings, arguments: Sequence[str | Path | float], code: Code
) -> dict[str, Any]:
    """What a command wrote for `--json`, or its standard error where it wrote nothing."""
    summary = settings.work_dir / "summary.json"
    summary.unlink(missing_ok=True)
    with environment(**environment_of(settings)):
        ended, out, err = run("--home", settings.home, *arguments, "--json", summary)
    assert ended in (code if isinstance(code, tuple) else (code,)), f"{arguments}: {out}{err}"
    return json.loads(summary.read_text()) if summary.exists() else {"stderr": err}


def command_process(*arguments: str | Path | float) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line run as a process of its own."""
    command = [sys.executable, "-m", "streaming", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment variables that give a command these settings."""
    given = {
        "IMAGESTREAM_JARS": settings.jars,
        "IMAGESTREAM_TOPIC": settings.topic,
        "IMAGESTREAM_WORK": settings.work,
        "IMAGESTREAM_BACKBONES": settings.backbones,
        "IMAGESTREAM_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
    }
    # One engine, so that answers are the same to the bit in every run; see tests/streaming/platform/test_engines.py.
    return {"IMAGESTREAM_ENGINE": "litert"} | {name: str(value) for name, value in given.items() if value}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables, set for the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def trained(jars_dir: Path, exports: Path, run_dir: Path) -> Path:
    """A home with one model version, trained on 300 digits; for copying, not for changing."""

    def train(home: Path) -> None:
        settings = Settings(home=home, jars=jars_dir, backbones=exports)
        # A twelfth of the pixels of the default size, and of the work of every test that scores images.
        small = ("--limit", 300, "--input-size", 64, "--max-iter", TRAINED_ITERATIONS)
        result = imagestream(settings, "train", "--dataset", "digits", *small)
        assert result["version"] == 1
        assert result["promoted"]

    return made_once(run_dir / "trained", train)


NewService = Callable[[], Settings]


@pytest.fixture(scope="session")
def new_service(broker: Settings, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> NewService:
    """Makes settings of a service of its own: a home with a trained model, a topic that nobody else uses."""

    def make() -> Settings:
        home = tmp_path_factory.mktemp("service") / "home"
        shutil.copytree(trained, home, symlinks=True)
        return broker.model_copy(update={"home": home, "topic": f"images-{uuid4().hex[:8]}"})

    return make


@pytest.fixture
def service(new_service: NewService) -> Settings:
    """A service of this test alone."""
    return new_service()


@pytest.fixture
def fragile_service(fragile_broker: Settings, new_service: NewService) -> Settings:
    """A service on the broker that may be stopped."""
    return new_service().model_copy(update={"bootstrap_servers": fragile_broker.bootstrap_servers})
