"""Sampling the memory of a process tree."""

import threading
from time import monotonic
from typing import NamedTuple, Self

import psutil

POLL_S = 0.25
PAUSE = 20  # times the duration of a sample, which in a JVM of several GB takes many milliseconds


class Sample(NamedTuple):
    """Memory in bytes of Java processes, such as Spark's driver, and of all others."""

    java: int
    others: int


class MemoryWatch:
    """Samples the memory of a process and its descendants until the block ends.

    Uses proportional set sizes where available, so that pages shared by forked workers count once. The broker is not a
    child of the process that started it, and is not counted.

    Attributes:
        samples: in the order of time, at intervals of at least `POLL_S` seconds.
    """

    def __init__(self, pid: int) -> None:
        self.samples: list[Sample] = []
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        """The peak memory of all processes together, in bytes."""
        return max((one.java + one.others for one in self.samples), default=0)

    @property
    def peaks(self) -> Sample:
        """The peaks of Java processes and of all others, in bytes; they may be of different times."""
        return Sample(*(max(sizes) for sizes in zip(*self.samples, Sample(0, 0), strict=True)))

    def _watch(self) -> None:
        pause = POLL_S
        while not self._over.wait(pause):
            begin = monotonic()
            java = others = 0
            try:
                root = psutil.Process(self._pid)
                for process in (root, *root.children(recursive=True)):
                    size = _size(process)
                    java, others = (java + size, others) if "java" in process.name() else (java, others + size)
            except psutil.Error:  # a process has just exited
                continue
            self.samples.append(Sample(java, others))
            pause = max(POLL_S, PAUSE * (monotonic() - begin))


def _size(process: psutil.Process) -> int:
    info = process.memory_full_info()
    return int(getattr(info, "pss", info.rss))
