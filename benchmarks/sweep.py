"""Plots of throughput by the size of micro-batches, and of the time by the number of images.

python -m benchmarks.sweep docs/performance
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.end_to_end import bare_loop
from benchmarks.service import PIXELS, a_service
from streaming.jobs.capacity import images_per_s, measure
from streaming.query import query

SIZES = {100: 2_000, 250: 3_000, 500: 4_000, 1_000: 6_000, 2_000: 8_000, 4_000: 12_000}  # in a batch → published
IMAGES, BATCH = 20_000, 2_000
CHECKPOINTS = (1_000, 4_000, 20_000)
CORES, PARTITIONS = 2, 4

CUMULATIVE_SQL = """
SELECT sum(input_rows) OVER (ORDER BY batch_id)::BIGINT AS images,
       epoch(committed_at) - epoch(min(started_at) OVER ()) AS seconds
FROM batches WHERE offsets[1].topic = $topic ORDER BY batch_id
"""


def main(folder: Path) -> None:
    """Measure, and write two plots and their data into a folder."""
    with a_service() as service:
        settings = service.home("plain")
        bare = bare_loop(service, settings)
        costs = measure(service.flatbuffer(settings), PIXELS, PIXELS, CORES)
        speeds = {size: service.images_per_s(settings, f"size-{size}", images, size) for size, images in SIZES.items()}
        expected = {size: images_per_s(costs, size, CORES, PARTITIONS) for size in SIZES}
        service.publish("course", IMAGES)
        service.drain(settings, "course", BATCH)
        course = query(settings, CUMULATIVE_SQL, parameters={"topic": "course"}).to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    _plot_sizes(folder / "batch-size.png", speeds, expected, bare)
    _plot_images(folder / "images.png", course, bare)
    after = {images: next(row["seconds"] for row in course if row["images"] >= images) for images in CHECKPOINTS}
    figures = {"bare_loop": bare, "images_per_s": speeds, "model": expected, "seconds_for_images": after}
    (folder / "sweep.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _plot_sizes(path: Path, speeds: dict[int, float], expected: dict[int, float], bare: float) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(list(speeds), list(speeds.values()), "o-", label="measured, Kafka → Delta")
    axes.plot(list(expected), list(expected.values()), "--", color="grey", label="the model of `imagestream size`")
    axes.axhline(bare, color="black", linewidth=0.8, label=f"bare loop, {bare:,.0f} images/s")
    axes.set(xscale="log", xlabel="images in a micro-batch", ylabel="images per second", ylim=(0, None))
    axes.set_xticks(list(speeds), [f"{size:,}" for size in speeds])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _plot_images(path: Path, course: list[dict[str, Any]], bare: float) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    images, seconds = [[row[name] for row in course] for name in ("images", "seconds")]
    axes.plot(images, seconds, "o-", label=f"Kafka → Delta, micro-batches of {BATCH:,}, from the start of the first")
    axes.plot([0, images[-1]], [0, images[-1] / bare], color="black", linewidth=0.8, label="bare loop")
    axes.set(xlabel="images", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/performance"))
