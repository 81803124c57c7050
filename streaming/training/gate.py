"""The gate: decides whether a candidate replaces the champion, by their predictions for the same images.

They are compared by an objective (`models.objective`). Workers count the predictions; the driver receives counts of
differences, or for F1 of (truth, prediction, prediction), from which `models.paired` computes a lower bound of the
gain. docs/statistics.md describes the procedure, its assumptions and its error rates.

Every comparison on a holdout may err, so all comparisons share the error rate 1 − `GateOptions.confidence`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from models.errors import ModelError
from models.evaluation import UNIT
from models.objective import ACCURACY, MIN_PROBABILITY, Objective
from models.paired import F1Gain, Gain, MeanGain, PairedCounts, images_needed
from models.scorer import Head
from streaming.registry import Registry
from streaming.training.evaluate import predict
from streaming.training.fit_options import GateOptions

MAX_INT8_COST = 0.01  # loss of accuracy
MAX_F1_IMAGES = 2**18  # maximum number of images compared by F1, which bounds the rows on the driver
# Bins of differences in log loss: each keeps its mean, so only variation below 9% is lost.
BINS_PER_DOUBLING = 8
MANY_LOOKS = 5  # number of comparisons from which the verdict recommends a new holdout


@dataclass(frozen=True)
class Paired:
    """A paired comparison of two models: counts of correct predictions, and the gain in the objective."""

    objective: Objective
    counts: PairedCounts
    gain: Gain


@dataclass(frozen=True)
class Verdict:
    """The decision of the gate.

    Attributes:
        promote: whether the candidate replaces the champion.
        why: the reason, in words.
        paired: the comparison; None if there was none.
        low: lower bound of the candidate's gain with `confidence`.
        confidence: confidence of this comparison; see `confidence_of_look`.
        look: number of candidates compared with this champion on this holdout, including this one.
        needed: approximate number of images that would show the gain; None if it is shown or no number would.
    """

    promote: bool
    why: str
    paired: Paired | None = None
    low: float | None = None
    confidence: float | None = None
    look: int = 1
    needed: int | None = None


def pair(
    candidate: Head,
    candidate_rows: DataFrame,
    champion: Head,
    champion_rows: DataFrame,
    objective: Objective = ACCURACY,
) -> Paired:
    """Compare the predictions of two models on the images that both have rows of (image_id, label, features).

    Args:
        candidate_rows: features of the candidate's backbone; their labels are used.
        champion_rows: features of the champion's backbone.

    Raises:
        ModelError: the objective requires two classes and the candidate does not have two.
    """
    objective.check_classes(len(candidate.classes))
    by_loss = objective.metric == "log_loss"
    floor = MIN_PROBABILITY if by_loss else None
    losses = [F.col("loss")] if by_loss else []
    ours = predict(candidate_rows, candidate, floor=floor)
    theirs = predict(champion_rows, champion, floor=floor)
    ours = ours.select(
        "image_id", "label", F.col("predicted").alias("ours"), *(one.alias("our_loss") for one in losses)
    )
    theirs = theirs.select("image_id", F.col("predicted").alias("theirs"), *(one.alias("their_loss") for one in losses))
    both = ours.join(theirs, "image_id")
    if objective.metric in {"f1", "macro_f1"}:
        names = sorted({*candidate.classes, *champion.classes})
        only = names.index(candidate.classes[1]) if objective.metric == "f1" else None
        return _paired_f1(both, objective, names, only)
    return _paired_mean(both, objective, candidate.classes)


def confidence_of_look(confidence: float, look: int) -> float:
    """Return the confidence required of comparison number `look` (from 1) on a holdout.

    Its error rate is (1 − confidence) / (look · (look + 1)), so that any number of comparisons together has an error
    rate of at most 1 − confidence: alpha spending, restarted at each promotion (Javanmard and Montanari 2018, "Online
    Rules for Control of False Discovery Rate and False Discovery Exceedance", Annals of Statistics 46).
    """
    return 1 - (1 - confidence) / (look * (look + 1))


def looks_at(registry: Registry, champion: int, seed: int) -> int:
    """Return the number of candidates compared with version `champion` on the holdout of this seed so far.

    These are the versions registered after it with the same seed; dry runs do not count.
    """

    def was_judged(version: int) -> bool:
        try:
            return registry.manifest(version).training_data.seed == seed
        except ModelError:  # damaged: assume that it was
            return True

    return sum(was_judged(version) for version in registry.numbers() if version > champion)


def decide(paired: Paired, options: GateOptions, look: int = 1) -> Verdict:
    """Promote a candidate whose gain is significantly above the margin.

    Args:
        paired: comparison on a holdout on which neither model was fitted.
        options: margin and confidence.
        look: number of candidates compared on the holdout, including this one.
    """
    gain, counts, objective, margin = paired.gain, paired.counts, paired.objective, options.margin
    if not gain.rows:
        return Verdict(False, "no held-out image has features of both backbones, so nothing was compared")
    confidence = confidence_of_look(options.confidence, look)
    promote = gain.p_value(margin, 1 - confidence) < 1 - confidence
    low = gain.lower_bound(confidence)
    needed = None if promote else images_needed(gain, margin, 1 - confidence)
    if margin < 0:
        verdict = ("is not " if promote else "may be ") + f"worse by {-margin:.4f}"
    else:
        verdict = ("is" if promote else "is not shown to be") + f" better by more than {margin:.4f}"
    why = (
        f"gain in {objective.name} {gain.value:+.4f} on the same {gain.rows:,} images ({counts.only_candidate:,} "
        f"correct for the candidate only, {counts.only_champion:,} for the champion only), above {low:+.4f} with "
        f"{confidence:.4g} confidence: the candidate {verdict}"
    )
    return Verdict(
        promote, why + _advice(promote, needed, look, options.confidence), paired, low, confidence, look, needed
    )


def reject_costly_int8(verdict: Verdict, cost: float | None) -> Verdict:
    """Do not promote 8-bit integers that cost more than one percentage point of accuracy."""
    if cost is None or cost <= MAX_INT8_COST:
        return verdict
    return replace(
        verdict,
        promote=False,
        why=f"int8 costs {cost:.4f} of accuracy, more than the {MAX_INT8_COST} allowed; {verdict.why}",
    )


def _advice(promote: bool, needed: int | None, look: int, confidence: float) -> str:
    """Return a note on the number of images needed and on earlier comparisons."""
    text = ""
    if not promote:
        text = f"; about {needed:,} images like these would show it" if needed else "; more images like these would not"
    if look > 1:
        text += (
            f"; comparison {look} on this holdout since the champion's promotion, {confidence:.4g} confidence in total"
        )
    if look >= MANY_LOOKS:
        text += "; for a new holdout, label more images and change --seed"
    return text


def _paired_mean(both: DataFrame, objective: Objective, classes: Sequence[str]) -> Paired:
    """Compare means from counts of the differences: at most five values, or some hundred bins of log loss."""
    difference = _difference(objective, classes)
    key = _bin(difference) if objective.metric == "log_loss" else difference
    # Differences are multiples of 2⁻²⁴ or equal within a bin, so the order of the rows does not change their mean.
    found = (
        both.groupBy(*_right(), key.alias("key"))
        .agg(F.count(F.lit(1)).alias("n"), F.avg(difference).alias("mean"))
        .collect()
    )
    found.sort(key=attrgetter("key", "a", "b"))
    values, counts = np.array([row.mean for row in found], np.float64), np.array([row.n for row in found], np.int64)
    return Paired(objective, _counts(found), MeanGain(values, counts, objective.most))


def _paired_f1(both: DataFrame, objective: Objective, classes: Sequence[str], only: int | None) -> Paired:
    """Compare F1 from counts of (truth, prediction, prediction) of at most `MAX_F1_IMAGES` images, sampled by hash."""
    rows = both.count()
    if rows > MAX_F1_IMAGES:
        share = int(2**32 * MAX_F1_IMAGES / rows)
        both = both.where(F.pmod(F.xxhash64("image_id", F.lit("F1")), F.lit(2**32)) < share)
    by_answer = both.groupBy("label", "ours", "theirs", *_right()).agg(F.count(F.lit(1)).alias("n"))
    found = sorted(by_answer.collect(), key=attrgetter("label", "ours", "theirs"))
    numbers = {name: number for number, name in enumerate(dict.fromkeys([*classes, *(row.label for row in found)]))}
    cells = [[numbers[row.label], numbers[row.ours], numbers[row.theirs]] for row in found]
    counts = np.array([row.n for row in found], np.int64)
    gain = F1Gain(len(numbers), np.array(cells, np.int64).reshape(-1, 3), counts, only)
    return Paired(objective, _counts(found), gain)


def _right() -> tuple[Column, Column]:
    """Return columns: whether the candidate and whether the champion is correct."""
    return (F.col("ours") == F.col("label")).alias("a"), (F.col("theirs") == F.col("label")).alias("b")


def _difference(objective: Objective, classes: Sequence[str]) -> Column:
    """Return a column: the champion's loss minus the candidate's."""
    if objective.metric == "log_loss":
        return F.col("their_loss") - F.col("our_loss")
    loss = F.lit(1.0)
    if objective.costs is not None:
        loss = F.when(F.col("label") == classes[1], objective.costs[1]).otherwise(objective.costs[0])
    right, theirs_right = (F.col(answer) == F.col("label") for answer in ("ours", "theirs"))
    return loss * (right.cast("int") - theirs_right.cast("int"))


def _bin(difference: Column) -> Column:
    """Return a column: the bin of a difference; differences in a bin are 0 or within 9% of each other."""
    size = 1 + F.floor(F.log2(F.abs(difference) / F.lit(UNIT)) * BINS_PER_DOUBLING)
    return F.when(difference == 0, 0.0).otherwise(F.signum(difference) * size)


def _counts(found: Sequence[Row]) -> PairedCounts:
    cases = ((True, True), (True, False), (False, True), (False, False))
    return PairedCounts(*(sum(row.n for row in found if (row.a, row.b) == case) for case in cases))
