"""The decision threshold of a two-class model, selected by cross-fitting.

The threshold must be selected neither on images on which the classifier was fitted nor on held-out images. The training
images are divided into folds; each fold is scored by a classifier fitted on the other folds, and the threshold that is
best for all these scores is used with the classifier fitted on all images. The projection, which does not use labels,
is that of the final model.
"""

from dataclasses import replace

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.score_histogram import ScoreHistogram
from models.scorer import Head
from models.threshold import best_threshold
from models.threshold_aim import ThresholdAim, parse_threshold
from streaming.errors import ConfigurationError, DataError
from streaming.training.evaluate import evaluate
from streaming.training.fit import Fitted, fit_classifier
from streaming.training.fit_options import FitOptions

FOLDS = 3


def with_threshold(fitted: Fitted, training: DataFrame, options: FitOptions) -> Fitted:
    """Return the model with the threshold selected as the options request; unchanged if they request none.

    Args:
        training: the rows on which it was fitted: columns image_id, label, features and, with augmented copies,
            augmentation; copies are not used for the selection.

    Raises:
        ServiceError: there are not exactly two classes, or too few images of one.
    """
    if options.threshold is None:
        return fitted
    aim = aim_for(options.threshold, len(fitted.head.classes))
    threshold = aim.fixed if aim.fixed is not None else _cross_fitted(fitted.head, training, options, aim)
    return replace(fitted, head=replace(fitted.head, threshold=threshold))


def aim_for(wanted: str, n_classes: int) -> ThresholdAim:
    """Parse a requested threshold.

    Raises:
        ModelError: see `parse_threshold`.
        ServiceError: there are not exactly two classes.
    """
    if n_classes != 2:  # noqa: PLR2004
        raise ConfigurationError(
            f"a threshold requires two classes, got {n_classes}: omit --threshold, or give --threshold none to "
            "override the champion's"
        )
    return parse_threshold(wanted)


def tuned_threshold(rows: DataFrame, head: Head, aim: ThresholdAim) -> float:
    """Select the best threshold on rows (label, features) that the head was not fitted on; only counts are collected.

    Raises:
        ModelError: the head does not have two classes, or the rows have only one class.
    """
    scores = evaluate(rows, head).scores
    return best_threshold(scores if scores is not None else ScoreHistogram(len(head.classes)), aim)


def _cross_fitted(head: Head, training: DataFrame, options: FitOptions, aim: ThresholdAim) -> float:
    fold = _fold(training, options.seed)
    images = training.where("augmentation IS NULL") if "augmentation" in training.columns else training
    _check_folds(images, fold, head.classes)
    sizes = {row.fold: row.n for row in training.groupBy(fold.alias("fold")).agg(F.count("*").alias("n")).collect()}
    scores = ScoreHistogram(len(head.classes))
    for number in range(FOLDS):
        rest, n = training.where(fold != number), sum(sizes.values()) - sizes.get(number, 0)
        classifier = fit_classifier(rest, n, head.classes, head.projection, options)
        found = evaluate(images.where(fold == number), replace(head, classifier=classifier)).scores
        if found is not None:
            scores.merge(found)
    return best_threshold(scores, aim)


def _fold(rows: DataFrame, seed: int) -> Column:
    """Return a column: the fold of a row; images of a group are in the same fold."""
    unit = "group_id" if "group_id" in rows.columns else "image_id"
    return F.pmod(F.xxhash64(unit, F.lit("fold"), F.lit(seed)), F.lit(FOLDS))


def _check_folds(images: DataFrame, fold: Column, classes: tuple[str, ...]) -> None:
    """Check that each class is in at least two folds, so that every classifier is fitted on it."""
    rows = images.groupBy("label").agg(F.count_distinct(fold).alias("folds"), F.count("*").alias("images")).collect()
    folds, counts = {row.label: row.folds for row in rows}, {row.label: row.images for row in rows}
    if few := [name for name in classes if folds.get(name, 0) < 2]:  # noqa: PLR2004
        found = ", ".join(f"{counts.get(name, 0):,} of {name!r}" for name in classes)
        raise DataError(
            f"too few training images of {few[0]!r} to select a threshold: expected some in at least 2 of "
            f"{FOLDS} folds, got {found}, those of {few[0]!r} in {folds.get(few[0], 0)}; add images of this class, or "
            "give another --seed or a fixed threshold such as --threshold 0.5"
        )
