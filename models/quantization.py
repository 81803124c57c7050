"""What 8-bit integers cost: how far quantised features are from the exact ones, and the accuracy that is lost."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.arrays import Features
from models.errors import ModelError


class FittedHead(Protocol):
    """A projection and classifier with its class names, as `models.scorer.Head`."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def probabilities(self, features: Features) -> Features: ...

    def answers(self, probabilities: Features) -> NDArray[np.int64]: ...


def mean_cosine(exact: Features, quantised: Features) -> float:
    """The mean over the rows of two (N, D) arrays of the cosine between them.

    It is 1 for two rows that are all zero, as the pixels of a black image are, and 0 where only one of them is.
    """
    wide = exact.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(quantised, axis=1)
    cosines = np.sum(wide * quantised, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return float(np.mean(np.where(wide.any(axis=1) | quantised.any(axis=1), cosines, 1.0)))


def accuracy_cost(head: FittedHead, exact: Features, quantised: Features, labels: Sequence[str]) -> float:
    """The accuracy (a share of 1) that `head` loses when it gets quantised features of the same labelled images.

    Raises:
        ModelError: no images, or not one row of each kind of features per label.
    """
    if not len(labels) or not len(labels) == len(exact) == len(quantised):
        rows = f"{len(exact)}, {len(quantised)} and {len(labels)}"
        raise ModelError(f"expected exact features, quantised features and labels of the same images, got {rows}")
    truth = np.array(labels)
    names = np.array(head.classes)

    def accuracy(features: Features) -> float:
        return float(np.mean(names[head.answers(head.probabilities(features))] == truth))

    return accuracy(exact) - accuracy(quantised)
