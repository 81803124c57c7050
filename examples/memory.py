"""The most memory that a process and all below it had, watched from beside."""

import threading
from pathlib import Path
from typing import Self

import psutil

POLL_S = 0.5


class MemoryWatch:
    """Samples the memory of a process tree until the block ends; Java, which is Spark's driver, also apart.

    Proportional set sizes where the system tells them, so that what forked workers share counts once. The broker is no
    child of what started it, and is not counted.

    Attributes:
        peak: the most bytes of all at a time.
        java_peak: the most bytes of Java.
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
            except psutil.Error:  # one of them has just ended
                continue
            self.peak, self.java_peak = max(self.peak, java + python), max(self.java_peak, java)


def _size(process: psutil.Process) -> int:
    """Bytes, by the kernel's own sum, since adding up a JVM's mappings takes long."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return int(process.memory_info().rss)
