"""Whether a stream fits into the memory there is, worked out before it starts."""

import os
import re

from streaming.errors import ServiceError
from streaming.platform.machine import memory
from streaming.platform.session import BYTES_PER_ARROW_BATCH, QUICK_START
from streaming.settings import Settings

MIB = 1024**2
WORKER_BYTES = 250 * MIB  # a Python worker with NumPy, Arrow and LiteRT, before it has a model
DECODE_BYTES = 2 * 24_000_000 * 3  # the largest image as pixels, and once more while it is resized
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


def check_memory(settings: Settings, bundle_bytes: int, workers: int) -> None:
    """Refuse to start what would run out of memory.

    Args:
        bundle_bytes: of all models that a worker loads.
        workers: Python workers on this machine.

    Raises:
        ServiceError: more is needed than there is; with the figures.
    """
    per_worker = WORKER_BYTES + 2 * bundle_bytes + DECODE_BYTES + COPIES_OF_A_BATCH * BYTES_PER_ARROW_BATCH
    needed = workers * per_worker + parse_size(settings.driver_memory)
    available = memory().available
    if needed > available:
        raise ServiceError(
            f"not enough memory: {workers} workers of up to {per_worker // MIB:,} MiB (model {bundle_bytes // MIB:,} "
            f"MiB) and a JVM of {settings.driver_memory} need {needed // MIB:,} MiB, {available // MIB:,} MiB are "
            "available; take fewer workers (IMAGESTREAM_MASTER=local[1]) or less for the JVM "
            "(IMAGESTREAM_DRIVER_MEMORY=1g)"
        )


def parse_size(text: str) -> int:
    """Bytes of a size as Spark writes it: 512m, 2g; without a unit it is bytes.

    Raises:
        ServiceError: it is no such size.
    """
    units = {"k": 1024, "m": MIB, "g": 1024 * MIB, "t": 1024**2 * MIB}
    digits, unit = text.rstrip("kmgtbKMGTB"), text.lower().lstrip("0123456789").rstrip("b")
    if not digits.isdecimal() or unit not in {"", *units}:
        raise ServiceError(f"expected a size such as 512m or 2g, got {text!r}")
    return int(digits) * units.get(unit, 1)
