"""The decision threshold of binary classifiers: the probability from which the second class is predicted.

One half is optimal if the probabilities are calibrated and both kinds of errors cost the same. Otherwise the threshold
is chosen on images that the model was not fitted on: the one that maximises the F1 of the second class (Lipton et al.
2014, "Optimal Thresholding of Classifiers to Maximize F1 Measure"), or minimises the cost of errors.
"""

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.score_histogram import ScoreHistogram
from models.threshold_aim import ThresholdAim

Floats = NDArray[np.float64]

_SECOND = 1  # of the two classes
_LIMITS = (-104.0, 30.0)  # log-odds beyond which a float32 probability is 0 or 1


def best_threshold(scores: ScoreHistogram, aim: ThresholdAim) -> float:
    """The best threshold for the aim; of equally good ones, the closest to one half.

    Args:
        scores: of a model of two classes; see `models.evaluation.Evaluation.scores`.

    Raises:
        ModelError: other than two classes, or rows of one of them only.
    """
    if scores.n_classes != 2:  # noqa: PLR2004
        raise ModelError(f"a threshold requires two classes, got {scores.n_classes}")
    if aim.fixed is not None:
        return aim.fixed
    others, members = scores.of_class(_SECOND)
    if not others.any() or not members.any():
        raise ModelError(
            "the best threshold requires rows of both classes, "
            f"got {members.sum()} of the second and {others.sum()} others"
        )
    # Cut i predicts the second class for scores from number i; the last cut, for none.
    found = np.concatenate([members[::-1].cumsum()[::-1], [0]])  # true positives
    wrong = np.concatenate([others[::-1].cumsum()[::-1], [0]])  # false positives
    missed = members.sum() - found
    if aim.costs is None:
        worth = 2 * found / (2 * found + wrong + missed)
    else:
        worth = -(aim.costs[0] * wrong + aim.costs[1] * missed)
    places, possible = _cuts(*scores.bounds_of_class(_SECOND))
    most = worth[possible].max()
    places = places[possible & (worth >= most - 1e-12 * abs(most))]
    return float(_sigmoid(places[np.abs(places).argmin()]))


def _cuts(lowest: Floats, highest: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Log-odds (n + 1) that separate n ascending scores, before, between and after them; 0 (one half) if possible.

    And whether each is possible: scores with equal float32 probabilities cannot be separated, nor 0 or 1 be passed.
    """
    below = np.concatenate([[-np.inf], highest])
    above = np.concatenate([lowest, [np.inf]])
    possible = _sigmoid(below).astype(np.float32) < _sigmoid(above).astype(np.float32)
    # A step away from the outermost scores.
    low = np.where(np.isfinite(below), below, above - 1)
    high = np.where(np.isfinite(above), above, below + 1)
    with np.errstate(invalid="ignore"):
        middle = np.clip((low + high) / 2, *_LIMITS)
    return np.where((below < 0) & (above >= 0), 0.0, middle), possible


def _sigmoid(odds: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-odds)), np.float64)
