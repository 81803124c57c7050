"""The options of fitting and of the gate with their defaults and limits.

A separate module so that the command line can show the defaults without importing Spark.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from models.objective import resolve_objective
from models.threshold_aim import parse_threshold
from streaming.errors import UsageError

ProjectionKind = Literal["pca", "random", "randomized_pca", "none"]
ClassifierKind = Literal["logistic_regression", "mlp"]
MAX_HIDDEN_LAYERS = 16
NO_THRESHOLD = "none"  # predict the more probable class even if the champion has a threshold


@dataclass(frozen=True)
class FitOptions:
    """Options of fitting.

    Attributes:
        projection: `pca` (exact), `randomized_pca` for wider features, `random` for the widest, or `none`.
        explained_variance: PCA keeps the fewest components that explain this fraction of the variance.
        n_components: number of components; overrides `explained_variance` and `eps`.
        eps: a random projection preserves squared distances within a factor of 1 ± eps; the number of columns grows
            with the number of rows (Johnson and Lindenstrauss).
        classifier: `logistic_regression` or `mlp`.
        layers: widths of the MLP's hidden layers; without any it is a softmax regression.
        max_iter: maximum number of iterations of the classifier.
        reg_param, elastic_net: strength of logistic regression's penalty, and its L1 fraction.
        block_size: number of rows per matrix multiplication of the MLP.
        threshold: probability from which the second of two classes (in order of their names) is predicted: a number,
            or `f1` or `cost:FP:FN` for the best value by that criterion; see `models.threshold`. None for the more
            probable class.
        metric: metric by which the gate compares the model with the champion: `accuracy`, `cost:FP:FN` (or `cost`,
            with a threshold by costs), `f1`, `macro_f1` or `log_loss`; see `models.objective`. None for the metric
            that the threshold optimises, else the champion's, else accuracy.
        holdout: fraction of the images, by hash of their content, held out for evaluation.
        group_by: grouping of the split: `source`, `key`, or a regular expression whose group is taken from the source;
            `none` for no grouping, None for the champion's. See `streaming.images.groups`.
        seed: random seed of the split, the projections and the MLP's initial weights.
    """

    projection: ProjectionKind = "pca"
    explained_variance: float = 0.95
    n_components: int | None = None
    eps: float = 0.1
    classifier: ClassifierKind = "logistic_regression"
    layers: tuple[int, ...] = (128,)
    max_iter: int = 100
    reg_param: float = 0.03
    elastic_net: float = 0.0
    block_size: int = 128
    threshold: str | None = None
    metric: str | None = None
    holdout: float = 0.2
    group_by: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("projection", self.projection in get_args(ProjectionKind), _one_of(ProjectionKind)),
            ("explained_variance", 0 < self.explained_variance <= 1, "above 0 and at most 1"),
            ("n_components", self.n_components is None or self.n_components > 0, "1 or more"),
            ("eps", 0 < self.eps < 1, "between 0 and 1"),
            ("classifier", self.classifier in get_args(ClassifierKind), _one_of(ClassifierKind)),
            ("layers", len(self.layers) <= MAX_HIDDEN_LAYERS and all(width > 0 for width in self.layers), _LAYERS),
            ("max_iter", self.max_iter > 0, "1 or more"),
            ("reg_param", self.reg_param >= 0, "0 or more"),
            ("elastic_net", 0 <= self.elastic_net <= 1, "from 0 to 1"),
            ("block_size", self.block_size > 0, "1 or more"),
            ("holdout", 0 < self.holdout < 1, "between 0 and 1"),
        ]
        if self.threshold is not None:
            parse_threshold(self.threshold)
        resolve_objective(self.metric, self.threshold)
        for name, fits, wanted in checks:
            if not fits:
                raise UsageError(f"{name.replace('_', ' ')} should be {wanted}, got {getattr(self, name)!r}")

    def as_record(self) -> dict[str, str | int | float]:
        """Return the options that are set, as scalars for a manifest."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values["layers"] = ",".join(map(str, self.layers))
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class GateOptions:
    """Options of the gate.

    Attributes:
        margin: gain in the objective that a candidate must exceed: accuracy and F1 as fractions, cost per image, log
            loss in nats. A negative margin tolerates that loss, to switch to a model fitted on more or newer images.
        confidence: confidence that no candidate below the margin replaces the champion, over all comparisons with it;
            see `streaming.training.gate.confidence_of_look`.
        promote: whether a candidate that passes is promoted, or only registered.
    """

    margin: float = 0.0
    confidence: float = 0.95
    promote: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise UsageError(f"margin should be a finite number such as 0.01, got {self.margin}")
        if not 0.5 <= self.confidence < 1:  # noqa: PLR2004
            raise UsageError(f"confidence should be at least 0.5 and below 1, got {self.confidence}")


_LAYERS = f"at most {MAX_HIDDEN_LAYERS} widths of 1 or more"


def _one_of(kinds: Any) -> str:
    return " or ".join(get_args(kinds))
