"""The cost of quantisation to 8-bit integers: differences of features, and loss of accuracy."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.arrays import Features
from models.errors import ModelError


class FittedHead(Protocol):
    """A projection and classifier with class names, such as `models.scorer.Head`."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def probabilities(self, features: Features) -> Features: ...

    def answers(self, probabilities: Features) -> NDArray[np.int64]: ...


def mean_cosine(exact: Features, quantised: Features) -> float:
    """The mean cosine similarity between the rows of two (N, D) arrays.

    It is 1 for two zero rows, such as the pixels of a black image, and 0 if only one of them is zero.
    """
    wide = exact.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(quantised, axis=1)
    cosines = np.sum(wide * quantised, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return float(np.mean(np.where(wide.any(axis=1) | quantised.any(axis=1), cosines, 1.0)))


def accuracy_cost(head: FittedHead, exact: Features, quantised: Features, labels: Sequence[str]) -> float:
    """The loss of accuracy of `head` with quantised features.

    Args:
        head: the projection and classifier.
        exact: (N, D) float features.
        quantised: (N, D) features of the quantised backbone for the same images.
        labels: (N) true classes.

    Raises:
        ModelError: there are no images, or the numbers of rows and labels differ.
    """
    if not len(labels) or not len(labels) == len(exact) == len(quantised):
        rows = f"{len(exact)}, {len(quantised)} and {len(labels)}"
        raise ModelError(f"expected exact features, quantised features and labels of the same images, got {rows}")
    truth = np.array(labels)
    names = np.array(head.classes)

    def accuracy(features: Features) -> float:
        return float(np.mean(names[head.answers(head.probabilities(features))] == truth))

    return accuracy(exact) - accuracy(quantised)
