"""How to fit, and what the result must show: every setting, its default and its limits, in one place.

Apart from the fit and the gate themselves so that the command line, which shows the defaults, need not import Spark.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from models.objective import resolve_objective
from models.threshold import parse_threshold
from streaming.errors import UsageError

ProjectionKind = Literal["pca", "random", "randomized_pca", "none"]
ClassifierKind = Literal["logistic_regression", "mlp"]
MAX_HIDDEN_LAYERS = 16
NO_THRESHOLD = "none"  # in place of a threshold: the more probable class, whatever the champion has


@dataclass(frozen=True)
class FitOptions:
    """How to fit.

    Attributes:
        projection: `pca` is exact, `randomized_pca` for features too wide for it, `random` for the widest.
        explained_variance: PCA keeps the fewest components that explain this share of the variance.
        n_components: keep so many instead; also for the random projection, in place of `eps`.
        eps: a random projection keeps squared distances within 1 ± eps, which asks for more columns the more rows
            there are (Johnson and Lindenstrauss).
        layers: the widths of the MLP's hidden layers; none make it a plain softmax.
        reg_param, elastic_net: strength of logistic regression's penalty, and its part that is the lasso's.
        block_size: rows that the MLP multiplies at a time.
        threshold: of two classes, the probability from which on the second one (in order of their names) is answered:
            a number, or `f1` or `cost:FP:FN` for the one that is best in that; see `models.threshold`. None for the
            more probable class.
        metric: what the model is run for, by which the gate compares it with the champion: `accuracy`, `cost:FP:FN` (or
            `cost`, with a threshold by costs), `f1`, `macro_f1` or `log_loss`; see `models.objective`. None for what
            the threshold optimises, else what the champion is run for, else accuracy.
        holdout: the share of the images, by hash of their content, that is held out to judge the model by.
        group_by: images of one group are on one side of the split: `source`, `key`, or a regular expression whose group
            is taken from the source; `none`, or None for the champion's. See `streaming.images.groups`.
        seed: of the split, the projections and the MLP's first weights.
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
        """What a manifest keeps of them: the settings that have a value, each as one."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values["layers"] = ",".join(map(str, self.layers))
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class GateOptions:
    """What a candidate must show.

    Attributes:
        margin: by how much it must be better in the objective: accuracy and F1 as a share of 1, cost per image, log
            loss in nats. A negative margin asks that it be no worse by more than that: for handing over to a model that
            was fitted on more, or newer, images.
        confidence: that a champion is not replaced by a candidate that does not pass the margin, however many
            candidates are compared with it; see `streaming.training.gate.confidence_of_look`.
        promote: whether a candidate that passes becomes the champion; without it, it is registered only.
    """

    margin: float = 0.0
    confidence: float = 0.95
    promote: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise UsageError(f"the margin is a number such as 0.01, got {self.margin}")
        if not 0.5 <= self.confidence < 1:  # noqa: PLR2004
            raise UsageError(f"the confidence is at least 0.5 and below 1, got {self.confidence}")


_LAYERS = f"at most {MAX_HIDDEN_LAYERS} widths of 1 or more"


def _one_of(kinds: Any) -> str:
    return " or ".join(get_args(kinds))
