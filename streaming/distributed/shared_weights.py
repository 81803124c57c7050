"""The shared weights of the asynchronous modes."""

import threading
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streaming.distributed.protocol import Values

FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Lost:
    """Updates lost by races between writers.

    Attributes:
        values: number of weights that differ from the sum of all updates by more than rounding errors.
        share: L1 norm of the lost updates relative to that of all updates.
        overlapping: number of pushes that started during another one and may have lost updates.
    """

    values: int = 0
    share: float = 0.0
    overlapping: int = 0


@dataclass
class _UpdateSum:
    """The sum of one worker's updates, owned by the thread that serves it."""

    total: NDArray[np.float64]
    moved: float = 0.0
    pushes: int = 0


@dataclass
class SharedWeights:
    """A weight vector that workers read and add to, with or without a lock.

    NumPy adds with Python's global interpreter lock released, so without a lock threads write concurrently and may
    overwrite each other's additions. Each worker's updates are also summed separately to measure the loss.

    Attributes:
        weights: the weights, (N,) float32.
        locked: whether reads and additions take a lock.
        version: number of updates; without the lock, concurrent ones may count once.
        staleness: worker → number of updates by others between its read and its push → count.
    """

    weights: Values
    locked: bool
    version: int = 0
    staleness: dict[int, Counter[int]] = field(default_factory=dict)
    _pushed: dict[int, _UpdateSum] = field(default_factory=dict)
    _active: int = 0
    _overlapping: int = 0

    def __post_init__(self) -> None:
        self._first = self.weights.copy()
        self._guard: AbstractContextManager[object] = threading.Lock() if self.locked else nullcontext()

    def read(self) -> tuple[Values, int]:
        """Return a copy of the weights and its version; without the lock, the copy may contain part of an update."""
        with self._guard:
            return self.weights.copy(), self.version

    def add(self, worker: int, change: Values, version: int) -> None:
        """Add a worker's update; called by one thread per worker.

        Args:
            change: the update, (N,) float32.
            version: version of the weights from which it was computed.
        """
        pushed = self._pushed.setdefault(worker, _UpdateSum(np.zeros(len(change))))
        late = self.staleness.setdefault(worker, Counter())
        with self._guard:
            self._overlapping += self._active > 0
            self._active += 1
            late[max(0, self.version - version)] += 1
            np.add(self.weights, change, out=self.weights)
            self.version += 1
            self._active -= 1
        pushed.total += change
        pushed.moved += float(np.abs(change).sum())
        pushed.pushes += 1

    def lost(self) -> Lost:
        """Measure the lost updates; to be called when no writer is active."""
        if not self._pushed:
            return Lost()
        pushed = list(self._pushed.values())
        expected = self._first + np.sum([one.total for one in pushed], axis=0)
        missing = np.abs(expected - self.weights)
        largest = np.maximum(np.abs(expected), np.maximum(np.abs(self._first), np.abs(self.weights)))
        # Each addition rounds by half a unit in the last place of a value that may temporarily have been twice as
        # large; a weight near zero may have been as large as the others.
        typical = float(largest.mean())
        rounding = 2 * FLOAT32_ROUNDING * sum(one.pushes for one in pushed) * np.maximum(largest, typical)
        lost = missing > rounding
        moved = sum(one.moved for one in pushed)
        return Lost(int(lost.sum()), float(missing[lost].sum() / moved) if moved else 0.0, self._overlapping)
