"""Sampling the peak memory of a process tree."""

import threading
from typing import Self

import psutil

POLL_S = 0.5


class MemoryWatch:
    """Samples the memory of a process tree until the block ends; that of Java, Spark's driver, also separately.

    Uses proportional set sizes where available, so that pages shared by forked workers count once. The broker is not a
    child of the process that started it, and is not counted.

    Attributes:
        peak: the peak memory of all processes, in bytes.
        java_peak: the peak memory of Java, in bytes.
    """

    def __init__(self, pid: int) -> None:
        self.peak = self.java_peak = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            java = python = 0
            try:
                root = psutil.Process(self._pid)
                for process in (root, *root.children(recursive=True)):
                    size = _size(process)
                    java, python = (java + size, python) if "java" in process.name() else (java, python + size)
            except psutil.Error:  # a process has just exited
                continue
            self.peak, self.java_peak = max(self.peak, java + python), max(self.java_peak, java)


def _size(process: psutil.Process) -> int:
    info = process.memory_full_info()
    return int(getattr(info, "pss", info.rss))
