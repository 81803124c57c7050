"""Capacity planning: derives cores, partitions and memory from the cost of an image and of a micro-batch.

The model has two terms. An image costs core-seconds, `Costs.per_image_s`, which are spread over all cores. A
micro-batch has a fixed overhead in wall time, `overhead_s`, for Spark's plan, the start of a task per partition, and
the driver's commit. Hence a batch of B images on W cores takes `overhead_s + B × per_image_s / W`.
"""

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from models.decode import DEFAULT_LIMITS, BadImage, decode
from models.engine import LiteRTEngine
from streaming.pipeline.preflight import MIB, WORKER_BYTES, decoding_bytes, heap_bytes

# Measured with `imagestream stream --profile`, see docs/scale.md; valid for cores like the one used there.
REST_PER_IMAGE_S = 0.0006  # fetch, headers, projection, classifier, features, and Spark's share
BATCH_S = 0.23  # plan, commit, and Spark between two batches
TASK_S = 0.0015  # of the driver, per task
# For a load that is spread evenly over the partitions.
TARGET_UTILISATION = 0.7  # leaves reserves for bursts and for the loss of a core
OVERHEAD_SHARE = 0.1  # the maximum share of a batch's time that is overhead
MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 10.0
DRIVER_ROWS_PER_S = 250_000  # scored rows that one driver receives and commits
ROW_BYTES, FEATURE_ROW_BYTES = 300, 250  # of a prediction, and of a row of features without its floats
SECONDS_A_DAY = 86_400
HEAP_TASKS = 32  # task results that reach the driver at the same time
COPIES_OF_ROWS = 4  # of a batch's rows on the driver: Spark's, Arrow's, with added columns, the Parquet file
KAFKA_PARTITIONS = 200_000  # per cluster; kafka.apache.org/documentation, on KRaft
COMMITS_PER_S = 15  # 60 ms each, see docs/performance.md
OBJECTS_PER_S = 3_500  # docs.aws.amazon.com/AmazonS3, "Optimizing Amazon S3 performance": PUTs per second and prefix

MEASURE_S = 2.0
JPEG_QUALITY = 86


@dataclass(frozen=True)
class Costs:
    """The cost of one image in core-seconds, and its size as a message in bytes."""

    decode_s: float
    backbone_s: float
    rest_s: float = REST_PER_IMAGE_S
    image_bytes: int = 0

    @property
    def per_image_s(self) -> float:
        return self.decode_s + self.backbone_s + self.rest_s


@dataclass(frozen=True)
class CapacityPlan:
    """The resources of a service for a load.

    Attributes:
        streams: the number of streams that share the load, each with its own topic and home, since the number of tasks
            that a driver can start is limited.
        cores, partitions, worker_memory_bytes: of all streams together.
        images_per_batch, driver_memory_bytes: of each stream.
        interval_s: from one micro-batch to the next; an image waits half of it on average before it is read.
        latency_s: from publication to the row, on average.
        limits: the parts that do not scale with cores: name → (load, limit), in the same unit.
    """

    streams: int
    cores: int
    partitions: int
    images_per_batch: int
    interval_s: float
    latency_s: float
    worker_memory_bytes: int  # of all Python workers
    driver_memory_bytes: int
    topic_bytes_per_day: int
    table_bytes_per_day: int
    limits: dict[str, tuple[float, float]]

    @property
    def first_limit(self) -> str:
        """The limit that is reached first as the load grows."""
        return max(self.limits, key=lambda name: self.limits[name][0] / self.limits[name][1])


def overhead_s(tasks: int) -> float:
    """The overhead of a micro-batch with a number of tasks, in seconds."""
    return BATCH_S + TASK_S * tasks


def most_tasks() -> int:
    """The maximum number of tasks in a micro-batch whose overhead stays within `OVERHEAD_SHARE`."""
    return int((MAX_INTERVAL_S * OVERHEAD_SHARE - BATCH_S) / TASK_S)


def images_per_s(costs: Costs, images_per_batch: int, cores: int, tasks: int | None = None) -> float:
    """The throughput of a stream with a backlog, in images per second.

    Args:
        costs: of an image.
        cores: that score in parallel.
        tasks: of a micro-batch; by default two per core.
    """
    seconds = overhead_s(tasks or 2 * cores) + images_per_batch * costs.per_image_s / cores
    return images_per_batch / seconds


def plan(load: float, costs: Costs, n_features: int, bundle_bytes: int) -> CapacityPlan:
    """Plan a service.

    Args:
        load: images per second.
        costs: of an image.
    """
    busy = TARGET_UTILISATION * (1 - OVERHEAD_SHARE)
    cores = max(1, math.ceil(load * costs.per_image_s / busy))
    streams = math.ceil(cores / most_tasks())
    tasks = math.ceil(cores / streams)
    interval = max(MIN_INTERVAL_S, overhead_s(tasks) / OVERHEAD_SHARE)
    images = max(1, math.ceil(load / streams * interval))
    scoring = overhead_s(tasks) + images * costs.per_image_s / tasks
    per_worker = WORKER_BYTES + 2 * bundle_bytes + decoding_bytes(DEFAULT_LIMITS)
    heap = heap_bytes(min(tasks, HEAP_TASKS))
    return CapacityPlan(
        streams=streams,
        cores=streams * tasks,
        partitions=streams * tasks,
        images_per_batch=images,
        interval_s=interval,
        latency_s=interval / 2 + scoring,
        worker_memory_bytes=streams * tasks * per_worker,
        driver_memory_bytes=heap + COPIES_OF_ROWS * images * ROW_BYTES + bundle_bytes,
        topic_bytes_per_day=int(load * costs.image_bytes * SECONDS_A_DAY),
        table_bytes_per_day=int(load * (ROW_BYTES + FEATURE_ROW_BYTES + 4 * n_features) * SECONDS_A_DAY),
        limits={
            "tasks that one driver starts in a micro-batch": (tasks, most_tasks()),
            "rows that one driver commits per second": (load / streams, DRIVER_ROWS_PER_S),
            "partitions of one Kafka cluster": (streams * tasks, KAFKA_PARTITIONS),
            "commits per second to one table": (1 / interval, COMMITS_PER_S),
            "files of features written per second under one prefix": (tasks / interval, OBJECTS_PER_S),
        },
    )


def sample_jpeg(width: int, height: int) -> bytes:
    """A JPEG with about the detail of a photograph: smoothed noise over a gradient."""
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).filter(ImageFilter.GaussianBlur(2))
    slope = np.linspace(-60, 60, width)[np.newaxis, :, np.newaxis]
    pixels = np.clip(np.asarray(noise, np.float32) + slope, 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def measure(flatbuffer: Path, width: int, height: int, cores: int) -> Costs:
    """Measure decoding and the backbone on several cores at once for a few seconds, as in workers.

    Args:
        flatbuffer: the backbone's file.
        width: of the test image, in pixels.
        height: of the test image, in pixels.
        cores: the number of processes.
    """
    image = sample_jpeg(width, height)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        found = list(pool.map(_measure_one, [flatbuffer] * cores, [image] * cores))
    decode_s, backbone_s = (float(np.mean(column)) for column in zip(*found, strict=True))
    return Costs(decode_s, backbone_s, image_bytes=len(image))


def _measure_one(flatbuffer: Path, image: bytes) -> tuple[float, float]:
    """Seconds per image of decoding and of the backbone, in alternation."""
    engine = LiteRTEngine(flatbuffer)
    seconds, images = np.zeros(2), 0
    end = time.perf_counter() + MEASURE_S
    while images <= 1 or time.perf_counter() < end:
        start = time.perf_counter()
        pixels = decode(image, engine.input_size)
        middle = time.perf_counter()
        if isinstance(pixels, BadImage):
            raise TypeError(pixels.detail)
        engine(pixels[np.newaxis])
        if images:  # the first one is a warm-up
            seconds += (middle - start, time.perf_counter() - middle)
        images += 1
    decode_s, backbone_s = seconds / (images - 1)
    return float(decode_s), float(backbone_s)


def gigabytes(n: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{n / 1e9:,.1f} GB" if n >= MIB * 100 else f"{n / 1e6:,.0f} MB"
