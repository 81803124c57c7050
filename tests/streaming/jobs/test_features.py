"""`imagestream features`: one row per image, sorted by path, in every format and with every projection."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from sklearn.decomposition import PCA as SklearnPCA  # noqa: N811

from models.arrays import Features
from models.backbone import FLATBUFFER_FILE
from models.engine import LiteRTEngine
from models.projection import NoProjection, Projection
from models.random_projection import make_random_projection
from models.scorer import decode_all, load_head
from streaming.cli import commands  # noqa: F401  registers every command
from streaming.cli.app import run
from streaming.errors import ServiceError
from streaming.images.dataset import digit_images, read_dataset, write_images
from streaming.jobs.feature_files import SCHEMA, write_feature_files
from streaming.jobs.output import FileFormat, check_output, output_format
from streaming.registry import open_registry
from streaming.settings import Settings
from streaming.storage.files import list_array
from tests.conftest import imagestream
from tests.streaming.small_models import bundle_folder

ROWS, WIDTH = 60, 8
SMALL = ("--backbone", "cnn_color", "--weights", "random")
IMAGES, PER_TASK = 120, 5  # of a run that is killed: each task takes a tenth of a second


@pytest.fixture
def settings(tmp_path: Path, jars_dir: Path, exports: Path) -> Settings:
    return Settings(home=tmp_path / "home", jars=jars_dir, backbones=exports)


@pytest.fixture(scope="module")
def features() -> Features:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def paths() -> list[str]:
    return [f'd/{number:03d} "\u00e9", x.png' for number in range(ROWS)]


def rows_of(output: Path, format_: FileFormat) -> tuple[list[str], list[str | None], Features]:
    """(paths, labels, features) by an independent reader."""
    if format_ == "csv":
        with output.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        assert header[:3] == ["path", "label", f"{header[2].rstrip('1')}1"]
        values = np.array([[float(value) for value in row[2:]] for row in rows], np.float32)
        return [row[0] for row in rows], [row[1] or None for row in rows], values
    if format_ == "parquet":
        table = pq.read_table(output)
    else:
        table = duckdb.read_parquet(DeltaTable(output).file_uris()).order("path").to_arrow_table()
    assert table.column_names == SCHEMA.names
    found = [table.column(name).to_pylist() for name in ("path", "label", "features")]
    return found[0], found[1], np.array(found[2], np.float32)


@pytest.mark.parametrize(
    ("format_", "projection"),
    [
        ("csv", NoProjection(WIDTH)),
        ("parquet", make_random_projection(WIDTH, 3, 1)),
        ("delta", NoProjection(WIDTH)),
    ],
    ids=["csv", "parquet of a random projection", "delta"],
)
def test_output_has_projected_rows_sorted_by_path_and_is_replaced(
    spark: SparkSession, features: Features, tmp_path: Path, format_: FileFormat, projection: Projection
) -> None:
    labels = [None if number % 7 == 0 else f"label {number % 3}" for number in range(ROWS)]
    table = pa.table({"source": paths(), "image_id": ["id"] * ROWS, "label": labels, "features": list_array(features)})
    shuffled = spark.createDataFrame(table.take(np.random.default_rng(1).permutation(ROWS))).repartition(5)
    output = tmp_path / "out"
    for rows in (shuffled.limit(9), shuffled):
        n = write_feature_files(rows, ROWS, projection, output, format_)
    assert n == ROWS
    found = rows_of(output, format_)
    assert found[:2] == (paths(), labels)
    np.testing.assert_array_equal(found[2], projection.transform(features))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_run_leaves_the_output_unchanged(spark: SparkSession, tmp_path: Path) -> None:
    ragged = pa.table({"source": ["a", "b"], "image_id": ["", ""], "label": ["", ""], "features": [[1.0], [1.0, 2.0]]})
    rows = spark.createDataFrame(ragged).coalesce(1)
    output = tmp_path / "out.csv"
    output.write_text("before")
    with pytest.raises(Exception, match="features of different widths"):
        write_feature_files(rows, 2, NoProjection(1), output, "csv")
    assert output.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_folder_to_csv_of_principal_components(settings: Settings, tmp_path: Path) -> None:
    """A header, one row per image and the number of components of scikit-learn; a bad file gives exit code 1."""
    folder = write_images(tmp_path / "digits", digit_images(60))
    (folder / "7" / "bad.png").write_bytes(b"no image")
    output = tmp_path / "out" / "digits.csv"
    options = (*SMALL, "--explained-variance", 0.9)
    summary = imagestream(settings, "features", "--images", folder, "--output", output, *options, code=1)
    assert (summary["rows"], summary["dataset"]["images"], summary["featurized"]["n_bad"]) == (60, 61, 1)
    assert summary["featurized"]["bad"] == {
        str(folder / "7" / "bad.png"): "not_an_image: starts with 6e 6f 20 69 6d 61 67 65, no known image format"
    }
    (folder / "7" / "bad.png").unlink()
    files = read_dataset(folder).files
    names, labels, found = rows_of(output, "csv")
    assert names == [file.path for file in files]
    assert labels == [file.label for file in files]
    kept = duckdb.read_parquet(DeltaTable(settings.work_dir / "featurized" / "features").file_uris())
    raw = np.array(kept.order("source").project("features").fetchall(), np.float32)[:, 0]
    pca = SklearnPCA(0.9, svd_solver="full").fit(raw)
    assert found.shape == (60, pca.n_components_)
    expected = pca.transform(raw)
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=1e-3)


def test_model_option_uses_its_backbone_and_projection(settings: Settings, trained: Path, tmp_path: Path) -> None:
    registry = open_registry(trained)
    (settings.work_dir / "models").parent.mkdir(parents=True)
    (settings.work_dir / "models").symlink_to(trained / "models")
    folder = write_images(tmp_path / "digits", digit_images(8, skip=300))
    output = tmp_path / "digits.parquet"
    summary = imagestream(settings, "features", "--images", folder, "--output", output, "--model", 1)
    assert (summary["rows"], summary["featurized"]["reused"]) == (8, 0)
    engine = LiteRTEngine(bundle_folder(trained, 1) / FLATBUFFER_FILE)
    images = decode_all([Path(file.path).read_bytes() for file in read_dataset(folder).files], engine.input_size).images
    expected = load_head(registry.read(1)).projection.transform(engine(images))
    np.testing.assert_allclose(rows_of(output, "parquet")[2], expected, atol=1e-4)


def test_killed_or_stopped_run_continues(settings: Settings, tmp_path: Path) -> None:
    """Killed after the first commit of a task, stopped by Ctrl-C after another one, and finally completed."""
    folder = write_images(tmp_path / "digits", digit_images(IMAGES))
    command = ["features", "--images", folder, "--output", tmp_path / "out.csv", *SMALL]
    arguments = ["--home", settings.home, *command]
    code = f"""
import signal
from streaming.images import featurize
from streaming.cli import commands
from streaming.cli.app import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run with another handler
featurize.IMAGES_PER_TASK = {PER_TASK}
run({[str(argument) for argument in arguments]!r})
"""
    variables = {"IMAGESTREAM_JARS": str(settings.jars), "IMAGESTREAM_BACKBONES": str(settings.backbones)}
    environment = os.environ | variables | {"IMAGESTREAM_MASTER": "local[1]"}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, start_new_session=True, text=True, stderr=subprocess.PIPE
        )

    def commits() -> int:
        return len(list((settings.work_dir / "featurized" / "features" / "_delta_log").glob("*.json"))) - 1

    def wait_for_a_commit(process: "subprocess.Popen[str]") -> None:
        before, deadline = max(0, commits()), time.monotonic() + 300
        while commits() <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    for number, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start()
        wait_for_a_commit(process)
        os.killpg(process.pid, number)  # as a terminal does: the process, its JVM and its workers
        _, err = process.communicate(timeout=300)
        assert process.returncode == expected, err
    assert err.splitlines() == ["interrupted; run the same command again to continue"]
    assert not (tmp_path / "out.csv").exists()
    found = imagestream(settings, *command)
    assert found["rows"] == IMAGES
    assert 2 * PER_TASK <= found["featurized"]["reused"] < IMAGES
    assert len(rows_of(tmp_path / "out.csv", "csv")[0]) == IMAGES


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [("a.csv", None, "csv"), ("a.PARQUET", None, "parquet"), ("a", None, "delta"), ("a.txt", "csv", "csv")],
)
def test_format_is_inferred_from_the_suffix(name: str, given: FileFormat | None, expected: FileFormat) -> None:
    assert output_format(Path(name), given) == expected


def test_invalid_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"expected a name that ends in .csv or .parquet"):
        output_format(tmp_path / "a.txt", None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ServiceError, match="exists and is not a Delta table"):
        check_output(tmp_path / "file", "delta")
    with pytest.raises(ServiceError, match="exists and is not a Delta table"):
        check_output(tmp_path, "delta")
    with pytest.raises(ServiceError, match="is a folder: choose a file"):
        check_output(tmp_path, "csv")
    with pytest.raises(ServiceError, match="cannot write to"):
        check_output(tmp_path / "file" / "a.csv", "csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--projection", "pca", "--flat"], "PCA of 62,720 features needs 31.5 GB"),
        (["--model", "3"], "there is no model version 3"),
        (["--explained-variance", "1.5"], "explained variance should be above 0 and at most 1"),
        (["--backbone", "resnet"], "unknown backbone 'resnet'"),
        (["--label-pattern", "a"], "has no group: expected one for the label"),
    ],
)
def test_invalid_options_are_reported_in_one_line_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder = write_images(tmp_path / "images", [("1.png", "a", b"1"), ("2.png", "b", b"2")])
    arguments = [
        "--home",
        str(tmp_path / "home"),
        "features",
        "--images",
        str(folder),
        "--output",
        str(tmp_path / "x.csv"),
    ]
    with pytest.raises(SystemExit) as stopped:
        run([*arguments, *options])
    assert stopped.value.code == (1 if options[0] in {"--model", "--backbone", "--projection"} else 2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "home").exists()
