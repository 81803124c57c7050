"""Objectives: the metrics by which two models are compared.

For every objective more is better, so that a positive gain means that the candidate is better.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

from models.errors import ModelError
from models.threshold_aim import ThresholdAim, parse_threshold

Metric = Literal["accuracy", "cost", "f1", "macro_f1", "log_loss"]
MIN_PROBABILITY = 1e-3  # of the true class, in comparisons by log loss

_NAMES = {"f1": "F1 of the second class", "macro_f1": "macro F1", "log_loss": "log loss"}


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric of a model on labelled images.

    `accuracy`, `cost` and `log_loss` are means over images; `f1` (of the second of two classes) and `macro_f1` are not.
    Probabilities are clipped to `MIN_PROBABILITY` for the log loss: the mean of an unbounded loss has no confidence
    bound that holds for every distribution (Bahadur and Savage 1956, "The Nonexistence of Certain Statistical
    Procedures in Nonparametric Problems").

    Attributes:
        costs: of a false positive and a false negative, for `cost` only; see `models.threshold`.
    """

    metric: Metric = "accuracy"
    costs: tuple[float, float] | None = None

    @classmethod
    def of_aim(cls, aim: ThresholdAim) -> Self | None:
        """The objective that a threshold with this aim optimises; None for a fixed one."""
        if aim.fixed is not None:
            return None
        return cls("f1") if aim.costs is None else cls("cost", aim.costs)

    @property
    def most(self) -> float:
        """The largest difference that one image can make to a mean, or the largest difference of two F1 scores."""
        if self.costs is not None:
            return max(self.costs)
        return -math.log(MIN_PROBABILITY) if self.metric == "log_loss" else 1.0

    @property
    def name(self) -> str:
        return (
            f"cost ({self.costs[0]:g} a false positive, {self.costs[1]:g} a false negative)"
            if self.costs
            else (_NAMES.get(self.metric, self.metric))
        )

    def __str__(self) -> str:
        """The text that `parse_objective` parses."""
        return (
            self.metric
            if self.costs is None
            else ":".join(["cost", *(f"{float(cost)!r}".removesuffix(".0") for cost in self.costs)])
        )

    def check_margin(self, margin: float) -> None:
        """Raise ModelError if no two models can differ by this much."""
        if not abs(margin) < self.most:
            raise ModelError(f"a margin of {self.name} is between -{self.most:g} and {self.most:g}, got {margin:g}")

    def check_classes(self, n_classes: int) -> None:
        """Raise ModelError if the objective requires two classes and there are others."""
        if self.metric in {"cost", "f1"} and n_classes != 2:  # noqa: PLR2004
            raise ModelError(f"--metric {self} requires two classes, got {n_classes}; use --metric accuracy")


ACCURACY = Objective()


def parse_objective(text: str, threshold: str | None = None) -> Objective:
    """Parse `accuracy`, `cost:1:5`, `f1`, `macro_f1` or `log_loss`.

    Args:
        threshold: the threshold, such as `cost:1:5`, with the costs for `cost` alone.

    Raises:
        ModelError: anything else, or `cost` without costs.
    """
    name = text.strip().lower()
    if name == "cost" and threshold is not None and (costs := parse_threshold(threshold).costs):
        return Objective("cost", costs)
    if name.startswith("cost:"):
        return Objective("cost", parse_threshold(name).costs)
    for metric in ("accuracy", "f1", "macro_f1", "log_loss"):
        if name == metric:
            return Objective(metric)
    raise ModelError(
        "a metric is accuracy, cost:FP:FN (or cost, with a threshold by cost:FP:FN), f1, macro_f1 or log_loss; "
        f"got {text!r}"
    )


def resolve_objective(metric: str | None, threshold: str | None) -> Objective | None:
    """The objective `metric`, or else the one that `threshold` optimises; None if neither is set.

    Raises:
        ModelError: as `parse_objective` and `models.threshold_aim.parse_threshold`.
    """
    if metric is not None:
        return parse_objective(metric, threshold)
    return None if threshold is None else Objective.of_aim(parse_threshold(threshold))
