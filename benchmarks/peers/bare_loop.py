"""The limit of the machine: one process per core that only decodes images and runs the same model.

No Kafka, no Spark, no Delta. One image at a time, which is faster than batches.
"""

import argparse
import json
import multiprocessing
import os
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scoring import litert, onnxruntime

ENGINES = {"litert": litert, "onnx": onnxruntime}
WARM_UP_S = 2.0


def work(options: argparse.Namespace, barrier: Any, counts: Any) -> None:
    """Process the images repeatedly for a given time; puts the images per second."""
    features, (height, width) = ENGINES[options.engine](options.model)
    images = [path.read_bytes() for path in sorted(options.images.iterdir())]

    def run(seconds: float) -> float:
        since, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - since) < seconds:
            image = Image.open(BytesIO(images[done % len(images)]))
            image.draft("RGB", (width, height))
            image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            features(np.asarray(image)[np.newaxis])
            done += 1
        return done / spent

    run(WARM_UP_S)
    barrier.wait()
    counts.put(run(options.seconds))


def main() -> None:
    """Run the loop and write the images per second of all processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--engine", choices=ENGINES, default="litert")
    parser.add_argument("--model", type=Path, required=True, help="A flatbuffer for litert, an ONNX file for onnx.")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(options.processes), context.Queue()
    processes = [context.Process(target=work, args=(options, barrier, counts)) for _ in range(options.processes)]
    for process in processes:
        process.start()
    rates = [counts.get() for _ in processes]
    for process in processes:
        process.join()
    options.json.write_text(json.dumps({"images_per_s": sum(rates)}))


if __name__ == "__main__":
    main()
