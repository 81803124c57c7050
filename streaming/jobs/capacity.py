"""How large a service has to be: from what an image and a micro-batch cost to cores, partitions and memory.

The model has two terms. An image costs core-seconds, `Costs.per_image_s`, and all cores share them. A micro-batch costs
seconds of the clock beyond its images, `overhead_s`: Spark plans it, starts a task per partition, and the driver
commits. Hence a batch of B images on W cores takes `overhead_s + B × per_image_s / W`.
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

# Measured with `imagestream stream --profile`; see docs/scale.md. They hold for a core like the one measured there.
REST_PER_IMAGE_S = 0.0006  # fetch, headers, projection, classifier, features, and what Spark does meanwhile
BATCH_S = 0.23  # plan, commit, and Spark between two batches
TASK_S = 0.0015  # of the driver, for each task
# Where the load is even; partitions of a batch are of equal size but for one message.
TARGET_UTILISATION = 0.7  # so that a burst, or a core that is lost, is caught up with
OVERHEAD_SHARE = 0.1  # of a batch's time, at most, may go into what is not images
MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 10.0
DRIVER_ROWS_PER_S = 250_000  # scored rows that one driver takes in and commits
ROW_BYTES, FEATURE_ROW_BYTES = 300, 250  # of one prediction, and of one row of features beside its floats
SECONDS_A_DAY = 86_400
HEAP_TASKS = 32  # results that reach the driver at the same time
COPIES_OF_ROWS = 4  # of a batch's rows on the driver: Spark's, Arrow's, the columns added, the Parquet file
KAFKA_PARTITIONS = 200_000  # of one cluster; kafka.apache.org/documentation, on KRaft
COMMITS_PER_S = 15  # 60 ms each, see docs/performance.md
OBJECTS_PER_S = 3_500  # docs.aws.amazon.com/AmazonS3, "Optimizing Amazon S3 performance": PUTs a second and prefix

MEASURE_S = 2.0
JPEG_QUALITY = 86


@dataclass(frozen=True)
class Costs:
    """What one image costs a core, in seconds; and the size that one has as a message, in bytes."""

    decode_s: float
    backbone_s: float
    rest_s: float = REST_PER_IMAGE_S
    image_bytes: int = 0

    @property
    def per_image_s(self) -> float:
        return self.decode_s + self.backbone_s + self.rest_s


@dataclass(frozen=True)
class Plan:
    """The size of a service for a load.

    Attributes:
        streams: how many share the load, each with its topic and home, since one driver starts only so many tasks.
        cores, partitions, worker_memory_bytes: of all streams together; images_per_batch, driver_memory_bytes: of each.
        interval_s: from one micro-batch to the next; half of it is what an image waits on average before it is read.
        limits: what this load does to the parts that do not grow with cores: name → (load, limit), in the same unit.
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
        """What saturates first as the load grows further."""
        return max(self.limits, key=lambda name: self.limits[name][0] / self.limits[name][1])


def overhead_s(tasks: int) -> float:
    """Seconds that a micro-batch of so many tasks takes beyond its images."""
    return BATCH_S + TASK_S * tasks


def most_tasks() -> int:
    """How many tasks one driver can start in a micro-batch without that taking more than its share of the time."""
    return int((MAX_INTERVAL_S * OVERHEAD_SHARE - BATCH_S) / TASK_S)


def images_per_s(costs: Costs, images_per_batch: int, cores: int, tasks: int | None = None) -> float:
    """The throughput of a stream that catches up, in micro-batches of a size, on so many cores."""
    seconds = overhead_s(tasks or 2 * cores) + images_per_batch * costs.per_image_s / cores
    return images_per_batch / seconds


def plan(load: float, costs: Costs, n_features: int, bundle_bytes: int) -> Plan:
    """The size of a service for `load` images a second."""
    busy = TARGET_UTILISATION * (1 - OVERHEAD_SHARE)
    cores = max(1, math.ceil(load * costs.per_image_s / busy))
    streams = math.ceil(cores / most_tasks())
    tasks = math.ceil(cores / streams)
    interval = max(MIN_INTERVAL_S, overhead_s(tasks) / OVERHEAD_SHARE)
    images = max(1, math.ceil(load / streams * interval))
    scoring = overhead_s(tasks) + images * costs.per_image_s / tasks
    per_worker = WORKER_BYTES + 2 * bundle_bytes + decoding_bytes(DEFAULT_LIMITS)
    heap = heap_bytes(min(tasks, HEAP_TASKS))
    return Plan(
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
            "rows that one driver commits a second": (load / streams, DRIVER_ROWS_PER_S),
            "partitions of one Kafka cluster": (streams * tasks, KAFKA_PARTITIONS),
            "commits a second of one table": (1 / interval, COMMITS_PER_S),
            "files of features written a second under one prefix": (tasks / interval, OBJECTS_PER_S),
        },
    )


def sample_jpeg(width: int, height: int) -> bytes:
    """A picture with as much detail as a photograph has: smoothed noise over a gradient."""
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).filter(ImageFilter.GaussianBlur(2))
    slope = np.linspace(-60, 60, width)[np.newaxis, :, np.newaxis]
    pixels = np.clip(np.asarray(noise, np.float32) + slope, 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def measure(flatbuffer: Path, width: int, height: int, cores: int) -> Costs:
    """Decode and run the backbone on that many cores at once for some seconds, as workers do."""
    image = sample_jpeg(width, height)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        found = list(pool.map(_measure_one, [flatbuffer] * cores, [image] * cores))
    decode_s, backbone_s = (float(np.mean(column)) for column in zip(*found, strict=True))
    return Costs(decode_s, backbone_s, image_bytes=len(image))


def _measure_one(flatbuffer: Path, image: bytes) -> tuple[float, float]:
    """Seconds per image of (decoding, the backbone), taken in turn."""
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
        if images:  # the first one fills caches
            seconds += (middle - start, time.perf_counter() - middle)
        images += 1
    decode_s, backbone_s = seconds / (images - 1)
    return float(decode_s), float(backbone_s)


def gigabytes(n: float) -> str:
    """Bytes for people."""
    return f"{n / 1e9:,.1f} GB" if n >= MIB * 100 else f"{n / 1e6:,.0f} MB"
