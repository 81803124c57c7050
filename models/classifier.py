"""Classifiers: (N, K) float32 features in, (N, C) float32 class probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.arrays import Arrays, Features, checked_array, multiply_rows
from models.errors import ModelError

MAX_LAYERS = 32

Scores = Literal["logits", "probabilities"]
_SMALLEST = 1e-12  # probabilities are clipped to it before taking the logarithm


class Classifier(Protocol):
    """The interface of classifiers for scoring."""

    @property
    def kind(self) -> str: ...

    @property
    def n_in(self) -> int: ...

    @property
    def n_classes(self) -> int: ...

    def logits(self, features: Features) -> NDArray[np.float64]:
        """(N, n_in) float32 → (N, n_classes) float64, the logarithms of the probabilities up to a constant per row.

        The input is not modified, and rows are independent.
        """
        ...

    def probabilities(self, features: Features) -> Features:
        """(N, n_in) float32 → (N, n_classes) float32, rows summing to 1; the input is not modified."""
        ...

    def to_arrays(self) -> Arrays:
        """The arrays from which `classifier_from_arrays` restores the classifier."""
        ...


def softmax(logits: NDArray[np.floating]) -> Features:
    """Row-wise softmax of (N, C) logits, shifted by each row's maximum to prevent overflow."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Features = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


def answers_of(probabilities: Features, threshold: float | None = None) -> NDArray[np.int64]:
    """The predicted class (N,) of (N, C) probabilities: the most probable one, the first of equals.

    Args:
        probabilities: (N, C).
        threshold: with two classes, the second is predicted if its probability is at least this.
    """
    if threshold is None:
        return np.asarray(probabilities.argmax(axis=1), np.int64)
    # Compared as float64, as in Spark and SQL.
    return np.asarray(probabilities[:, 1].astype(np.float64) >= threshold, np.int64)


@dataclass(frozen=True)
class LogisticRegression:
    """Multinomial logistic regression: `softmax(features @ coefficients.T + intercept)`.

    Attributes:
        coefficients: (C, K) float64, the precision of Spark ML.
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

    def logits(self, features: Features) -> NDArray[np.float64]:
        return multiply_rows(features.astype(np.float64), self.coefficients.T) + self.intercept

    def probabilities(self, features: Features) -> Features:
        return softmax(self.logits(features))

    def to_arrays(self) -> Arrays:
        return {"coefficients": self.coefficients, "intercept": self.intercept}


@dataclass(frozen=True)
class MLP:
    """Multilayer perceptron: each layer is `x @ weights + bias`, followed by the sigmoid, the last by the softmax.

    The same network as Spark ML's `MultilayerPerceptronClassifier`, in float64 as in Spark.

    Attributes:
        weights: per layer (in, out) float64.
        biases: per layer (out,) float64.
    """

    weights: tuple[NDArray[np.float64], ...]
    biases: tuple[NDArray[np.float64], ...]
    kind: str = "mlp"

    @property
    def n_in(self) -> int:
        return len(self.weights[0])

    @property
    def n_classes(self) -> int:
        return len(self.biases[-1])

    def logits(self, features: Features) -> NDArray[np.float64]:
        hidden: NDArray[np.float64] = features.astype(np.float64)
        for weights, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            # The sigmoid, 1 / (1 + exp(-x)), in a form that cannot overflow.
            hidden = (1 + np.tanh((multiply_rows(hidden, weights) + bias) / 2)) / 2
        return multiply_rows(hidden, self.weights[-1]) + self.biases[-1]

    def probabilities(self, features: Features) -> Features:
        return softmax(self.logits(features))

    def to_arrays(self) -> Arrays:
        layers = enumerate(zip(self.weights, self.biases, strict=True))
        return {name: array for i, (w, b) in layers for name, array in ((f"weights_{i}", w), (f"bias_{i}", b))}


@dataclass(frozen=True)
class OwnHead:
    """A network's own scores, logits or probabilities.

    A single score for two classes belongs to the second: the logit or the probability of a sigmoid.
    """

    kind: Scores
    n_in: int
    n_classes: int

    def __post_init__(self) -> None:
        if self.n_in != self.n_classes and (self.n_in, self.n_classes) != (1, 2):
            raise ModelError(f"{self.n_in} scores do not match {self.n_classes} classes")

    def logits(self, features: Features) -> NDArray[np.float64]:
        scores = features.astype(np.float64)
        if self.kind == "probabilities":
            if self.n_in == 1:
                scores = np.hstack([1 - scores, scores])
            return np.log(np.maximum(scores, _SMALLEST))
        return np.hstack([np.zeros_like(scores), scores]) if self.n_in == 1 else scores

    def probabilities(self, features: Features) -> Features:
        return softmax(self.logits(features))

    def to_arrays(self) -> Arrays:
        return {}


def mlp_from_spark(layers: Sequence[int], weights: NDArray[np.float64]) -> MLP:
    """Convert a Spark ML `MultilayerPerceptronClassificationModel`.

    Spark stores all weights in one vector, layer after layer: the matrix of out x in in column-major order (that is, in
    x out in row-major order), then the `out` biases (spark/ml/ann/Layer.scala, `AffineLayerModel`).

    Args:
        layers: `model.getLayers()`, the widths from the features to the classes.
        weights: `model.weights.toArray()`.

    Raises:
        ModelError: the length of the vector does not match the layers, or it is not finite.
    """
    pairs = list(pairwise(layers))
    needed = sum((n_in + 1) * n_out for n_in, n_out in pairs)
    if not pairs or min(layers) < 1 or np.shape(weights) != (needed,):
        raise ModelError(f"an MLP of layers {list(layers)} has {needed} weights, got shape {np.shape(weights)}")
    if not np.isfinite(weights).all():
        raise ModelError("the weights of the MLP contain NaN or infinite values")
    flat = np.asarray(weights, np.float64)
    matrices, biases = [], []
    for n_in, n_out in pairs:
        matrix, bias, flat = np.split(flat, [n_in * n_out, (n_in + 1) * n_out])
        matrices.append(matrix.reshape(n_in, n_out))
        biases.append(bias)
    return MLP(tuple(matrices), tuple(biases))


def classifier_from_arrays(kind: str, n_in: int, n_classes: int, arrays: Arrays) -> Classifier:
    """Restore a classifier from the arrays of `to_arrays`.

    Args:
        n_in: K, the number of features.
        n_classes: C.

    Raises:
        ModelError: an unknown kind, or arrays that are missing, of the wrong shape, or not finite.
    """
    match kind:
        case "logistic_regression":
            coefficients = checked_array(arrays, "coefficients", (n_classes, n_in), np.float64)
            return LogisticRegression(coefficients, checked_array(arrays, "intercept", (n_classes,), np.float64))
        case "mlp":
            return _mlp_from_arrays(n_in, n_classes, arrays)
        case "logits" | "probabilities":
            return OwnHead(kind, n_in, n_classes)
    raise ModelError(f"unknown classifier {kind!r}, expected one of: logistic_regression, mlp, logits, probabilities")


def _mlp_from_arrays(n_in: int, n_classes: int, arrays: Arrays) -> MLP:
    n_layers = len(arrays) // 2
    if not 1 <= n_layers <= MAX_LAYERS or len(arrays) % 2:
        raise ModelError(
            f"an MLP has weights and a bias for each of 1 to {MAX_LAYERS} layers, got {len(arrays)} arrays"
        )
    weights: list[NDArray[np.float64]] = []
    biases: list[NDArray[np.float64]] = []
    width = n_in
    for i in range(n_layers):
        n_out = n_classes if i == n_layers - 1 else None
        weights.append(checked_array(arrays, f"weights_{i}", (width, n_out), np.float64))
        width = weights[i].shape[1]
        biases.append(checked_array(arrays, f"bias_{i}", (width,), np.float64))
    return MLP(tuple(weights), tuple(biases))
