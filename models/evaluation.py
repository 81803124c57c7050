"""Evaluation metrics of a classifier, computed from counts whose size depends on the classes, not on the rows.

The counts are accumulated by `models.evaluation_sums`: a confusion matrix, a histogram of scores for ROC curves, and a
reliability diagram (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2).
"""

from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.score_histogram import Counts, ScoreHistogram

Floats = NDArray[np.float64]

CONFIDENCE_BINS = 15
UNIT = 2.0**-24  # of the sums of losses and confidences
FEW_ROWS = 5  # a class with fewer is rare


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of a model on rows that it was not fitted on.

    Attributes:
        classes: (K) names.
        confusion: (K, K) counts, rows true and columns predicted.
        log_loss: mean negative log of the true class's probability, in nats, with probabilities clipped at 1e-15.
        log_loss_from_logits: the same from logits, without clipping.
        scores: histogram of the scores of the model's own classes, which come first in `classes`; None if unknown.
        reliability: (3, CONFIDENCE_BINS): rows, correct rows, and summed confidence in units of 2⁻²⁴.
    """

    classes: tuple[str, ...]
    confusion: Counts
    log_loss: float = np.nan
    log_loss_from_logits: float = np.nan
    scores: ScoreHistogram | None = None
    reliability: Counts = field(default_factory=lambda: np.zeros((3, CONFIDENCE_BINS), np.int64))

    @property
    def rows(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.rows)

    @property
    def support(self) -> Counts:
        """(K,) rows of each true class."""
        return np.asarray(self.confusion.sum(axis=1), np.int64)

    @property
    def precision(self) -> Floats:
        """(K,) the share of correct predictions among those of the class; 0 if there are none."""
        return _shares(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def recall(self) -> Floats:
        """(K,) the share of each class that was predicted correctly; 0 for a class without rows."""
        return _shares(np.diag(self.confusion), self.support)

    @property
    def f1(self) -> Floats:
        """(K,) the harmonic mean of precision and recall: 2·true positives / (predicted + true)."""
        return _shares(2 * np.diag(self.confusion), self.confusion.sum(axis=0) + self.support)

    @property
    def occurring(self) -> NDArray[np.bool_]:
        """(K,) which classes are true or predicted for any row: those that macro averages include."""
        return np.asarray((self.confusion.sum(axis=0) + self.support) > 0)

    def macro(self, figure: Floats) -> float:
        """The mean of a metric (K,) over the classes that occur."""
        return float(figure[self.occurring].mean()) if self.rows else 0.0

    def weighted(self, figure: Floats) -> float:
        """The mean of a metric (K,) weighted by support."""
        return float(figure @ self.support / max(1, self.rows))

    @property
    def macro_f1(self) -> float:
        return self.macro(self.f1)

    @cached_property
    def auc(self) -> Floats:
        """(K,) area under the ROC curve of each class against the rest; NaN if it has no curve."""
        areas = np.full(len(self.classes), np.nan)
        for index in range(self.scores.n_classes if self.scores else 0):
            false, true = self.roc_curve(index)
            if false[-1] and true[-1]:
                areas[index] = np.trapezoid(true, false)
        return areas

    @property
    def macro_auc(self) -> float:
        """Mean one-vs-rest AUC of the classes that have one; NaN if none has."""
        known = self.auc[np.isfinite(self.auc)]
        return float(known.mean()) if len(known) else np.nan

    @property
    def weighted_auc(self) -> float:
        """Mean one-vs-rest AUC weighted by support."""
        known = np.isfinite(self.auc)
        return float(np.average(self.auc[known], weights=self.support[known])) if known.any() else np.nan

    def roc_curve(self, index: int) -> tuple[Floats, Floats]:
        """(false positive rates, true positive rates) of a class, from (0, 0) to (1, 1), one point per score.

        Rates without positive or negative rows are 0; a class without scores has only the first point.
        """
        parts = self.scores.of_class(index) if self.scores and index < self.scores.n_classes else ((), ())
        false, true = (np.concatenate([[0.0], np.cumsum(part[::-1])]) for part in parts)
        return false / max(1, false[-1]), true / max(1, true[-1])

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean over rows of |accuracy − mean confidence| of their bin."""
        rows, right, confidence = self.reliability
        return float(np.abs(right - confidence * UNIT).sum() / rows.sum()) if rows.any() else np.nan

    def reliability_curve(self) -> tuple[Floats, Floats, Counts]:
        """(mean confidence, accuracy, rows) of each bin of confidence that has rows."""
        rows, right, confidence = self.reliability[:, self.reliability[0] > 0]
        return confidence * UNIT / rows, right / rows, rows

    def accuracy_interval(self, confidence: float = 0.95) -> Interval:
        """Wilson's score interval (Wilson 1927, JASA 22)."""
        if not self.rows:
            return Interval(0.0, 1.0)
        return _wilson(self.accuracy, self.rows, NormalDist().inv_cdf((1 + confidence) / 2))

    def macro_f1_interval(self, confidence: float = 0.95) -> Interval:
        """Wilson's score interval at the effective sample size of macro F1, over the classes that occur.

        F1 is 2J/(1 + J), where the Jaccard index J is the share of correct predictions among the rows whose true or
        predicted class it is. The delta method gives the variance of the mean over classes, including the errors that
        two classes share (Takahashi et al. 2022, "Confidence interval for micro-averaged F1 and macro-averaged F1
        scores", Applied Intelligence 52), after adding one row per class, distributed as the rows of all classes, so
        that no class appears free of errors. The variance is converted to an effective sample size as for proportions
        in surveys (Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive
        counts estimated from survey data", Survey Methodology 24), with Student's t of Satterthwaite's degrees of
        freedom.

        If every class has at least `FEW_ROWS` rows, 95 % intervals cover 93 to 97 %; with fewer rows the coverage may
        be lower: see `rare_classes` and docs/statistics.md.
        """
        from scipy.special import stdtrit  # imported late: workers do not need SciPy

        names = np.flatnonzero(self.occurring)
        if len(names) < 2:  # noqa: PLR2004  nothing, or all rows of one class and right
            return self.accuracy_interval(confidence)
        counts = self.confusion[np.ix_(names, names)].astype(np.float64)
        jaccard, of_class = _jaccard(counts)
        typical = (np.diag(counts).sum() + 0.5) / (of_class.sum() + 1)
        # An error counts for two classes, the true and the predicted one.
        row = np.full_like(counts, (1 - typical) / (2 * (len(names) - 1)))
        np.fill_diagonal(row, typical)
        smooth, of_smooth = _jaccard(counts + row)
        slope = 2 / (1 + smooth) ** 2 / len(names) / of_smooth
        effects = -np.add.outer(slope * smooth, slope * smooth)
        np.fill_diagonal(effects, slope * (1 - smooth))
        variance = float(((counts + row) * effects**2).sum())
        parts = slope**2 * smooth * (1 - smooth) * of_smooth
        level = float(stdtrit(parts.sum() ** 2 / (parts**2 / of_smooth).sum(), (1 + confidence) / 2))
        mean = float((2 * smooth / (1 + smooth)).mean())
        bias = float((2 / (1 + jaccard) ** 3 * jaccard * (1 - jaccard) / of_class).mean())  # of a concave function
        return _wilson(min(1.0, self.macro_f1 + bias), mean * (1 - mean) / variance, level)

    @property
    def rare_classes(self) -> int:
        """The number of occurring classes with so few rows that macro F1's interval may be too narrow."""
        return int((self.occurring & (self.support < FEW_ROWS)).sum())

    def as_metrics(self) -> dict[str, float]:
        """The metrics by name, without unknown ones."""
        low, high = self.accuracy_interval()
        metrics = {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": self.macro_f1,
            "macro_precision": self.macro(self.precision),
            "macro_recall": self.macro(self.recall),
            "weighted_f1": self.weighted(self.f1),
            "weighted_precision": self.weighted(self.precision),
            "weighted_recall": self.weighted(self.recall),
            "log_loss": self.log_loss,
            "log_loss_from_logits": self.log_loss_from_logits,
            "macro_auc": self.macro_auc,
            "weighted_auc": self.weighted_auc,
            "calibration_error": self.calibration_error,
            "holdout_rows": float(self.rows),
        }
        return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def _shares(part: Counts, whole: Counts) -> Floats:
    """part / whole, and 0 where the whole is 0."""
    return np.asarray(np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0), np.float64)


def _wilson(share: float, rows: float, z: float) -> Interval:
    """Wilson's interval of a share of this many rows at z standard errors."""
    spread = z * z / rows
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt((share * (1 - share) + spread / 4) / rows)
    return Interval(max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def _jaccard(counts: Floats) -> tuple[Floats, Floats]:
    """(K, K) counts → (K,) the Jaccard index of each class, and its denominator."""
    right = np.diag(counts)
    rows = counts.sum(axis=0) + counts.sum(axis=1) - right
    return right / rows, rows
