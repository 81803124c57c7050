"""How does the peak memory of driver and workers change with ten times the images?"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from benchmarks.pairs import Pair
from benchmarks.service import Service, a_service
from streaming.settings import Settings

IMAGES, TIMES, BATCH = 2_000, 10, 1_000
SAMPLE_S, FLAT = 0.2, 0.95


def questions() -> Iterator[Pair]:
    with a_service() as service:
        settings = service.home("plain")
        few, many = (_peaks(service, settings, f"memory-{n}", n) for n in (IMAGES, IMAGES * TIMES))
        for name in few:
            question = f"peak memory of the {name} at {IMAGES * TIMES:,} images, against {IMAGES:,}"
            yield Pair(question, "MB", FLAT, [many[name]], [few[name]], less_is_better=True)


def _peaks(service: Service, settings: Settings, topic: str, images: int) -> dict[str, float]:
    """Megabytes (proportional set size) of the driver, Python and JVM, and of all Python workers together."""
    service.publish(topic, images)
    command = [sys.executable, "-m", "streaming", "--home", str(settings.home), "stream", "--until-drained"]
    with (service.scratch / f"{topic}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--images-per-batch", str(BATCH)], env=os.environ | service.environment(topic), stdout=log,
            stderr=log,
        )  # fmt: skip
        peaks = {"driver": 0.0, "workers": 0.0}
        while process.poll() is None:
            found = dict.fromkeys(peaks, 0.0)
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    is_worker = "pyspark" in " ".join(one.cmdline()) and one.name() != "java"
                    found["workers" if is_worker else "driver"] += one.memory_full_info().pss / 1e6
                except psutil.Error:  # the process has just exited
                    continue
            peaks = {name: max(peaks[name], found[name]) for name in peaks}
            time.sleep(SAMPLE_S)
    if process.returncode:
        raise RuntimeError(
            f"the stream ended with {process.returncode}: {(service.scratch / f'{topic}.log').read_text()}"
        )
    return peaks
