"""Classifiers: (N, K) float32 features in, (N, C) float32 class probabilities out, each row summing to 1."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features, checked_array
from models.errors import ModelError


class Classifier(Protocol):
    """What the scoring path asks of a classifier."""

    @property
    def kind(self) -> str: ...

    @property
    def n_in(self) -> int: ...

    @property
    def n_classes(self) -> int: ...

    def probabilities(self, features: Features) -> Features:
        """(N, n_in) float32 → (N, n_classes) float32; the input is not changed."""
        ...

    def to_arrays(self) -> Arrays:
        """The arrays that `classifier_from_arrays` rebuilds it from."""
        ...


def softmax(logits: NDArray[np.floating]) -> Features:
    """Row-wise softmax of (N, C), shifted by each row's maximum so that no exponential overflows."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Features = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


@dataclass(frozen=True)
class LogisticRegression:
    """Multinomial logistic regression: `softmax(features @ coefficients.T + intercept)`.

    Attributes:
        coefficients: (C, K) float64, as Spark ML fits them; kept whole, so that the numbers agree with Spark's.
        intercept: (C,) float64.
    """

    coefficients: NDArray[np.float64]
    intercept: NDArray[np.float64]
    kind: str = "logistic_regression"

    @property
    def n_in(self) -> int:
        return int(self.coefficients.shape[1])

    @property
    def n_classes(self) -> int:
        return int(self.coefficients.shape[0])

    def probabilities(self, features: Features) -> Features:
        return softmax(features @ self.coefficients.T + self.intercept)

    def to_arrays(self) -> Arrays:
        return {"coefficients": self.coefficients, "intercept": self.intercept}


def classifier_from_arrays(kind: str, n_in: int, n_classes: int, arrays: Arrays) -> Classifier:
    """Rebuild a classifier from what `to_arrays` gave.

    Raises:
        ModelError: an unknown kind, or arrays missing, of the wrong shape, or not finite.
    """
    if kind != "logistic_regression":
        raise ModelError(f"unknown classifier {kind!r}, expected one of: logistic_regression")
    coefficients = checked_array(arrays, "coefficients", (n_classes, n_in), np.float64)
    intercept = checked_array(arrays, "intercept", (n_classes,), np.float64)
    return LogisticRegression(coefficients, intercept)
