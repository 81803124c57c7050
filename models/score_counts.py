"""How often each score occurs, in bounded memory: what ROC curves of any number of rows are drawn from.

A score is the log-odds that a model gives a class, rounded to float32 and kept by its bits, which sort as the number
does. While there are more distinct scores than there is room for, the lowest bit that is still kept is dropped, of all
scores alike. What is left is as fine as the room allows, wherever the scores crowd: exact for up to `SCORES_PER_CLASS`
rows. What is dropped depends on the scores alone, not on the order in which parts were merged.
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
class ScoreCounts:
    """Rows by class, score, and whether they belong to the class.

    Attributes:
        n_classes: C.
        dropped: so many of a score's 32 bits are no longer kept.
        keys: (n) ascending: a class in the upper 32 bits, a score in the lower.
        counts: (2, n) rows of each key: [1] those that belong to the class, [0] the others.
    """

    n_classes: int
    dropped: int = 0
    keys: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))
    counts: Counts = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    _new: list[tuple[Keys, Counts]] = field(default_factory=list, repr=False)

    @property
    def room(self) -> int:
        """How many keys are kept at most."""
        return max(self.n_classes, min(self.n_classes * SCORES_PER_CLASS, MAX_SCORES))

    def add(self, odds: NDArray[np.float64], truth: Counts) -> None:
        """Take in log-odds (N, C), infinite ones too, of rows whose true classes are `truth` (N)."""
        classes = np.arange(self.n_classes)
        keys = (classes.astype(np.uint64) << np.uint64(_SCORE_BITS)) | _sortable(odds)
        mine = (truth[:, None] == classes).ravel().astype(np.int64)
        self._take(keys.ravel(), np.stack([1 - mine, mine]))

    def merge(self, other: "ScoreCounts") -> None:
        """Take in the scores of other rows."""
        other.compact()
        self.dropped = max(self.dropped, other.dropped)
        self._take(other.keys, other.counts)

    def of_class(self, index: int) -> tuple[Counts, Counts]:
        """(others, members): rows by ascending score of a class."""
        self.compact()
        low, high = (np.uint64(number) << np.uint64(_SCORE_BITS) for number in (index, index + 1))
        others, members = self.counts[:, slice(*np.searchsorted(self.keys, [low, high]))]
        return others, members

    def bounds_of_class(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(lowest, highest): the log-odds that each number of `of_class` counts; equal while no bits are dropped."""
        self.compact()
        low, high = (np.uint64(number) << np.uint64(_SCORE_BITS) for number in (index, index + 1))
        keys = self.keys[slice(*np.searchsorted(self.keys, [low, high]))].astype(np.uint32)
        return _score_of(keys), _score_of(keys | np.uint32((1 << self.dropped) - 1))

    def compact(self) -> None:
        """Sort in what was taken in, and drop bits until there is room for it."""
        if not self._new:
            return
        keys = np.concatenate([self.keys, *(keys for keys, _ in self._new)])
        counts = np.concatenate([self.counts, *(counts for _, counts in self._new)], axis=1)
        self._new.clear()
        keys, counts = _grouped(keys, counts, self.dropped)
        while len(keys) > self.room:
            self.dropped += 1
            keys, counts = _grouped(keys, counts, self.dropped)
        self.keys, self.counts = keys, counts

    def _take(self, keys: Keys, counts: Counts) -> None:
        self._new.append((keys, counts))
        if sum(len(keys) for keys, _ in self._new) > self.room:  # sorting after every few rows would cost too much
            self.compact()


def _sortable(scores: NDArray[np.float64]) -> Keys:
    """The bits of each as float32, such that they order as unsigned numbers (radix sort's mapping of floats)."""
    with np.errstate(over="ignore"):
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits & _SIGN, ~bits, bits | _SIGN).astype(np.uint64)


def _score_of(bits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The scores that `_sortable` gives these bits."""
    return np.where(bits & _SIGN, bits & ~_SIGN, ~bits).astype(np.uint32).view(np.float32).astype(np.float64)


def _grouped(keys: Keys, counts: Counts, dropped: int) -> tuple[Keys, Counts]:
    shift = np.uint64(dropped)
    found, where = np.unique((keys >> shift) << shift, return_inverse=True)
    summed = np.zeros((2, len(found)), np.int64)
    for total, part in zip(summed, counts, strict=True):
        np.add.at(total, where, part)
    return found, summed
