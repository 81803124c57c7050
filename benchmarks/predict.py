"""How many images per second does `imagestream predict` classify, and how long does the first one take?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.end_to_end import bare_loop, in_turn
from benchmarks.pairs import Pair
from benchmarks.processes import run_json
from benchmarks.service import Service
from streaming.settings import read_settings

IMAGES, RUNS, FIRST_RUNS, AIM_S = 100, 3, 5, 2.0


def questions() -> Iterator[Pair]:
    with TemporaryDirectory() as scratch:
        yield from _questions(Path(scratch))


def _questions(scratch: Path) -> Iterator[Pair]:
    settings = read_settings()
    places = {"jars": settings.jars_dir.resolve(), "backbones": settings.backbones_dir.resolve()}
    service = Service(scratch, settings.model_copy(update={"home": str(scratch), **places}))
    service.images = service.images[:IMAGES]
    home = service.home("plain")
    photographs = service.write_images()
    command = [sys.executable, "-m", "imagestream", "--home", str(home.home), "predict"]
    output = scratch / "predictions.csv"

    def classify(_: int) -> float:
        summary = run_json(*command, photographs, "--format", "csv", "--output", output)
        return float(summary["images_per_s"])

    classify(0)  # engines are timed once per machine
    question = f"predict, {IMAGES} photographs, against the bare loop"
    yield Pair(question, "images/s", 0.9, *in_turn(classify, lambda _: bare_loop(service, home), RUNS))
    one = str(min(photographs.iterdir()))
    seconds = []
    for _ in range(FIRST_RUNS):
        clock = perf_counter()
        subprocess.run([*command, one], check=True, capture_output=True, env=os.environ)
        seconds.append(perf_counter() - clock)
    question = "predict, one photograph: process start → end, against the aim"
    yield Pair(question, "s", 1.0, seconds, [AIM_S] * len(seconds), less_is_better=True)
