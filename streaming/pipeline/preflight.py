"""Estimates the memory of a stream before it starts, and rejects a configuration that does not fit."""

import os
import re

from models.bad_image import Limits
from streaming.errors import ConfigurationError
from streaming.platform.machine import memory
from streaming.platform.session import BYTES_PER_ARROW_BATCH, QUICK_START
from streaming.settings import Settings
from streaming.sizes import parse_size
from streaming.wording import counted

MIB = 1024**2
WORKER_BYTES = 250 * MIB  # a Python worker with NumPy, Arrow and LiteRT, before it has a model
DECODER_BYTES = 60 * MIB  # the sandboxed decoder of a worker, before it has an image
DECODE_BYTES_PER_PIXEL = 8  # of the largest image: Pillow takes four, and four more during conversion
HEAP_BYTES = 320 * MIB  # Spark and the commit of a batch
MIN_HEAP_BYTES = 512 * MIB  # Spark does not start with less than 450 MiB, excluding a survivor space
HEAP_PER_TASK_BYTES = 96 * MIB  # about three copies of a 20 MB message on its way to Python
COPIES_OF_A_BATCH = 3  # the Arrow batch, the same as Python bytes, and a copy if it is quarantined

# A contiguous heap with a single-threaded collector; buffers for large messages are freed, not kept per thread.
FIXED_HEAP = "-XX:+UseSerialGC -XX:+AlwaysPreTouch -Djdk.nio.maxCachedBufferSize=262144"


def with_fixed_heap(settings: Settings) -> tuple[Settings, str]:
    """The settings and JVM options of a driver that only forwards messages and rows.

    In local mode, the whole heap is allocated at the start, sized by the number of concurrent tasks and at most
    `driver_memory`. It does not depend on the messages, so none of them can make it grow later.
    """
    if not settings.master.startswith("local"):
        return settings, QUICK_START
    tasks = re.match(r"local\[(\d+)", settings.master)
    cores = int(tasks[1]) if tasks else 1 if settings.master == "local" else os.cpu_count() or 1
    heap = f"{min(heap_bytes(cores), parse_size(settings.driver_memory)) // MIB}m"
    return settings.model_copy(update={"driver_memory": heap}), f"{QUICK_START} {FIXED_HEAP} -Xms{heap}"


def heap_bytes(tasks: int) -> int:
    """The heap of a JVM with this number of concurrent tasks, in bytes."""
    return max(MIN_HEAP_BYTES, HEAP_BYTES + tasks * HEAP_PER_TASK_BYTES)


def decoding_bytes(limits: Limits) -> int:
    """The memory that a worker needs to decode the largest allowed image."""
    return DECODER_BYTES + min(limits.memory_bytes, DECODE_BYTES_PER_PIXEL * limits.max_pixels)


def worker_bytes(settings: Settings, bundle_bytes: int) -> int:
    """The maximum memory of a Python worker; see `check_memory` for the arguments."""
    decoding = decoding_bytes(settings.image_limits)
    return WORKER_BYTES + 2 * bundle_bytes + decoding + COPIES_OF_A_BATCH * BYTES_PER_ARROW_BATCH


def needed_bytes(settings: Settings, bundle_bytes: int, workers: int) -> int:
    """The maximum memory of the JVM and all workers; see `check_memory` for the arguments."""
    return workers * worker_bytes(settings, bundle_bytes) + parse_size(settings.driver_memory)


def check_memory(settings: Settings, bundle_bytes: int, workers: int) -> None:
    """Reject a configuration that could run out of memory.

    Args:
        settings: with the limits of images and the driver's memory.
        bundle_bytes: the total size of the models that a worker loads.
        workers: the number of Python workers on this machine.

    Raises:
        ServiceError: more memory is needed than is available; with the figures.
    """
    limits = settings.image_limits
    decoding, per_worker = decoding_bytes(limits), worker_bytes(settings, bundle_bytes)
    needed = needed_bytes(settings, bundle_bytes, workers)
    available = memory().available
    if needed > available:
        raise ConfigurationError(
            f"not enough memory: {counted(workers, 'worker')} of up to {per_worker // MIB:,} MiB "
            f"(model {bundle_bytes // MIB:,} MiB, an image of {limits.max_pixels:,} pixels {decoding // MIB:,} MiB) "
            f"and a JVM of {settings.driver_memory} need {needed // MIB:,} MiB, {available // MIB:,} MiB are "
            "available; use fewer workers (IMAGESTREAM_MASTER=local[1]), smaller images "
            "(IMAGESTREAM_MAX_PIXELS=24000000) or a smaller JVM (IMAGESTREAM_DRIVER_MEMORY=1g)"
        )
