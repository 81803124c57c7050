"""How does distributed training of a CNN compare with Keras in one process and with Elephas on the same data and cores?

Elephas needs older versions of Spark, TensorFlow and NumPy, so it runs in its own environment, created on first use.
Each training run is a separate process, killed with its children after a timeout.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from benchmarks.pairs import Pair
from benchmarks.processes import make_environment, run_json
from examples.glasses_distributed.faces import WITH, write_folders
from streaming.distributed.options import Frequency, Mode
from streaming.distributed.shards import identified
from streaming.images.dataset import read_dataset
from streaming.images.images_frame import images_frame
from streaming.images.split import Sides
from streaming.platform.java import find_java
from streaming.platform.session import QUICK_START, spark_session
from streaming.settings import Settings, read_settings

IMAGES, SIDE, SEED = 2_000, 128, 614
HOLDOUT, VALIDATION = 0.2, 0.1
WORKERS, EPOCHS, BATCH_SIZE = 4, 10, 128
TIMEOUT_S = 600  # per training run; one or two minutes are usual
ELEPHAS = ("elephas==7.3.0", "pyspark==4.0.0", "tensorflow==2.19.1", "numpy==1.26.4", "setuptools==80.10.2")
PEER = Path(__file__).with_name("cnn_peer.py")
WITHIN_A_POINT, WITHIN_A_TENTH = 0.99, 0.91


@dataclass(frozen=True)
class Run:
    """The result of a training run; after a timeout, `images_per_s` is an upper bound and the rest is unknown."""

    images_per_s: float
    accuracy: float | None = None
    log_loss: float | None = None

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"not ended in {TIMEOUT_S} s"
        return f"accuracy {self.accuracy:.3f}, log loss {self.log_loss:.3f}"


@dataclass(frozen=True)
class Faces:
    """The same faces as files and as gray arrays with the same split; `rows` is the number of training images."""

    folder: Path
    arrays: Path
    rows: int


def questions() -> Iterator[Pair]:
    settings = read_settings()
    settings = settings.model_copy(update={"jars": settings.jars_dir.resolve()})
    elephas = make_environment(settings.work_dir / "benchmarks" / "elephas", ELEPHAS)
    with TemporaryDirectory() as scratch:
        faces = _write_faces(settings, Path(scratch))
        for mode in Mode:
            for frequency in Frequency:
                yield from _compare(mode, frequency, settings, faces, elephas)


def _print_run(what: str, run: Run) -> Run:
    """Print the result of a training run at once, because all of them take half an hour."""
    print(f"{what}: {run.images_per_s:,.0f} images/s, {run}", file=sys.stderr, flush=True)
    return run


def _compare(mode: Mode, frequency: Frequency, settings: Settings, faces: Faces, elephas: Path) -> Iterator[Pair]:
    keras = _print_run("Keras", _run_peer(sys.executable, ["keras"], settings, faces))
    ours = _print_run(f"ours, {mode}, per {frequency}", _run_ours(mode, frequency, settings, faces))
    what = f"{mode}, per {frequency}: {faces.rows:,} images × {EPOCHS} epochs, {WORKERS} workers ({ours}), against"
    yield Pair(f"{what} Keras in one process ({keras})", "images/s", WITHIN_A_TENTH, *_speeds(ours, keras))
    if ours.accuracy is not None and keras.accuracy is not None:
        yield Pair(
            f"{mode}, per {frequency}: correct predictions, against Keras", "%", WITHIN_A_POINT,
            [100 * ours.accuracy], [100 * keras.accuracy],
        )  # fmt: skip
    if (mode, frequency) != (Mode.SYNCHRONOUS, Frequency.BATCH):  # not supported by Elephas
        library = ["elephas", "--mode", mode, "--frequency", frequency]
        peer = _print_run(f"Elephas, {mode}, per {frequency}", _run_peer(elephas, library, settings, faces))
        yield Pair(f"{what} Elephas ({peer})", "images/s", 1.0, *_speeds(ours, peer))


def _speeds(ours: Run, peer: Run) -> tuple[list[float], list[float]]:
    return [ours.images_per_s], [peer.images_per_s]


def _run_ours(mode: Mode, frequency: Frequency, settings: Settings, faces: Faces) -> Run:
    home = faces.folder.parent / f"{mode}-{frequency}"
    figures = _run(
        sys.executable, "-m", "streaming", "--home", home, "train-cnn", "--images", faces.folder, "--architecture",
        "cnn_gray", "--input-size", SIDE, "--mode", mode, "--frequency", frequency, "--workers", WORKERS, "--holdout",
        HOLDOUT, "--validation", VALIDATION, "--seed", SEED, settings=settings,
    )  # fmt: skip
    if figures is None:
        return Run(faces.rows * EPOCHS / TIMEOUT_S)
    found = figures["metrics"]
    return Run(faces.rows * EPOCHS / figures["history"]["seconds"], found["accuracy"], found["log_loss"])


def _run_peer(python: str | Path, library: list[str], settings: Settings, faces: Faces) -> Run:
    options = ("--workers", WORKERS) if library[0] == "elephas" else ()
    figures = _run(python, PEER, *library, "--data", faces.arrays, *options, settings=settings)
    if figures is None:
        return Run(faces.rows * EPOCHS / TIMEOUT_S)
    return Run(faces.rows * EPOCHS / figures["seconds"], figures["test_accuracy"], figures["test_log_loss"])


def _run(*command: str | float | Path, settings: Settings) -> dict[str, Any] | None:
    """The figures that a training run writes as JSON; None if it was killed at the time limit.

    Raises:
        RuntimeError: it fails.
    """
    java_home = find_java(settings.work_dir).parent.parent
    environment = {"JAVA_HOME": str(java_home), "IMAGESTREAM_JARS": str(settings.jars)}
    options = ("--epochs", EPOCHS, "--batch-size", BATCH_SIZE)
    try:
        return run_json(*command, *options, environment=environment, timeout_s=TIMEOUT_S)
    except TimeoutError:
        return None


def _write_faces(settings: Settings, scratch: Path) -> Faces:
    """The faces, split as by `train-cnn`, so that the peers train on and predict the same images as ours."""
    folder = write_folders(scratch / "faces", IMAGES, SIDE, SEED)
    apart = settings.model_copy(update={"home": scratch / "split"})
    with spark_session(apart, "benchmark", java_options=QUICK_START) as spark:
        images = identified(images_frame(spark, read_dataset(folder), lambda n, _: min(n, WORKERS))).persist()
        sides = Sides.of(HOLDOUT, VALIDATION, SEED)
        side = F.when(sides.holdout.held_out(), "test").when(sides.validation.held_out(), "validation")
        divided = images.select("source", side.otherwise("train").alias("side")).orderBy("source").collect()
    arrays: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    for name in ("train", "test"):
        files = [Path(row.source) for row in divided if row.side == name]
        arrays[f"x_{name}"] = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
        arrays[f"y_{name}"] = np.array([file.parent.name == WITH for file in files], np.uint8)
    np.savez(scratch / "faces.npz", allow_pickle=False, **arrays)
    return Faces(folder, scratch / "faces.npz", len(arrays["x_train"]))
