"""Whether a stream fits into the memory there is, worked out before it starts."""

import os
import re

from models.bad_image import Limits
from streaming.errors import ConfigurationError
from streaming.platform.machine import memory
from streaming.platform.session import BYTES_PER_ARROW_BATCH, QUICK_START
from streaming.settings import Settings
from streaming.sizes import parse_size

MIB = 1024**2
WORKER_BYTES = 250 * MIB  # a Python worker with NumPy, Arrow and LiteRT, before it has a model
DECODER_BYTES = 60 * MIB  # the guarded process of a worker, before it has an image
DECODE_BYTES_PER_PIXEL = 8  # of the largest image: Pillow has four a pixel, and once more while it is converted
HEAP_BYTES = 320 * MIB  # Spark and the commit of a batch
LEAST_HEAP_BYTES = 512 * MIB  # Spark does not start with less than 450 MiB, a survivor space not counted
HEAP_PER_TASK_BYTES = 96 * MIB  # a message of 20 MB is held about three times on its way to Python
# An Arrow batch arrives, is turned into Python bytes, and is copied once more where it is quarantined.
COPIES_OF_A_BATCH = 3

# In one piece that is collected by one thread; buffers for large messages are given back, not kept per thread.
FIXED_HEAP = "-XX:+UseSerialGC -XX:+AlwaysPreTouch -Djdk.nio.maxCachedBufferSize=262144"


def with_fixed_heap(settings: Settings) -> tuple[Settings, str]:
    """The settings, and the JVM's options, for a driver that only moves what workers made.

    In local mode all of its heap is there from the start, by the number of tasks that run at a time and never more than
    the settings allow: what it needs does not depend on what comes, and no message can make it grow later.
    """
    if not settings.master.startswith("local"):
        return settings, QUICK_START
    tasks = re.match(r"local\[(\d+)", settings.master)
    cores = int(tasks[1]) if tasks else 1 if settings.master == "local" else os.cpu_count() or 1
    heap = f"{min(heap_bytes(cores), parse_size(settings.driver_memory)) // MIB}m"
    return settings.model_copy(update={"driver_memory": heap}), f"{QUICK_START} {FIXED_HEAP} -Xms{heap}"


def heap_bytes(tasks: int) -> int:
    """The heap of a JVM that so many tasks run in, or hand their results to, at a time."""
    return max(LEAST_HEAP_BYTES, HEAP_BYTES + tasks * HEAP_PER_TASK_BYTES)


def decoding_bytes(limits: Limits) -> int:
    """The memory that a worker takes to decode the largest image."""
    return DECODER_BYTES + min(limits.memory_bytes, DECODE_BYTES_PER_PIXEL * limits.max_pixels)


def worker_bytes(settings: Settings, bundle_bytes: int) -> int:
    """The memory that a Python worker takes at most; `bundle_bytes` as for `check_memory`."""
    decoding = decoding_bytes(settings.image_limits)
    return WORKER_BYTES + 2 * bundle_bytes + decoding + COPIES_OF_A_BATCH * BYTES_PER_ARROW_BATCH


def needed_bytes(settings: Settings, bundle_bytes: int, workers: int) -> int:
    """The memory that the JVM and all workers take at most; arguments as for `check_memory`."""
    return workers * worker_bytes(settings, bundle_bytes) + parse_size(settings.driver_memory)


def check_memory(settings: Settings, bundle_bytes: int, workers: int) -> None:
    """Refuse to start what would run out of memory.

    Args:
        bundle_bytes: of all models that a worker loads.
        workers: Python workers on this machine.

    Raises:
        ServiceError: more is needed than there is; with the figures.
    """
    limits = settings.image_limits
    decoding, per_worker = decoding_bytes(limits), worker_bytes(settings, bundle_bytes)
    needed = needed_bytes(settings, bundle_bytes, workers)
    available = memory().available
    if needed > available:
        raise ConfigurationError(
            f"not enough memory: {workers} workers of up to {per_worker // MIB:,} MiB (model {bundle_bytes // MIB:,} "
            f"MiB, an image of {limits.max_pixels:,} pixels {decoding // MIB:,} MiB) and a JVM of "
            f"{settings.driver_memory} need {needed // MIB:,} MiB, {available // MIB:,} MiB are available; take fewer "
            "workers (IMAGESTREAM_MASTER=local[1]), smaller images (IMAGESTREAM_MAX_PIXELS=24000000) or less for the "
            "JVM (IMAGESTREAM_DRIVER_MEMORY=1g)"
        )
