"""The threshold of a model of two classes, found on images that the model which scores them was not fitted on.

The images to report on must not choose it, either. So the training images are parted into folds; each fold is scored
by a classifier that was fitted on the others, and the threshold that is best for all these scores together is that of
the classifier which is fitted on all. The projection, which never sees a label, is that of the final model.
"""

from dataclasses import replace

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.score_histogram import ScoreHistogram
from models.scorer import Head
from models.threshold import ThresholdAim, best_threshold, parse_threshold
from streaming.errors import ConfigurationError, DataError
from streaming.training.evaluate import evaluate
from streaming.training.fit import Fitted, fit_classifier
from streaming.training.fit_options import FitOptions

FOLDS = 3


def with_threshold(fitted: Fitted, training: DataFrame, options: FitOptions) -> Fitted:
    """The same model with the threshold that the options ask for; as it is, if they ask for none.

    Args:
        training: what it was fitted on: image_id, label, features, and augmentation where there are altered copies, on
            which is fitted but which do not choose.

    Raises:
        ServiceError: other than two classes, or too few images of one.
    """
    if options.threshold is None:
        return fitted
    aim = aim_for(options.threshold, len(fitted.head.classes))
    threshold = aim.fixed if aim.fixed is not None else _cross_fitted(fitted.head, training, options, aim)
    return replace(fitted, head=replace(fitted.head, threshold=threshold))


def aim_for(wanted: str, n_classes: int) -> ThresholdAim:
    """What a threshold is asked to be.

    Raises:
        ModelError: see `parse_threshold`.
        ServiceError: other than two classes.
    """
    if n_classes != 2:  # noqa: PLR2004
        raise ConfigurationError(
            f"a threshold is for two classes, there are {n_classes}; leave out --threshold, or give --threshold none "
            "where it would be the champion's"
        )
    return parse_threshold(wanted)


def tuned_threshold(rows: DataFrame, head: Head, aim: ThresholdAim) -> float:
    """The threshold that is best on rows (label, features) for a head that was not fitted on them.

    Only counts of scores reach the driver.

    Raises:
        ModelError: the head has other than two classes, or the rows are of one class only.
    """
    scores = evaluate(rows, head).scores
    return best_threshold(scores if scores is not None else ScoreHistogram(len(head.classes)), aim)


def _cross_fitted(head: Head, training: DataFrame, options: FitOptions, aim: ThresholdAim) -> float:
    fold = _fold(training, options.seed)
    images = training.where("augmentation IS NULL") if "augmentation" in training.columns else training
    _check_folds(images, fold, head.classes)
    scores = ScoreHistogram(len(head.classes))
    for number in range(FOLDS):
        rest = training.where(fold != number)
        classifier = fit_classifier(rest, rest.count(), head.classes, head.projection, options)
        found = evaluate(images.where(fold == number), replace(head, classifier=classifier)).scores
        if found is not None:
            scores.merge(found)
    return best_threshold(scores, aim)


def _fold(rows: DataFrame, seed: int) -> Column:
    """Which fold a row is in; images of a group are in the same one."""
    unit = "group_id" if "group_id" in rows.columns else "image_id"
    return F.pmod(F.xxhash64(unit, F.lit("fold"), F.lit(seed)), F.lit(FOLDS))


def _check_folds(images: DataFrame, fold: Column, classes: tuple[str, ...]) -> None:
    """Each class must be in two folds or more, so that none is fitted without it."""
    rows = images.groupBy("label").agg(F.count_distinct(fold).alias("folds"), F.count("*").alias("images")).collect()
    folds, counts = {row.label: row.folds for row in rows}, {row.label: row.images for row in rows}
    if few := [name for name in classes if folds.get(name, 0) < 2]:  # noqa: PLR2004
        found = ", ".join(f"{counts.get(name, 0):,} of {name!r}" for name in classes)
        raise DataError(
            f"too few training images of {few[0]!r} to find the best threshold: expected some in at least 2 of "
            f"{FOLDS} folds, got {found}, those of {few[0]!r} in {folds.get(few[0], 0)}; add images of it, give "
            "another --seed, or a threshold, such as --threshold 0.5"
        )
