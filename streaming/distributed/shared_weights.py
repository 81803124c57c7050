"""The weights of the asynchronous modes: many workers read them and add to them."""

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
    """What racing writers lost.

    Attributes:
        values: weights that differ from the sum of all changes by more than rounding explains.
        share: what is missing, as a share of all that was added (L1).
        overlapping: pushes that began while another was under way, each of which may have lost something.
    """

    values: int = 0
    share: float = 0.0
    overlapping: int = 0


@dataclass
class _Pushed:
    """What one worker has added, kept by the one thread that serves it."""

    total: NDArray[np.float64]
    moved: float = 0.0
    pushes: int = 0


@dataclass
class SharedWeights:
    """A vector that workers read and add to, under a lock or without one.

    Without the lock, NumPy adds with Python's global lock released, so that two threads do write at the same time; an
    addition that another thread overwrites is lost. Each worker's changes are also added up apart: that tells how much.

    Attributes:
        version: changes seen so far; without the lock, those under way at the same time may count once.
        staleness: changes by others between a worker's read and its push → how often.
    """

    weights: Values
    locked: bool
    version: int = 0
    staleness: dict[int, Counter[int]] = field(default_factory=dict)
    _pushed: dict[int, _Pushed] = field(default_factory=dict)
    _active: int = 0
    _overlapping: int = 0

    def __post_init__(self) -> None:
        self._first = self.weights.copy()
        self._guard: AbstractContextManager[object] = threading.Lock() if self.locked else nullcontext()

    def read(self) -> tuple[Values, int]:
        """(a copy of the weights, its version); without the lock, the copy may hold half of a change."""
        with self._guard:
            return self.weights.copy(), self.version

    def add(self, worker: int, change: Values, version: int) -> None:
        """Add a change that a worker computed from the weights of `version`; one thread per worker calls this."""
        pushed = self._pushed.setdefault(worker, _Pushed(np.zeros(len(change))))
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
        """What the writers lost; to be asked when none is at work."""
        if not self._pushed:
            return Lost()
        pushed = list(self._pushed.values())
        expected = self._first + np.sum([one.total for one in pushed], axis=0)
        missing = np.abs(expected - self.weights)
        largest = np.maximum(np.abs(expected), np.maximum(np.abs(self._first), np.abs(self.weights)))
        # Each addition rounds by half a unit in the last place of what may for a while have been twice as large; a
        # weight near zero may have come from as far away as the others are.
        typical = float(largest.mean())
        rounding = 2 * FLOAT32_ROUNDING * sum(one.pushes for one in pushed) * np.maximum(largest, typical)
        lost = missing > rounding
        moved = sum(one.moved for one in pushed)
        return Lost(int(lost.sum()), float(missing[lost].sum() / moved) if moved else 0.0, self._overlapping)
