"""How much does a second worker speed up CNN training, and how much memory do ten times the images cost the driver?"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.pairs import Pair
from examples.glasses_distributed.faces import write_folders
from streaming.settings import Settings, read_settings

SIDE, SEED = 128, 614
FEW, MANY, DRAWN = 6_000, 60_000, 600
FACES = 3_000  # for the speed-up
EPOCHS, RUNS = 4, 2
POLL_S = 0.2
MB = 2**20


@dataclass(frozen=True)
class Run:
    """The result of a training run, and the peak memory of its driver: Python and JVM, without workers."""

    summary: dict[str, Any]
    driver_mb: float


def questions() -> Iterator[Pair]:
    settings = read_settings()
    settings = settings.model_copy(update={"jars": settings.jars_dir.resolve()})
    with TemporaryDirectory() as scratch:
        drawn = write_folders(Path(scratch, "drawn"), DRAWN, SIDE, SEED)
        faces = _copies(drawn, Path(scratch, "faces"), FACES)
        speeds: dict[int, list[float]] = {2: [], 1: []}
        for _ in range(RUNS):
            for workers, found in speeds.items():
                found.append(_train(settings, scratch, faces, workers, EPOCHS).summary["history"]["images_per_second"])
        what = f"synchronous, per epoch, {FACES:,} images of {SIDE}×{SIDE}: 2 workers against 1, a thread each"
        yield Pair(what, "images/s", 1.6, speeds[2], speeds[1])
        few, many = (
            _train(settings, scratch, _copies(drawn, Path(scratch, str(n)), n), 2, 1).driver_mb for n in (FEW, MANY)
        )
        yield Pair(f"peak memory of the driver at {FEW:,} images, against {MANY:,} images", "MB", 0.9, [few], [many])


def _copies(drawn: Path, folder: Path, n: int) -> Path:
    """`n` distinct files of the drawn faces; bytes after the end of the JPEG, which decoders ignore, differ."""
    files = sorted(drawn.glob("*/*.jpg"))
    for number in range(n):
        source = files[number % len(files)]
        target = folder / source.parent.name / f"face-{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes() + number.to_bytes(4, "big"))
    return folder


def _train(settings: Settings, scratch: str, faces: Path, workers: int, epochs: int) -> Run:
    with TemporaryDirectory(dir=scratch) as home:
        summary = Path(home, "summary.json")
        options: list[Any] = ["--workers", workers, "--epochs", epochs, "--batch-size", 128, "--json", summary]
        command = ["-m", "streaming", "--home", home, "train-cnn", "--images", faces, *options]
        environment = os.environ | {"IMAGESTREAM_JARS": str(settings.jars)}
        with Path(home, "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, _driver_mb(process.pid))
                time.sleep(POLL_S)
        if process.returncode != 0:
            raise RuntimeError(Path(home, "log").read_text(errors="replace")[-2_000:])
        return Run(json.loads(summary.read_bytes()), peak)


def _driver_mb(pid: int) -> float:
    try:
        driver = psutil.Process(pid)
        java = [child for child in driver.children() if child.name() == "java"]
        return float(sum(one.memory_info().rss for one in (driver, *java)) / MB)
    except psutil.Error:  # the process has just exited
        return 0.0
