"""Accumulators of the counts from which `models.evaluation` computes metrics.

All counts are integers that merge by addition, so the order of rows and partitions cannot change a result; losses and
confidences are counted in units of 2⁻²⁴.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.classifier import answers_of, softmax
from models.errors import ModelError
from models.evaluation import CONFIDENCE_BINS, UNIT, Evaluation, Floats
from models.score_histogram import Counts, ScoreHistogram

PROBABILITY_FLOOR = 1e-15  # as scikit-learn's log_loss clips
MAX_NATS = 1e4  # of one row's loss from logits; keeps the sum of millions of the worst rows within 64 bits


@dataclass
class EvaluationSums:
    """Sums over rows for a model of `n_outputs` classes: `add` rows, `merge` partitions, then get the `result`.

    Attributes:
        classes: (K) names; the first `n_outputs` are the model's, the others are labels that it does not know.
        confusion: (K, K) rows by true class and predicted class.
        losses: (2,) negative log-likelihood from clipped probabilities and from logits, in units of 2⁻²⁴ nat.
        reliability: (3, CONFIDENCE_BINS): rows, correct rows, and summed confidence in units of 2⁻²⁴.
        scores: histogram of the log-odds of each output.
    """

    classes: tuple[str, ...]
    n_outputs: int
    confusion: Counts = field(init=False)
    losses: Counts = field(init=False)
    reliability: Counts = field(init=False)
    scores: ScoreHistogram = field(init=False)

    def __post_init__(self) -> None:
        if not 2 <= self.n_outputs <= len(self.classes):  # noqa: PLR2004
            raise ModelError(f"a model of {self.n_outputs} outputs cannot be evaluated on {len(self.classes)} classes")
        self.confusion = np.zeros((len(self.classes),) * 2, np.int64)
        self.losses = np.zeros(2, np.int64)
        self.reliability = np.zeros((3, CONFIDENCE_BINS), np.int64)
        self.scores = ScoreHistogram(self.n_outputs)

    def add(self, logits: NDArray[np.floating], truth: Counts, threshold: float | None = None) -> None:
        """Add rows by their logits, or by the logarithms of their probabilities.

        Args:
            logits: (N, n_outputs).
            truth: (N,) indices in `classes`. A row of a class that the model does not know is an error, with
                `PROBABILITY_FLOOR` as its probability.
            threshold: the model's threshold; see `models.classifier.answers_of`.

        Raises:
            ModelError: other shapes, an index out of range, or logits that are NaN or infinite.
        """
        wide = np.asarray(logits, np.float64)
        if wide.shape != (len(truth), self.n_outputs) or not np.isfinite(wide).all():
            raise ModelError(f"expected finite logits of shape ({len(truth)}, {self.n_outputs}), got {wide.shape}")
        if not len(truth):
            return
        probabilities = softmax(wide)  # as in the stream, so that predictions are the same
        predicted = answers_of(probabilities, threshold)
        self.add_answers(predicted, probabilities[np.arange(len(truth)), predicted], truth)
        logs = wide - _log_sum_exp(wide)  # log p
        self._add_losses(probabilities, logs, truth)
        self.scores.add(_log_odds(wide, logs), truth)

    def add_answers(self, predicted: Counts, confidence: NDArray[np.floating], truth: Counts) -> None:
        """Add rows of which only the prediction is known, without loss and ROC curve.

        Args:
            predicted: (N,) indices in `classes`.
            confidence: (N,) the probability of the predicted class.
            truth: (N,) indices in `classes`.

        Raises:
            ModelError: an index is out of range.
        """
        for index in (predicted, truth):
            if len(index) and not 0 <= index.min() <= index.max() < len(self.classes):
                raise ModelError(f"classes are numbered 0 to {len(self.classes) - 1}, got {index.min()}…{index.max()}")
        np.add.at(self.confusion, (truth, predicted), 1)
        bins = np.clip((confidence * CONFIDENCE_BINS).astype(np.int64), 0, CONFIDENCE_BINS - 1)
        for sums, amount in zip(self.reliability, (1, predicted == truth, _counted(confidence)), strict=True):
            np.add.at(sums, bins, amount)

    def merge(self, other: "EvaluationSums") -> None:
        """Add the sums of other rows; raises ModelError if their classes differ."""
        if (self.classes, self.n_outputs) != (other.classes, other.n_outputs):
            raise ModelError(f"only sums of the same classes can be merged, got {self.classes} and {other.classes}")
        for ours, theirs in zip(self._fixed(), other._fixed(), strict=True):
            np.add(ours, theirs, out=ours)
        self.scores.merge(other.scores)

    def to_bytes(self) -> bytes:
        """The sums as concatenated little-endian 64-bit integers: those of fixed size, then the scores."""
        self.scores.compact()
        parts = (*self._fixed(), np.array([self.scores.dropped]), self.scores.keys, self.scores.counts)
        return b"".join(part.astype("<i8").tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, classes: tuple[str, ...], n_outputs: int, data: bytes) -> Self:
        """Restore the sums from `to_bytes`; raises ModelError if their size does not match the classes."""
        sums = cls(classes, n_outputs)
        ends = np.cumsum([*(part.size for part in sums._fixed()), 1])
        scores, odd = divmod(len(data) - 8 * int(ends[-1]), 3 * 8)
        if odd or not 0 <= scores <= sums.scores.max_keys:
            raise ModelError(f"{len(data)} bytes cannot be sums over {len(classes)} classes")
        *fixed, dropped, rest = np.split(np.frombuffer(data, "<i8"), ends)
        for part, values in zip(sums._fixed(), fixed, strict=True):
            part[...] = values.reshape(part.shape)
        keys, counts = rest[:scores].astype(np.uint64), rest[scores:].reshape(2, scores)
        sums.scores = ScoreHistogram(n_outputs, int(dropped[0]), keys, counts)
        return sums

    def result(self) -> Evaluation:
        """Compute the metrics; those that the sums do not determine are NaN."""
        rows = int(self.confusion.sum())
        scored = bool(rows) and int(sum(part.sum() for part in self.scores.of_class(0))) == rows
        by_probability, by_logits = (float(loss) * UNIT / rows if scored else np.nan for loss in self.losses)
        if not rows:
            by_probability = by_logits = 0.0
        return Evaluation(
            self.classes,
            self.confusion,
            by_probability,
            log_loss_from_logits=by_logits,
            scores=self.scores if scored else None,
            reliability=self.reliability,
        )

    def _fixed(self) -> tuple[Counts, Counts, Counts]:
        return self.confusion, self.losses, self.reliability

    def _add_losses(self, probabilities: NDArray[np.float32], logs: Floats, truth: Counts) -> None:
        known = truth < self.n_outputs
        at = np.arange(len(truth)), np.where(known, truth, 0)
        of_true = np.where(known, probabilities[at].astype(np.float64), 0.0)
        floor = -np.log(PROBABILITY_FLOOR)
        clipped = -np.log(np.clip(of_true, PROBABILITY_FLOOR, 1.0))
        stable = np.minimum(np.where(known, -logs[at], floor), MAX_NATS)
        self.losses += _counted(np.stack([clipped, stable])).sum(axis=1)


def _log_sum_exp(logits: Floats) -> Floats:
    """log Σ exp of each row (N, 1), shifted by its maximum to prevent overflow."""
    top = logits.max(axis=1, keepdims=True)
    sums: Floats = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return sums


def _log_odds(logits: Floats, logs: Floats) -> Floats:
    """log p/(1 − p) of each class (N, C); for the most probable class from the other logits, since p may round to 1."""
    rows, best = np.arange(len(logits)), logits.argmax(axis=1)
    others = logits.copy()
    others[rows, best] = -np.inf
    with np.errstate(divide="ignore"):
        odds: Floats = logs - np.log(-np.expm1(logs))
    odds[rows, best] = logits[rows, best] - _log_sum_exp(others)[:, 0]
    return odds


def _counted(values: NDArray[np.floating]) -> Counts:
    return np.asarray(np.rint(values / UNIT), np.int64)
