"""Histograms of scores in bounded memory, from which ROC curves of any number of rows are computed.

A score is the log-odds of a class, rounded to float32 and represented by its bits in sortable order. While there are
more distinct scores than `max_keys`, the lowest remaining bit of all scores is dropped: the bins adapt to where scores
are dense, and are exact for up to `SCORES_PER_CLASS` rows. The result does not depend on the order of merging.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Keys = NDArray[np.uint64]

SCORES_PER_CLASS = 4096
MAX_SCORES = 1 << 20  # of all classes together, 24 bytes each
_SCORE_BITS = 32
_SIGN = np.uint32(1 << 31)


@dataclass
class ScoreHistogram:
    """Rows by class, score, and whether they belong to the class.

    Attributes:
        n_classes: C.
        dropped: the number of lowest bits of a score that were dropped.
        keys: (n) ascending: the class in the upper 32 bits, the score in the lower ones.
        counts: (2, n) rows of each key: [1] members of the class, [0] others.
    """

    n_classes: int
    dropped: int = 0
    keys: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))
    counts: Counts = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    _new: list[tuple[Keys, Counts]] = field(default_factory=list, repr=False)

    @property
    def max_keys(self) -> int:
        """The maximum number of keys."""
        return max(self.n_classes, min(self.n_classes * SCORES_PER_CLASS, MAX_SCORES))

    def add(self, odds: NDArray[np.float64], truth: Counts) -> None:
        """Add log-odds (N, C), which may be infinite, of rows with true classes `truth` (N)."""
        classes = np.arange(self.n_classes)
        keys = (classes.astype(np.uint64) << np.uint64(_SCORE_BITS)) | _sortable(odds)
        mine = (truth[:, None] == classes).ravel().astype(np.int64)
        self._add_pending(keys.ravel(), np.stack([1 - mine, mine]))

    def merge(self, other: "ScoreHistogram") -> None:
        """Add the scores of other rows."""
        other.compact()
        self.dropped = max(self.dropped, other.dropped)
        self._add_pending(other.keys, other.counts)

    def of_class(self, index: int) -> tuple[Counts, Counts]:
        """(others, members): rows per bin by ascending score of a class."""
        self.compact()
        low, high = (np.uint64(number) << np.uint64(_SCORE_BITS) for number in (index, index + 1))
        others, members = self.counts[:, slice(*np.searchsorted(self.keys, [low, high]))]
        return others, members

    def bounds_of_class(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(lowest, highest): the log-odds of each bin of `of_class`; equal while no bits are dropped."""
        self.compact()
        low, high = (np.uint64(number) << np.uint64(_SCORE_BITS) for number in (index, index + 1))
        keys = self.keys[slice(*np.searchsorted(self.keys, [low, high]))].astype(np.uint32)
        return _score_of(keys), _score_of(keys | np.uint32((1 << self.dropped) - 1))

    def compact(self) -> None:
        """Merge pending scores, dropping bits until they fit."""
        if not self._new:
            return
        keys = np.concatenate([self.keys, *(keys for keys, _ in self._new)])
        counts = np.concatenate([self.counts, *(counts for _, counts in self._new)], axis=1)
        self._new.clear()
        keys, counts = _grouped(keys, counts, self.dropped)
        while len(keys) > self.max_keys:
            self.dropped += 1
            keys, counts = _grouped(keys, counts, self.dropped)
        self.keys, self.counts = keys, counts

    def _add_pending(self, keys: Keys, counts: Counts) -> None:
        self._new.append((keys, counts))
        if sum(len(keys) for keys, _ in self._new) > self.max_keys:  # sorting after every few rows would be slow
            self.compact()


def _sortable(scores: NDArray[np.float64]) -> Keys:
    """The bits of each score as float32, mapped to sort as unsigned integers (as in radix sort of floats)."""
    with np.errstate(over="ignore"):
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits & _SIGN, ~bits, bits | _SIGN).astype(np.uint64)


def _score_of(bits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The inverse of `_sortable`."""
    return np.where(bits & _SIGN, bits & ~_SIGN, ~bits).astype(np.uint32).view(np.float32).astype(np.float64)


def _grouped(keys: Keys, counts: Counts, dropped: int) -> tuple[Keys, Counts]:
    shift = np.uint64(dropped)
    found, where = np.unique((keys >> shift) << shift, return_inverse=True)
    summed = np.zeros((2, len(found)), np.int64)
    for total, part in zip(summed, counts, strict=True):
        np.add.at(total, where, part)
    return found, summed
