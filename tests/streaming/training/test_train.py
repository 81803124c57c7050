"""Training and retraining: from stored features to a bundle, and from a bundle to the champion."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812

from models.backbone import FLATBUFFER_FILE, WEIGHTS_FILE
from models.bundle import GOLDEN, Bundle
from models.scorer import check_golden, golden_images, load_scorer
from streaming.cli.app import EXIT_INTERRUPTED
from streaming.errors import ServiceError
from streaming.images.labels import labelled_features
from streaming.images.membership import fitted_on
from streaming.images.split import Split
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.tables import Table
from streaming.training.backbones import BackboneOptions
from streaming.training.candidate import BackboneParts, Candidate, compare, make_candidate, register
from streaming.training.fit import in_order
from streaming.training.fit_options import FitOptions, GateOptions
from streaming.training.gate import decide
from streaming.training.schedule import parse_interval, run_every
from tests.conftest import TRAINED_ITERATIONS, environment_of, imagestream
from tests.faults.harness import has_ended, wait_until
from tests.homes import local_home
from tests.streaming.small_models import bundle_folder

OPTIONS = FitOptions(metric="accuracy", max_iter=TRAINED_ITERATIONS)
# Another seed than the champion's, and a projection without the eigenvectors of 1,280 columns, which take two seconds.
OTHER_OPTIONS = FitOptions(
    seed=7, projection="randomized_pca", n_components=40, elastic_net=0.5, reg_param=0.01, max_iter=10
)


@pytest.fixture(scope="module")
def champion(trained: Path) -> Bundle:
    return open_registry(trained).read(1)


@pytest.fixture(scope="module")
def features(trained: Path) -> Table:
    return Table(trained / "tables", "features")


@pytest.fixture(scope="module")
def rows(spark: SparkSession, features: Table, champion: Bundle) -> Iterator[DataFrame]:
    """The features of the 300 digits that the champion was trained on."""
    found = labelled_features(spark, features, champion.backbone_sha256)
    ordered = in_order(found, 1280).persist()
    yield ordered
    ordered.unpersist()


@pytest.fixture(scope="module")
def augmented(rows: DataFrame) -> Iterator[Candidate]:
    """Fitted on the rows and a copy of each with other features."""
    plain = rows.withColumn("augmentation", F.lit(None).cast("int"))
    copies = plain.withColumn("augmentation", F.lit(1)).withColumn(
        "features", F.transform("features", lambda value: (value * 1.1).cast("float"))
    )
    both = in_order(plain.union(copies), 1280).persist()
    yield make_candidate(both, OTHER_OPTIONS)
    both.unpersist()


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "home", symlinks=True)


def parts_of(home: Path, bundle: Bundle) -> BackboneParts:
    files = {name: bundle_folder(home, 1) / name for name in (FLATBUFFER_FILE, WEIGHTS_FILE)}
    return BackboneParts(bundle.manifest.backbone, files, golden_images(bundle.arrays(GOLDEN)))


# --- candidates


def test_retraining_on_the_same_features_gives_the_same_bundle(rows: DataFrame, champion: Bundle, home: Path) -> None:
    """The champion was trained in another process, on the rows in another order."""
    registry = open_registry(home)
    other_order = in_order(rows.orderBy(F.desc("image_id")).repartition(3), 1280).persist()
    again = make_candidate(other_order, OPTIONS)
    assert register(registry, again, parts_of(home, champion), {}) == (1, champion.sha256)
    assert registry.versions() == [1]

    version, sha256 = register(registry, again, parts_of(home, champion), {"extra": 1.0})
    assert (version, registry.read(2).sha256) == (2, sha256)
    assert registry.read(2).manifest.metrics["extra"] == 1.0
    other_order.unpersist()


def test_bundle_records_its_training(champion: Bundle) -> None:
    manifest = champion.manifest
    assert manifest.fit == OPTIONS.as_record()
    assert manifest.training_data.rows + manifest.training_data.holdout_rows == 300
    data = manifest.training_data
    assert (data.seed, data.holdout_share, data.group_by) == (OPTIONS.seed, OPTIONS.holdout, None)
    assert manifest.libraries["pyspark"] == "4.2.0"
    assert manifest.metrics["accuracy"] > 0.8


def test_any_projection_and_classifier_is_registered_and_predicts(
    rows: DataFrame, champion: Bundle, augmented: Candidate, home: Path
) -> None:
    registry = open_registry(home)
    options = FitOptions(projection="random", n_components=100, classifier="mlp", layers=(16, 12), max_iter=20)
    for candidate, record in (
        (make_candidate(rows, options), options.as_record()),
        (augmented, OTHER_OPTIONS.as_record() | {"augmented": 1}),
    ):
        version, _ = register(registry, candidate, parts_of(home, champion), {})
        bundle = registry.read(version)
        check_golden(bundle, load_scorer(bundle))
        assert bundle.manifest.fit == record
        assert bundle.manifest.projection.n_out == record["n_components"]
        assert bundle.manifest.metrics["accuracy"] > 0.5


def test_model_trained_on_shuffled_labels_is_not_promoted(
    spark: SparkSession, rows: DataFrame, champion: Bundle, features: Table
) -> None:
    """The labels of the training images are permuted; those of the held-out images are correct."""
    training, holdout = Split(OPTIONS.seed, OPTIONS.holdout).sides(rows)
    found = training.orderBy("image_id").select("image_id", "label").toArrow()
    shuffled = np.random.default_rng(0).permutation(np.array(found.column("label").to_pylist()))
    labels = spark.createDataFrame(pa.table({"image_id": found.column("image_id"), "label": pa.array(shuffled)}))
    relabelled = training.drop("label").join(labels, "image_id")
    candidate = make_candidate(in_order(relabelled.unionByName(holdout), 1280), OPTIONS)
    paired = compare(candidate, champion, rows, fitted_on(champion, local_home(Path(features.tables).parent))).paired
    counts = paired.counts
    assert counts.rows == champion.manifest.training_data.holdout_rows
    assert counts.gain < -0.3
    assert not decide(paired, GateOptions(margin=-0.3)).promote


def test_comparison_excludes_the_training_images_of_the_champion(
    rows: DataFrame, champion: Bundle, augmented: Candidate, features: Table
) -> None:
    theirs = {row.image_id for row in Split(42, 0.2).sides(rows)[1].select("image_id").collect()}
    ours = {row.image_id for row in augmented.holdout.select("image_id").collect()}
    comparison = compare(augmented, champion, rows, fitted_on(champion, local_home(Path(features.tables).parent)))
    assert 0 < comparison.counts.rows == comparison.champion.rows == len(ours & theirs) < len(ours)


def test_augmented_copies_are_fitted_on_and_never_evaluated(rows: DataFrame, augmented: Candidate) -> None:
    split = Split(OTHER_OPTIONS.seed, OTHER_OPTIONS.holdout)
    training, holdout = (part.count() for part in split.sides(rows))
    assert augmented.split == split
    assert augmented.evaluation.rows == holdout
    assert augmented.fitted.rows == 2 * training


# --- the commands


def test_dry_run_reports_the_outcome_without_changes(home: Path, jars_dir: Path, exports: Path) -> None:
    settings = Settings(home=home, jars=jars_dir, backbones=exports)
    before = sorted((home / "models").rglob("*"))
    found = imagestream(settings, "retrain", "--dry-run", "--margin=-0.9", "--explained-variance", "0.5")
    assert (found["version"], found["bundle_sha256"]) == (None, None)
    assert found["promoted"]  # it would be promoted
    assert found["n_components"] < 30
    assert sum(found["paired_counts"].values()) == found["metrics"]["holdout_rows"]
    assert found["gain_above"] <= found["gain"]
    assert found["champion_metrics"]["accuracy"] + found["gain"] == pytest.approx(found["metrics"]["accuracy"])
    assert sorted((home / "models").rglob("*")) == before


@pytest.mark.usefixtures("exports_here")
def test_int8_is_compared_with_float_on_the_holdout(home: Path, jars_dir: Path, exports: Path) -> None:
    settings = Settings(home=home, jars=jars_dir, backbones=exports)
    small = ("--backbone", "cnn_color", "--weights", "random", "--input-size", 24, "--projection", "none")
    arguments = (*small, "--limit", 60, "--max-iter", 3, "--int8", "--margin=-0.9")
    found = imagestream(settings, "train", "--dataset", "digits", *arguments)
    metrics = found["metrics"]
    assert metrics["int8_cost"] == pytest.approx(metrics["float_accuracy"] - metrics["accuracy"], abs=1e-8)
    assert ("int8 costs" in found["why"]) is (metrics["int8_cost"] > 0.01)
    bundle = open_registry(home).read(found["version"])
    assert bundle.manifest.backbone.precision == "int8"
    assert bundle.manifest.metrics["int8_cost"] == pytest.approx(metrics["int8_cost"], abs=1e-8)
    # The champion is compared by its features of the same images.
    assert sum(found["paired_counts"].values()) == metrics["holdout_rows"]


def test_int8_requires_litert() -> None:
    with pytest.raises(ServiceError, match="--int8 requires --runtime litert"):
        BackboneOptions(engine="keras", int8=True)


# --- on a schedule


@pytest.mark.parametrize(
    ("text", "interval"),
    [("90s", timedelta(seconds=90)), ("30m", timedelta(minutes=30)), ("24h", timedelta(1)), ("7d", timedelta(7))],
)
def test_interval_is_parsed(text: str, interval: timedelta) -> None:
    assert parse_interval(text) == interval


@pytest.mark.parametrize("text", ["", "24", "h", "0s", "-1h", "400d", "24 hours", "9" * 12 + "s", "١h"])
def test_invalid_interval_is_rejected(text: str) -> None:
    with pytest.raises(ServiceError, match="expected a time such as 10s, 15m, 24h or 7d"):
        parse_interval(text)


def test_failed_run_is_reported_and_the_next_one_starts(tmp_path: Path) -> None:
    """The real command in an empty home, next to modules of the same names: each run fails without a champion."""
    command = [sys.executable, "-P", "-m", "imagestream", "--home", str(tmp_path), "retrain", "--every", "1s"]
    for name in ("imagestream.py", "streaming.py", "models.py"):
        (tmp_path / name).write_text("raise SystemExit('imported a module of the working directory')\n")
    log = tmp_path / "log"
    with log.open("wb") as file:
        service = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 300
        while log.read_text().count("retraining failed") < 2:
            assert service.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        service.send_signal(signal.SIGTERM)
        assert service.wait(300) == 0
    finally:
        service.kill()
    lines = log.read_text().splitlines()
    assert "retraining every=" in lines[0]
    assert all('error: retraining failed why="there is no champion model in' in line for line in lines[1:-1])
    assert lines[-1].endswith("stopped")


def test_sigint_stops_the_running_retraining_and_the_schedule(tmp_path: Path) -> None:
    """As on Ctrl-C: the current run may clean up, and no further one starts."""
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(open(sys.argv[1], 'a').write('cleaned')))"
    code += "; open(sys.argv[1], 'a').write('started '); time.sleep(60)"
    service = (
        "import sys; from datetime import timedelta; from streaming.training.schedule import run_every; "
        "run_every(timedelta(seconds=1), sys.argv[1:], lambda *run: print(run))"
    )
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", service, sys.executable, "-c", code, str(mark)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not mark.exists() or not mark.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=300)
    assert (running.returncode, output) == (0, "")
    assert mark.read_text() == "started cleaned"


def test_sigterm_ends_training_in_one_line_even_if_the_jvm_ends_first(
    trained: Path, jars_dir: Path, exports: Path, tmp_path: Path
) -> None:
    """As a service manager does: the whole process group receives the signal."""
    shutil.copytree(trained, home := tmp_path / "home", symlinks=True)
    environment = os.environ | environment_of(Settings(home=home, jars=jars_dir, backbones=exports))
    command = [sys.executable, "-m", "streaming", "--home", str(home), "retrain"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        while "pyspark.daemon" not in _commands_below(running.pid):  # so that a job is running
            assert running.poll() is None
            time.sleep(0.3)  # each look reads all processes of the machine
        os.killpg(running.pid, signal.SIGTERM)
        output = running.communicate(timeout=300)
    assert (running.returncode, *output) == (EXIT_INTERRUPTED, "", "stopped by SIGTERM\n")


def _commands_below(pid: int) -> str:
    words = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            words += process.cmdline()
    return " ".join(words)


def test_on_run_receives_the_exit_code_and_the_last_line(tmp_path: Path) -> None:
    reported: list[tuple[int, str]] = []

    def on_run(code: int, line: str) -> None:
        reported.append((code, line))
        if len(reported) == 2:
            signal.raise_signal(signal.SIGTERM)

    mark = tmp_path / "mark"
    code = (
        "import os, sys; os.path.exists(sys.argv[1]) and sys.exit('no\\nwrong'); open(sys.argv[1], 'w'); print('a\\nb')"
    )
    run_every(timedelta(seconds=1), [sys.executable, "-c", code, str(mark)], on_run)
    assert reported == [(0, "b"), (1, "wrong")]


def test_processes_started_by_a_run_do_not_outlive_it() -> None:
    """For example a JVM whose Python process died during its start; it also keeps the run's output open."""
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid)"
    reported: list[str] = []

    def on_run(_: int, line: str) -> None:
        reported.append(line)
        signal.raise_signal(signal.SIGTERM)

    run_every(timedelta(seconds=1), [sys.executable, "-c", code], on_run)
    # A killed process may take a moment to exit.
    wait_until(lambda: has_ended(int(reported[0])), lambda: f"process {reported[0]} has not ended")
